"""Imports one engine and checks ep2tp's seams in it: ``python -m ep2tp.doctor.seam_check vllm``.

A process of its own: importing an engine takes seconds, may hang or crash, and maps libraries.
"""

from __future__ import annotations

import importlib
import json
import sys

from ep2tp.settings import Settings


def main() -> None:
    """Print ``{"version": ..., "problem": null or words}`` as the last line."""
    engine = importlib.import_module(sys.argv[1])
    launch = importlib.import_module(f"ep2tp.engines.{sys.argv[1]}.launch")
    print(json.dumps({"version": engine.__version__, "problem": launch.seam_problem(Settings())}))


if __name__ == "__main__":
    main()
