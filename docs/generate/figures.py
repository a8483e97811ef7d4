"""The figures: where slices cut blocks, and what each plan holds and moves. Sizes are computed by ``ep2tp.layout``."""

from __future__ import annotations

from docs.generate.svg import COLOURS, INK, LINE, MUTED, ON, PAPER, Drawing
from ep2tp.layout.split import Split, refine

BLOCK = 128
RED = "#c0392b"


def all_figures() -> dict[str, str]:
    """The figures by name."""
    return {"blocks": str(blocks()), "plans": str(plans())}


def blocks() -> Drawing:
    """1408 values in blocks of 128 over 2 ranks: cut, padded, refined."""
    size, ranks = 1408, 2
    split, fine = Split.of_blocks(size, BLOCK, ranks), refine(size, BLOCK, ranks)
    assert fine is not None
    picture = Drawing(
        720,
        372,
        f"{size} values in blocks of {BLOCK}, over {ranks} ranks",
        f"An even slice of {size // ranks} ends inside a block. Padding to {split.padded} gives each rank whole "
        f"blocks; refining repeats each scale on a grid of {fine}.",
    )
    left, scale = 20.0, 680 / split.padded
    _blocks_row(picture, 20, f"As stored: {size // BLOCK} blocks of {BLOCK}, one scale each", size, size, BLOCK, scale)
    cut = left + size / ranks * scale
    picture.line(cut, 44, cut, 92, RED, width=2.2)
    picture.text(
        cut,
        108,
        f"an even cut, at {size // ranks}, splits block {size // ranks // BLOCK}: its scale belongs to both ranks",
        13,
        RED,
        "middle",
    )
    whole = f"{split.per_rank // BLOCK} whole blocks a rank"
    title = f"Pad: zeros up to {split.padded}, scale 1; {whole}, +{split.overhead:.1%} memory, any kernel"
    _blocks_row(picture, 140, title, size, split.padded, BLOCK, scale, ranks)
    title = f"Refine: scales repeated on a grid of {fine}; even slices, no padding, for kernels that take it"
    _blocks_row(picture, 256, title, size, size, fine, scale, ranks)
    return picture


def _blocks_row(
    picture: Drawing, y: float, title: str, size: int, padded: int, block: int, scale: float, ranks: int = 1
) -> None:
    left, share = 20.0, padded / ranks
    picture.text(left, y + 14, title, 13, INK, bold=True)
    for start in range(0, padded, block):
        rank = int(start // share)
        is_padding = start >= size
        fill = PAPER if is_padding else "#dfe5ec" if ranks == 1 else COLOURS[rank]
        picture.box(
            left + start * scale,
            y + 30,
            block * scale,
            36,
            fill,
            INK if is_padding else PAPER,
            "3 3" if is_padding else "",
        )
        if is_padding:
            picture.text(left + (start + block / 2) * scale, y + 53, "zeros", 12, MUTED, "middle")
        elif block == BLOCK:
            is_cut = ranks == 1 and start < size / 2 < start + block
            middle = left + (start + block * (0.25 if is_cut else 0.5)) * scale
            picture.text(middle, y + 53, str(start // block), 12, INK if ranks == 1 else ON[rank], "middle")
    for rank in range(ranks if ranks > 1 else 0):
        middle = left + (rank + 0.5) * share * scale
        picture.text(middle, y + 86, f"rank {rank}: {padded // ranks} values", 12, MUTED, "middle")


def plans() -> Drawing:
    """What one MoE layer's ranks hold, and what they exchange, under TP, TEP and DEP; 4 experts, 4 ranks."""
    picture = Drawing(
        720,
        410,
        "What each rank holds under TP, TEP and DEP, and what is exchanged",
        "TP: every rank has a slice of every expert and of attention, one all_reduce. TEP: whole experts, every token "
        "on every rank, one all_reduce. DEP: whole experts and attention of a rank's own tokens, dispatch and combine.",
    )
    rows = (
        ("TP", "a slice of every expert; every token on every rank", "one all_reduce: partial sums", False, False),
        ("TEP", "whole experts; every token on every rank", "one all_reduce: the ranks' experts", True, False),
        (
            "DEP",
            "whole experts; each rank has tokens of its own",
            "dispatch to the experts' ranks, then combine",
            True,
            True,
        ),
    )
    for i, (name, holds, moves, whole, own) in enumerate(rows):
        _plan_row(picture, 14 + 132 * i, name, holds, moves, whole, own)
    return picture


def _plan_row(picture: Drawing, y: float, name: str, holds: str, moves: str, whole: bool, own: bool) -> None:
    picture.text(20, y + 16, name, 16, INK, bold=True)
    picture.text(64, y + 16, holds, 13, MUTED)
    for rank in range(4):
        x = 20 + 172 * rank
        picture.box(x, y + 26, 160, 54, PAPER, COLOURS[rank])
        picture.text(x + 8, y + 43, f"rank {rank}", 12, INK)
        picture.text(x + 152, y + 43, f"tokens {rank}" if own else "all tokens", 12, MUTED, "end")
        for expert in range(4):
            at, wide = x + 10 + 36 * expert, 32
            picture.box(at, y + 52, wide, 20, PAPER, LINE, "2 2" if whole and expert != rank else "")
            if not whole:
                picture.box(at + wide * expert_part(rank), y + 52, wide / 4, 20, COLOURS[rank], PAPER)
            elif expert == rank:
                picture.box(at, y + 52, wide, 20, COLOURS[rank], PAPER)
                picture.text(at + wide / 2, y + 66, f"E{expert}", 11, ON[rank], "middle")
    picture.line(92, y + 94, 624, y + 94, MUTED, width=2)
    for rank in range(4):
        x = 20 + 172 * rank + 80
        if own:
            picture.line(x - 6, y + 80, x - 6, y + 93, MUTED, arrow=True)
            picture.line(x + 6, y + 93, x + 6, y + 81, MUTED, arrow=True)
        else:
            picture.line(x, y + 81, x, y + 93, MUTED)
    picture.text(360, y + 112, moves, 13, INK, "middle")


def expert_part(rank: int) -> float:
    """Where a rank's slice of an expert begins, as a share of it."""
    return rank / 4
