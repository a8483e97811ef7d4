"""Every generated file, by its path in the repository."""

from __future__ import annotations

from pathlib import Path

from docs.generate import figures, serving, support, symptoms

BEGIN, END = "<!-- begin {name}: python -m docs.generate -->", "<!-- end {name} -->"


def all_pages(root: Path) -> dict[str, str]:
    """The text that each generated file should have."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    return {
        "README.md": between(readme, "support", support.short_table()),
        "docs/reference/support.md": support.page(),
        "docs/guides/troubleshooting.md": symptoms.page(),
        **{f"docs/guides/serving/{name}.md": text for name, text in serving.pages().items()},
        **{f"docs/figures/{name}.svg": text for name, text in figures.all_figures().items()},
    }


def between(text: str, name: str, inside: str) -> str:
    """``text`` with what stands between the markers of ``name`` replaced.

    Raises:
        ValueError: a marker is missing.
    """
    begin, end = BEGIN.format(name=name), END.format(name=name)
    head, _, rest = text.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"the markers {begin!r} and {end!r} are not both there")
    return f"{head}{begin}\n{inside}\n{end}{tail}"
