"""A few shapes as SVG, readable on light and dark pages: the figure brings its own background."""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

INK, MUTED, PAPER, LINE = "#1f2933", "#5f6c7b", "#ffffff", "#9aa5b1"
COLOURS = ("#4c78a8", "#f2a154", "#5aa469", "#b784ad")
"""One for each rank, told apart with red-green blindness, too; every rank is also labelled."""
ON = (PAPER, INK, INK, INK)
"""Text on each of them: a contrast of 4.5 and more."""


@dataclass
class Drawing:
    """An SVG image of ``width`` x ``height`` units, with a title and a description for screen readers."""

    width: int
    height: int
    title: str
    description: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, fill: str = "none", line: str = LINE, dash: str = "") -> None:
        """A rectangle."""
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2" fill="{fill}" stroke="{line}"{dashed}/>'
        )

    def text(
        self, x: float, y: float, words: str, size: int = 13, fill: str = INK, at: str = "start", bold: bool = False
    ) -> None:
        """A line of text; ``at`` is start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{at}"{weight}>'
            f"{escape(words)}</text>"
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = LINE, arrow: bool = False, width: float = 1.2
    ) -> None:
        """A line, with an arrow head at its end where asked for."""
        head = ' marker-end="url(#head)"' if arrow else ""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"{head}/>'
        )

    def __str__(self) -> str:
        """The file."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
                f'width="{self.width}" height="{self.height}" font-family="system-ui, -apple-system, Segoe UI, Roboto, '
                'Helvetica, Arial, sans-serif">',
                f"<title>{escape(self.title)}</title>",
                f"<desc>{escape(self.description)}</desc>",
                '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
                f'orient="auto-start-reverse"><path d="M0,0 L8,4 L0,8 z" fill="{MUTED}"/></marker></defs>',
                f'<rect width="{self.width}" height="{self.height}" rx="6" fill="{PAPER}"/>',
                *self.parts,
                "</svg>\n",
            ]
        )
