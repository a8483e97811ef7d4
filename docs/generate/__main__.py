"""``python -m docs.generate`` writes the generated pages; ``--check`` names those that are stale and exits with 1."""

from __future__ import annotations

import sys
from pathlib import Path

from docs.generate.pages import all_pages

ROOT = Path(__file__).parents[2]


def stale() -> list[str]:
    """Generated files that differ from what the code says now."""
    pages = all_pages(ROOT)
    return [path for path, text in pages.items() if not (ROOT / path).is_file() or (ROOT / path).read_text() != text]


def write() -> None:
    """Write every generated file that is missing or stale."""
    pages = all_pages(ROOT)
    for path in stale():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(pages[path], encoding="utf-8")
        print(path)


if __name__ == "__main__":
    if "--check" not in sys.argv:
        write()
    elif found := stale():
        sys.exit("stale, run python -m docs.generate: " + ", ".join(found))
