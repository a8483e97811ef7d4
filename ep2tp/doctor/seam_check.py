"""Imports one engine and checks ep2tp's seams in it: ``python -m ep2tp.doctor.seam_check vllm``.

A process of its own: importing an engine takes seconds, may hang or crash, and maps libraries.
"""

from __future__ import annotations

import importlib
import json
import sys


def main() -> None:
    """Print ``{"version": ..., "problem": null or words, "seams": count}`` as the last line."""
    name = sys.argv[1]
    engine = importlib.import_module(name)
    seams = importlib.import_module(f"ep2tp.engines.{name}.seams")
    from ep2tp.engines.seams import problem

    found = problem(name, engine.__version__, seams.VERSIONS, seams.ALL, strict=False, insists=False)
    print(json.dumps({"version": engine.__version__, "problem": found, "seams": len(seams.ALL)}))


if __name__ == "__main__":
    main()
