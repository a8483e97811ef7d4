"""What is read from Nsight Compute's pages."""

from __future__ import annotations

import kernel_profile
import pytest

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NAMES = ["ID", "Kernel Name", "Grid Size", "gpu__time_duration.sum", "launch__registers_per_thread"]
NAMES += [STALLED.format(cause) for cause in ("barrier", "long_scoreboard")]


def page(unit: str) -> str:
    """A launch as ``ncu --csv --page raw`` prints it, with a unit of time."""
    rows = (NAMES, ["", "", "", unit, "register/thread", "inst", ""])
    rows += (["0", "down_by_token", "(64, 448, 1)", "183,232.0", "96", "0.25", "2.43"],)
    return (
        "\n".join(["==PROF== Connected to process 7", *(",".join(f'"{cell}"' for cell in row) for row in rows)]) + "\n"
    )


def test_a_launch_is_read_in_microseconds_with_its_waits_longest_first() -> None:
    [found] = kernel_profile.launches(page("ns"))
    assert (found["kernel"], found["grid"], found["registers"]) == ("down_by_token", "(64, 448, 1)", 96)
    assert found["microseconds"] == pytest.approx(183.232)
    assert list(found["waits"].items()) == [("long_scoreboard", 2.43), ("barrier", 0.25)]


def test_an_unknown_unit_is_an_error() -> None:
    with pytest.raises(SystemExit, match="'fortnight'"):
        list(kernel_profile.launches(page("fortnight")))
