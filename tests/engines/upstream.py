"""Do ep2tp's seams hold in a release of an engine? Read out of its wheel, without installing it.

    python -m tests.engines.upstream "vllm 0.33.0" "sglang newest"
    python -m tests.engines.upstream --list        # as JSON: all that there is to check, for a nightly matrix

Exit status: 0 where every seam holds, else 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from ep2tp.engines.seams import Seam
from ep2tp.engines.sglang import seams as sglang
from ep2tp.engines.vllm import seams as vllm
from tests.engines import wheel_sources

ENGINES = {"vllm": vllm, "sglang": sglang}


def releases() -> list[str]:
    """The versions that the seam tables name, and the newest of each engine."""
    return [f"{package} {version}" for package, table in ENGINES.items() for version in (*table.VERSIONS, "newest")]


def is_expected(package: str, version: str, seam: Seam) -> bool:
    """Whether a seam is to hold: in the versions that it names; in others, if in the last one that was checked."""
    known = ENGINES[package].VERSIONS
    return version in seam.checked or (version not in known and known[-1] in seam.checked)


def problem(package: str, version: str, seam: Seam) -> str | None:
    """What of a seam does not hold in the source of a version, or None.

    Raises:
        NoIndexError: the wheel cannot be read.
    """
    tree = wheel_sources.module(package, version, seam.module)
    if tree is None:
        return "no such module"
    found = wheel_sources.parameters(tree, seam.attribute)
    if found is None and (origin := wheel_sources.imported_from(tree, seam.attribute)):
        tree = wheel_sources.module(package, version, origin)
        found = wheel_sources.parameters(tree, seam.attribute) if tree else None
    if found is None:
        return f"no {seam.attribute}"
    return None if found[: len(seam.parameters)] == seam.parameters else f"parameters {found}"


def check(release: str) -> bool:
    """Print a line for each seam of a release; whether all hold."""
    package, version = release.split()
    is_newest, version = version == "newest", wheel_sources.newest(package) if version == "newest" else version
    last = ENGINES[package].VERSIONS[-1]
    print(f"{package} {version}" + (f" is the newest release; {last} the last one checked" if is_newest else ""))
    expected = [seam for seam in ENGINES[package].ALL if is_expected(package, version, seam)]
    problems = {seam: problem(package, version, seam) for seam in expected}
    for seam, found in problems.items():
        print(
            f"  {'CHANGED' if found else 'holds  '}  {seam.module}.{seam.attribute}" + (f": {found}" if found else "")
        )
    return not any(problems.values())


def main(arguments: Sequence[str]) -> int:
    """Check each release that is named."""
    if arguments == ["--list"]:
        print(json.dumps(releases()))
        return 0
    held = [check(release) for release in arguments]
    return 0 if held and all(held) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
