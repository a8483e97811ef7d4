"""Every format, both layouts: dequantised, the output is the source's values and exact zeros, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ep2tp.checkpoint.reshard import reshard
from ep2tp.checkpoint.verify import verify
from tests.checkpoint.checkpoints import FORMATS, Model, load, same_bits, stored_of


@pytest.mark.parametrize(("name", "tp"), [*((name, 3) for name in FORMATS), ("fp8_block_f32", 7), ("int4_g32", 7)])
def test_padded_values(tmp_path: Path, name: str, tp: int) -> None:
    model = Model(name, size=320)
    source = model.write(tmp_path / "source")
    reshard(source, tmp_path / "out", tp=tp)
    before, after = load(source), load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert before.keys() == after.keys()
    assert config["moe_intermediate_size"] > 320
    for module, (rows, cols) in model.modules().items():
        old = FORMATS[name].load(stored_of(before, module))
        new = FORMATS[name].load(stored_of(after, module))
        assert torch.equal(new[:rows, :cols], old), module
        assert not new[rows:].any() and not new[:, cols:].any(), module
        assert new.shape[1 if "down" in module else 0] % tp == 0
    for tensor in before.keys() - {t for m in model.modules() for t in before if t.startswith(m)}:
        assert same_bits(before[tensor], after[tensor])
    assert verify(tmp_path / "out", source).tensors == len(before)


@pytest.mark.parametrize("name", FORMATS)
def test_rank_slices_make_up_the_padded_checkpoint(tmp_path: Path, name: str) -> None:
    source = Model(name, size=320).write(tmp_path / "source")
    reshard(source, tmp_path / "padded", tp=3)
    reshard(source, tmp_path / "ranks", tp=3, layout="ranks")
    padded, shared = load(tmp_path / "padded"), load(tmp_path / "ranks" / "shared")
    slices = [load(tmp_path / "ranks" / f"rank-{rank}-of-3") for rank in range(3)]
    assert slices[0].keys() | shared.keys() == padded.keys()
    assert not slices[0].keys() & shared.keys()
    for tensor, whole in padded.items():
        if tensor in shared:
            assert same_bits(whole, shared[tensor]), tensor
            continue
        axis = next(a for a in range(whole.ndim) if whole.shape[a] != slices[0][tensor].shape[a])
        parts = [s[tensor].view(torch.uint8) if whole.element_size() == 1 else s[tensor] for s in slices]
        assert torch.equal(torch.cat(parts, axis), whole.view(parts[0].dtype)), tensor
    assert verify(tmp_path / "ranks", source).tensors == len(padded)


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
