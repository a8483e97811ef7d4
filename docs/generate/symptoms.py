"""The troubleshooting guide, from ``symptoms.toml``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docs.generate.markdown import listed
from docs.generate.quotes import groups

NAMES = {"vllm": "vLLM", "sglang": "SGLang", "ep2tp": "ep2tp"}
INTRO = """
Search this page for the words of your log; … stands for what a message fills in. Every quoted line was looked up in the
source of the versions that are named with it (`tests/docs/test_quotes.py`). Links go to reports by users.

Three commands tell more than a log does:

    ep2tp doctor                      # is the machine sound: links, P2P that is proven, engines
    ep2tp detect boot.log             # which plan runs, and which lines show it
    ep2tp patches --model MODEL --tp 4   # which sizes divide, and what is padded"""


def page() -> str:
    """The page."""
    parts = [
        "# Troubleshooting by symptom",
        "<!-- written by python -m docs.generate; edit docs/generate/symptoms.toml -->\n" + INTRO,
    ]
    for group in groups():
        parts.append(f"## {group['title']}")
        for symptom in group["symptom"]:
            parts += list(_symptom(symptom))
    return "\n\n".join(parts) + "\n"


def _symptom(symptom: dict[str, Any]) -> Iterator[str]:
    quotes = [quote.replace("{}", "…") for quote in symptom.get("quotes", ())]
    yield f"### {symptom.get('title') or _heading(quotes[0])}"
    if quotes:
        yield "```{ .text .wrap }\n" + "\n".join(quotes) + "\n```"
    if where := _where(symptom.get("found", ())):
        yield f"*{where}*"
    yield f"**What it means.** {symptom['means'].strip()}"
    reports = ", ".join(f"[{_report(link)}]({link})" for link in symptom.get("reports", ()))
    yield f"**What to do.** {symptom['do'].strip()}" + (f"\n\n**Reported in** {reports}." if reports else "")


def _heading(quote: str) -> str:
    text = re.split(r"(?<=[a-z])[.;:] |; ", quote)[0].strip(" .")
    return text if len(text) <= 76 else text[:75].rsplit(" ", 1)[0] + " …"


def _where(found: list[dict[str, Any]]) -> str:
    by_engine: dict[str, set[str]] = {}
    for place in found:
        by_engine.setdefault(place["engine"], set()).update(place.get("versions", ()))
    parts = [
        f"{NAMES[engine]} {listed(sorted(versions, key=_number))}" if versions else NAMES[engine]
        for engine, versions in by_engine.items()
    ]
    return "; ".join(parts)


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _report(link: str) -> str:
    _, repository, _, number = link.removeprefix("https://github.com/").split("/")
    return f"{repository}#{number}"
