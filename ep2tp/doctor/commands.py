"""``ep2tp doctor``.

Exit codes: 0 ready, 1 degraded (works, but slower or with less than this machine has), 2 blocked (a launch fails, hangs
or computes garbage until it is mended), as for wrong usage. What could not be checked changes nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click


@click.command("doctor", short_help="Check this machine: GPUs, links, proven P2P, engines, disk.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A model's folder: measure its disk.",
)
@click.option("--fresh", "is_fresh", is_flag=True, help="Probe P2P again instead of using what an earlier run proved.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as one JSON object.")
def doctor_command(folder: Path | None, is_fresh: bool, as_json: bool) -> None:
    """Check this machine for a tensor-parallel launch: GPUs, links, P2P, chipset, engines, disk.

    Each finding says what it is, why it matters and what to do. P2P is not believed but proven: bytes are moved between
    every pair of GPUs and checked, in processes of their own with a time limit.

    Exit code: 0 ready, 1 degraded, 2 blocked.
    """
    from dataclasses import asdict

    from rich.console import Console

    from ep2tp.doctor.examine import examine
    from ep2tp.doctor.finding import exit_code, verdict
    from ep2tp.doctor.machine import read_machine
    from ep2tp.doctor.report import print_report

    machine = read_machine()
    with Console(stderr=True).status("Checking; P2P takes a few seconds for each pair of GPUs"):
        findings = list(examine(machine, folder, is_fresh))
    if as_json:
        value = {"verdict": verdict(findings), "findings": [asdict(f) for f in findings], "machine": machine.as_json()}
        click.echo(json.dumps(value))
    else:
        print_report(findings, Console(highlight=False))
    sys.exit(exit_code(findings))
