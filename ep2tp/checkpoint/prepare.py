"""From a source to its planned conversion: everything is checked here, before the first byte is written."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from ep2tp.checkpoint.config_files import new_config, new_index
from ep2tp.checkpoint.conversion import Conversion, Layout
from ep2tp.checkpoint.deepseek_parts import PartsSource, is_parts
from ep2tp.checkpoint.earlier import STATE
from ep2tp.checkpoint.header import parse_json
from ep2tp.checkpoint.hub import HubSource
from ep2tp.checkpoint.hub_cache import download
from ep2tp.checkpoint.jobs import check_outputs, plan_jobs
from ep2tp.checkpoint.manifest import MANIFEST
from ep2tp.checkpoint.reader import INDEX, read_text
from ep2tp.checkpoint.source import UNREAD, LocalSource, Source
from ep2tp.errors import CheckpointError, ModelError, SettingError
from ep2tp.model.facts import ModelFacts
from ep2tp.model.families import load_families
from ep2tp.model.locate import MODELOPT, facts_of, with_modelopt
from ep2tp.model.sharding import plan_shards
from ep2tp.settings import Settings


def open_source(
    source: str | Path, beside: Path, revision: str | None = None, stream: bool = False, config: Path | None = None
) -> Source:
    """The source that a user names: a folder, or else a model on the hub.

    Args:
        source: the folder or ``owner/name``.
        beside: the output folder; a streamed source keeps its file of the moment there.
        revision: branch, tag or commit on the hub.
        stream: hold one file of a hub model at a time, instead of downloading it whole into the hub's cache.
        config: config.json of a source that has none.

    Raises:
        CheckpointError: it is neither, the hub does not answer, or ``config`` is no config.json.
        SettingError: ``config`` is given for a source that has its own.
    """
    folder = Path(source)
    if config is not None:
        parse_json(config, read_text(config))
    if folder.is_dir():
        _refuse_second_config(str(folder), (folder / "config.json").is_file(), config)
        return PartsSource(folder, config) if is_parts(folder) else LocalSource(folder, config)
    if folder.is_absolute() or str(source).startswith("."):
        return LocalSource(folder)  # says that there is no such folder
    if stream:
        streamed = HubSource(str(source), revision, beside / STATE, config)
        _refuse_second_config(streamed.label, "config.json" in streamed.sizes, config)
        return streamed
    return open_source(download(str(source), revision, UNREAD), beside, config=config)


def _refuse_second_config(label: str, has_own: bool, config: Path | None) -> None:
    if has_own and config is not None:
        raise SettingError(
            f"--config {config}: is for a source without config.json, and {label} has its own; leave --config out, or "
            "convert a copy of the source whose config.json you have replaced"
        )


def prepare(source: Source, tp: int, layout: Layout) -> Conversion:
    """Plan a conversion from the source's config.json and headers.

    Raises:
        CheckpointError, ModelError, PatchError: the source is damaged, contradicts itself, or cannot be sliced.
    """
    text = source.read_text("config.json")
    if text is None:
        raise CheckpointError(
            f"{source.label}: has no config.json; name the original's with --config, or a folder that has one"
        )
    config = parse_json(Path(source.label) / "config.json", text)
    described = with_modelopt(config, Path(source.label) / MODELOPT, source.read_text(MODELOPT))
    facts = _facts(described, source.label)
    for c in facts.classes:
        if not c.is_known:
            raise ModelError(
                f"{source.label}: {c.name} weights are stored by {facts.quantization.method}, which ep2tp cannot "
                "slice; use another quantisation of the model"
            )
    plan = plan_shards(facts, tp)
    jobs = plan_jobs(source.files(), plan, layout)
    others = source.others()
    ours = ("config.json", INDEX, MANIFEST)
    check_outputs([*(name for job in jobs for name in job.outputs), *others, *ours])
    old_index = source.read_text(INDEX)
    index = new_index(jobs, old_index is not None) if layout == "padded" else None
    texts = {name: sha256(data).hexdigest() for name, data in (("config.json", text), (INDEX, old_index)) if data}
    config_text, left_out = new_config(config, plan), tuple(sorted(source.left_out()))
    return Conversion(plan, layout, jobs, config_text, index, others, source.identity(), texts, left_out)


def _facts(config: dict[str, object], label: str) -> ModelFacts:
    settings = Settings.from_environment()
    return facts_of(config, label, load_families(settings.patches, settings.patch_path))
