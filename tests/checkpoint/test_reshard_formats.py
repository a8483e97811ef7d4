"""Every format, both layouts: dequantised, the output is the source's values and exact zeros, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from tests.checkpoint.checkpoints import FORMATS, Model, Stored, load, same_bits, stored_of


@pytest.mark.parametrize(
    ("name", "tp", "files"), [*((name, 3, 1) for name in FORMATS), ("fp8_block_f32", 7, 2), ("int4_g32", 7, 2)]
)
def test_values_and_slices(tmp_path: Path, name: str, tp: int, files: int) -> None:
    model = Model(name, size=320, files=files)
    source = model.write(tmp_path / "source")
    for layout in ("padded", "ranks"):
        reshard(source, tmp_path / layout, tp=tp, layout=layout)  # type: ignore[arg-type]
    before, padded = load(source), load(tmp_path / "padded")
    for layout in ("padded", "ranks"):
        assert verify(tmp_path / layout, source).tensors == len(before)
    config = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert before.keys() == padded.keys()
    assert config["moe_intermediate_size"] > 320
    check_padded_values(model, before, padded, tp)
    check_slices(tmp_path / "ranks", padded, tp)


def check_padded_values(model: Model, before: Stored, padded: Stored, tp: int) -> None:
    for module, (rows, cols) in model.modules().items():
        old = FORMATS[model.format].load(stored_of(before, module))
        new = FORMATS[model.format].load(stored_of(padded, module))
        assert torch.equal(new[:rows, :cols], old), module
        assert not new[rows:].any() and not new[:, cols:].any(), module
        assert new.shape[1 if "down" in module else 0] % tp == 0
    for tensor in before.keys() - {t for m in model.modules() for t in before if t.startswith(m)}:
        assert same_bits(before[tensor], padded[tensor])


def check_slices(folder: Path, padded: Stored, tp: int) -> None:
    """The ranks' slices, one after the other, are the padded tensors."""
    shared, slices = load(folder / "shared"), [load(folder / f"rank-{rank}-of-{tp}") for rank in range(tp)]
    assert slices[0].keys() | shared.keys() == padded.keys()
    assert not slices[0].keys() & shared.keys()
    for tensor, whole in padded.items():
        if tensor in shared:
            assert same_bits(whole, shared[tensor]), tensor
            continue
        axis = next(a for a in range(whole.ndim) if whole.shape[a] != slices[0][tensor].shape[a])
        parts = [s[tensor].view(torch.uint8) if whole.element_size() == 1 else s[tensor] for s in slices]
        assert same_bits(torch.cat(parts, axis).view(whole.dtype), whole), tensor


def test_mtp_in_another_format(tmp_path: Path) -> None:
    model = Model("nvfp4_modelopt", size=72 * 2, plain_mtp=True)
    source = model.write(tmp_path / "source")
    reshard(source, tmp_path / "out", tp=4)
    before, after = load(source), load(tmp_path / "out")
    for module, (rows, cols) in model.modules().items():
        stored = model.format_of(module)
        old, new = stored.load(stored_of(before, module)), stored.load(stored_of(after, module))
        assert torch.equal(new[:rows, :cols], old) and not new[rows:].any() and not new[:, cols:].any()
    verify(tmp_path / "out", source)
