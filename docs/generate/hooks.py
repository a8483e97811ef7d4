"""MkDocs hook: docstrings name Python objects in Sphinx's way (``:class:`Split```); the site shows the name alone."""

from __future__ import annotations

import re
from typing import Any


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles in front of inline code."""
    return re.sub(r":(class|meth|func|data|attr):(?=<code>)", "", html)
