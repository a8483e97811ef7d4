"""The order of the GPU tests' cases; needs no GPU."""

from __future__ import annotations

import pytest
from case_queue import CaseQueue


def test_a_case_that_is_asked_for_goes_first() -> None:
    order: list[str] = []

    def run(case: str) -> str:
        order.append(case)
        return case.upper()

    queue = CaseQueue({case: case for case in "abcd"}, run, 1)
    assert queue["c"] == "C"
    assert [queue[case] for case in "dba"] == ["D", "B", "A"]
    assert order[0] == "c"
    assert sorted(order) == list("abcd")
    queue.close()


def test_an_error_is_that_of_its_case_alone() -> None:
    def run(case: int) -> int:
        return 6 // case

    queue = CaseQueue({"bad": 0, "good": 2}, run, 1)
    with pytest.raises(ZeroDivisionError):
        queue["bad"]
    assert queue["good"] == 3
    queue.close()
