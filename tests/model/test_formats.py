"""The quantisation formats: what no slice may cut, what padding holds, and stored sizes from logical ones."""

from __future__ import annotations

import pytest

from ep2tp.layout.split import Split
from ep2tp.model.families import Matrix
from ep2tp.model.formats import (
    PLAIN,
    WEIGHT_SUFFIXES,
    Dim,
    Fill,
    Format,
    awq,
    fp8_block,
    fp8_channel,
    fp8_tensor,
    gptq,
    int_packed,
    mxfp4,
    mxfp8,
    nvfp4,
)
from ep2tp.model.sharding import TensorPlan

FORMATS = [
    # format, name, bits, rows that share a scale, columns, block, block once padded (16 bytes of a row)
    (PLAIN, "bf16", 16, 1, 1, 1, 8),
    (fp8_block(), "fp8_block128", 8, 128, 128, 128, 128),
    (fp8_block(32, 32), "fp8_block32", 8, 32, 32, 32, 32),
    (fp8_block(1, 128), "fp8_block1x128", 8, 1, 128, 128, 128),
    (fp8_block(8, 8), "fp8_block8", 8, 8, 8, 8, 16),
    (fp8_channel(), "fp8_channel", 8, 1, 1, 1, 16),
    (fp8_tensor(), "fp8_tensor", 8, 1, 1, 1, 16),
    (int_packed(4, 32), "int4_g32", 4, 1, 32, 32, 32),
    (int_packed(4, 128), "int4_g128", 4, 1, 128, 128, 128),
    (int_packed(4, 12), "int4_g12", 4, 1, 24, 24, 96),
    (int_packed(8, 64), "int8_g64", 8, 1, 64, 64, 64),
    (nvfp4(), "nvfp4", 4, 1, 16, 16, 32),
    (mxfp4(), "mxfp4", 4, 1, 32, 32, 32),
    (mxfp8(), "mxfp8", 8, 1, 32, 32, 32),
    (awq(4, 128), "awq_int4_g128", 4, 8, 128, 128, 128),
    (awq(8, 32), "awq_int8_g32", 8, 4, 32, 32, 32),
    (gptq(4, 128), "gptq_int4_g128", 4, 8, 128, 128, 128),
    (gptq(8, 32), "gptq_int8_g32", 8, 4, 32, 32, 32),
]


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row[1])
def test_blocks(row: tuple[Format, str, int, int, int, int, int]) -> None:
    stored = row[0]
    measured = (stored.name, stored.bits, stored.row_block, stored.col_block, stored.block, stored.padded_block)
    assert measured == row[1:]


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row[1])
def test_slices_of_whole_blocks_cut_no_stored_element(row: tuple[Format, str, int, int, int, int, int]) -> None:
    for component in row[0].components:
        for dim in (component.rows, component.cols):
            assert dim is None or row[0].block % dim.per == 0
            assert dim is None or -component.ndim <= dim.axis < 0
            assert dim is None or dim.stored(4 * row[0].block) * dim.per == 4 * row[0].block


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row[1])
def test_a_padded_slice_has_rows_of_whole_16_bytes(row: tuple[Format, str, int, int, int, int, int]) -> None:
    assert row[0].padded_block * row[0].bits % 128 == 0
    assert row[0].padded_block % row[0].block == 0


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row[1])
def test_what_is_required_is_a_component(row: tuple[Format, str, int, int, int, int, int]) -> None:
    stored = row[0]
    for names in stored.required:
        assert names
        assert all(stored.component(name) for name in names)
    assert bool(stored.required) == (stored is not PLAIN)
    assert not any(stored.component(name) for name in stored.refused)


def test_names_of_components_are_unique() -> None:
    for stored, *_ in FORMATS:
        suffixes = [component.suffix for component in stored.components]
        assert len(suffixes) == len(set(suffixes))


def test_a_partly_filled_last_element_counts() -> None:
    assert Dim(-1, 128).stored(2880) == 23
    assert Dim(-1, 128).stored(2816) == 22
    assert Dim(-1).stored(7) == 7


def test_component_by_suffix() -> None:
    stored = nvfp4()
    scale = stored.component(".weight_scale")
    assert scale is not None and scale.cols == Dim(-1, 16)
    assert stored.component(".weight_scale_3") is None
    assert stored.component(".weight_scale_2").is_replicated  # type: ignore[union-attr]


def fill_of(stored: Format, suffix: str, dtype: str) -> bytes:
    component = stored.component(suffix)
    assert component is not None
    matrix = Matrix("routed", "down", "experts.0.down_proj", suffix, False)
    return TensorPlan(matrix, component, stored, Split(1, 1, 1), None).fill(dtype)


@pytest.mark.parametrize(
    ("stored", "suffix", "dtype", "expected"),
    [
        (PLAIN, ".weight", "BF16", "0000"),
        (PLAIN, ".weight", "F32", "00000000"),
        (fp8_block(), ".weight", "F8_E4M3", "00"),
        (fp8_block(), ".weight_scale_inv", "F32", "0000803f"),
        (fp8_block(), ".weight_scale", "BF16", "803f"),
        (fp8_block(), ".scale", "F8_E8M0", "7f"),
        (fp8_channel(), ".weight_scale", "F16", "003c"),
        (int_packed(4, 32), ".weight_packed", "I32", "88888888"),
        (int_packed(8, 32), ".weight_packed", "I32", "80808080"),
        (int_packed(4, 32), ".weight_scale", "BF16", "803f"),
        (nvfp4(), ".weight", "U8", "00"),
        (nvfp4(), ".weight_scale", "F8_E4M3", "38"),
        (mxfp4(), ".weight_packed", "U8", "00"),
        (mxfp4(), ".weight_scale", "U8", "7f"),
        (mxfp4(), "_scales", "F8_E8M0", "7f"),
        (mxfp8(), ".weight_scale", "U8", "7f"),
        (awq(4, 128), ".qweight", "I32", "00000000"),
        (awq(4, 128), ".qzeros", "I32", "00000000"),
        (gptq(4, 128), ".qweight", "I32", "88888888"),
        (gptq(4, 128), ".qzeros", "I32", "77777777"),
        (gptq(4, 128, version=2), ".qzeros", "I32", "88888888"),
        (gptq(8, 128), ".qweight", "I32", "80808080"),
        (gptq(8, 128), ".qzeros", "I32", "7f7f7f7f"),
        (gptq(8, 128, version=2), ".qzeros", "I32", "80808080"),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else str(value),
)
def test_padding_bytes(stored: Format, suffix: str, dtype: str, expected: str) -> None:
    assert fill_of(stored, suffix, dtype).hex() == expected


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row[1])
def test_every_padded_component_has_a_fill_for_each_of_its_dtypes(
    row: tuple[Format, str, int, int, int, int, int],
) -> None:
    sizes = {"F32": 4, "I32": 4, "I64": 8, "BF16": 2, "F16": 2}
    for component in row[0].components:
        if component.fill not in (Fill.SHAPE, Fill.GROUP_INDEX):
            for dtype in component.dtypes:
                assert len(fill_of(row[0], component.suffix, dtype)) == sizes.get(dtype, 1)


def test_weights_are_the_first_component() -> None:
    for stored, *_ in FORMATS:
        assert stored.components[0].suffix in WEIGHT_SUFFIXES
        assert not WEIGHT_SUFFIXES.intersection(name for names in stored.required for name in names)
        assert stored.components[0].rows and stored.components[0].cols
