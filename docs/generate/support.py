"""Which engines, models and formats are supported: from the seam tables, the patch files and ``formats.py``."""

from __future__ import annotations

import re

from docs.generate.markdown import table
from ep2tp.engines.sglang import seams as sglang
from ep2tp.engines.vllm import seams as vllm
from ep2tp.model import formats
from ep2tp.model.families import Family, load_families
from ep2tp.model.formats import Format

FORMATS: tuple[tuple[Format, str], ...] = (
    (formats.PLAIN, "BF16, F16, F32"),
    (formats.fp8_block(), "FP8 E4M3, a scale for each block of 128 by 128 (other block sizes, too)"),
    (formats.fp8_channel(), "FP8 E4M3, a scale for each output row (compressed-tensors)"),
    (formats.fp8_tensor(), "FP8 E4M3, one scale"),
    (formats.int_packed(4, 32), "INT4 in groups (compressed-tensors; other group sizes, too)"),
    (formats.int_packed(8, 128), "INT8 in groups (compressed-tensors; other group sizes, too)"),
    (formats.nvfp4(), "NVFP4 (ModelOpt, compressed-tensors)"),
    (formats.mxfp4(), "MXFP4 (DeepSeek-V4, gpt-oss, compressed-tensors)"),
    (formats.mxfp8(), "MXFP8"),
    (formats.awq(4, 128), "AWQ INT4 (other group sizes, too)"),
    (formats.gptq(4, 128), "GPTQ INT4 without `desc_act` (other group sizes; INT8)"),
)
ENGINES = {"vllm": ("vLLM", vllm.VERSIONS), "sglang": ("SGLang", sglang.VERSIONS)}


def short_table() -> str:
    """One row for the families of a maker that were checked with the same versions, a column an engine; formats."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for family in load_families().values():
        versions = (_span(family.checked.get(engine, ()), ENGINES[engine][1]) for engine in ENGINES)
        rows.setdefault((_maker(family.title), *versions), []).append(family.title)
    body = [("; ".join(titles), *versions) for (_, *versions), titles in rows.items()]
    header = ("models", *(f"{name} {_all(versions)}" for name, versions in ENGINES.values()))
    return table(header, body) + "\n\nFormats: " + ", ".join(f"`{form.name}`" for form, _ in FORMATS) + "."


def _maker(title: str) -> str:
    return re.split(r"[\d-]", title)[0]


def page() -> str:
    """The page with everything that the tables say."""
    return (
        "\n\n".join(
            [
                "# Engines, models, formats",
                "<!-- written by python -m docs.generate; edit docs/generate/support.py -->\n",
                "Written from `ep2tp/patches/`, `ep2tp/model/formats.py` and the engines' seam tables. *Checked*: the "
                "model code of that engine version was compared with the patch (names, sizes, how they are sliced). "
                "What was run, and where, is in [measured results](../results.md); `tests/engines` boots both engines.",
                "## Engines",
                table(
                    ("engine", "versions whose functions were compared", "outside of that range"),
                    [
                        (name, _all(versions), "ep2tp warns and leaves launches alone; `EP2TP=on` insists")
                        for name, versions in ENGINES.values()
                    ],
                ),
                "What is wrapped in each: [seams](../seams.md).",
                "## Patches",
                table(
                    ("patch", "models", "`model_type`", "vLLM", "SGLang"),
                    [_family(name, family) for name, family in load_families().items()],
                ),
                "`ep2tp patches` prints this table, `ep2tp patches --model MODEL --tp N` what one model's slices are. "
                "[Writing a patch](../patches.md).",
                "## Formats",
                table(
                    ("name", "what it is", "rows that share a scale", "columns that share a scale or word", "block"),
                    [(f"`{f.name}`", what, str(f.row_block), str(f.col_block), str(f.block)) for f, what in FORMATS],
                    (2, 3, 4),
                ),
                "Rows are an expert's outputs, columns its inputs. *Block* is the least run of intermediate values "
                "that no slice may cut; they are rows of gate and up, and columns of down: "
                "[why blocks matter](../concepts/blocks.md).",
                "## Why each patch exists",
                *(_ledger(name, family) for name, family in load_families().items()),
            ]
        )
        + "\n"
    )


def _all(versions: tuple[str, ...]) -> str:
    return ", ".join(versions)


def _span(versions: tuple[str, ...], all_versions: tuple[str, ...]) -> str:
    if not versions:
        return "not compared"
    return "all" if set(versions) >= set(all_versions) else ", ".join(versions)


def _family(name: str, family: Family) -> tuple[str, ...]:
    types = ", ".join(f"`{kind}`" for kind in family.match.model_types)
    versions = (", ".join(family.checked.get(engine, ())) or "not compared" for engine in ENGINES)
    return (f"[`{name}`](#{name})", family.title, types, *versions)


def _ledger(name: str, family: Family) -> str:
    links = ", ".join(f"[{i}]({link})" for i, link in enumerate(family.ledger.upstream, 1))
    lines = [
        f"### `{name}` {{ #{name} }}",
        f"{family.title}. {_sentence(family.expert_parallel)}",
        f"- **Why:** {_sentence(family.ledger.why)}",
        f"- **How:** {_sentence(family.ledger.how)}",
        *(f"- **Beware:** {_sentence(hazard)}" for hazard in family.hazards),
        f"- **Can go when:** {_sentence(family.ledger.retire_when)}",
        f"- **Sources:** {links}",
    ]
    return lines[0] + "\n\n" + lines[1] + "\n\n" + "\n".join(lines[2:])


def _sentence(text: str) -> str:
    return " ".join(text.split())
