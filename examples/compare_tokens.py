"""Compare the greedy tokens of two launches of a model: do they part, and was it a near-tie or a fault?

    python examples/compare_tokens.py stock.jsonl rewritten.jsonl [--tie 0.1]

The files are what offline_generation.py writes. Another plan adds up partial sums in another order, so BF16 tokens
part sooner or later, where two are almost equally likely; after that the texts have nothing in common. Tokens that part
where one was clearly likelier point to wrong weights. Exit status: 0 where all are equal or part at near-ties, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Print a line for each prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--tie", type=float, default=0.1, help="log-probability below which two tokens are near a tie")
    given = parser.parse_args()

    pairs = list(zip(records(given.first), records(given.second), strict=True))
    faults = 0
    for i, (first, second) in enumerate(pairs):
        if first["prompt"] != second["prompt"]:
            sys.exit(f"prompt {i}: the files are of different prompts")
        parted = parting(first, second)
        if parted is None:
            print(f"prompt {i}: {len(first['tokens'])} tokens equal")
            continue
        position, margin = parted
        is_tie = margin < given.tie
        faults += not is_tie
        print(f"prompt {i}: part at token {position}, margin {margin:.3f}: {'near-tie' if is_tie else 'NOT A TIE'}")
    return 1 if faults else 0


def records(path: Path) -> list[dict[str, Any]]:
    """One record a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def parting(first: dict[str, Any], second: dict[str, Any]) -> tuple[int, float] | None:
    """Where the tokens part, and by how much the first launch preferred its own; None where they do not."""
    for position, (a, b) in enumerate(zip(first["tokens"], second["tokens"], strict=True)):
        if a != b:
            best, next_best = sorted(first["likeliest"][position].values(), reverse=True)[:2]
            return position, best - next_best
    return None


if __name__ == "__main__":
    sys.exit(main())
