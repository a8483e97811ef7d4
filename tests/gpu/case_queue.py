"""Runs cases some at a time, in order, except that a case that a test asks for goes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

Case = TypeVar("Case")
Run = TypeVar("Run")


class CaseQueue(Generic[Case, Run]):
    """Nothing starts before the first case is asked for, so that a selection of the tests gets its own cases first.

    Args:
        cases: by name, in the order in which they run where none is asked for.
        run: runs one.
        jobs: how many at a time.
    """

    def __init__(self, cases: Mapping[str, Case], run: Callable[[Case], Run], jobs: int) -> None:
        self._waiting, self._run, self._guard = dict(cases), run, Lock()
        self._runs: dict[str, Future[Run]] = {name: Future() for name in cases}
        self._pool, self._is_started = ThreadPoolExecutor(jobs), False

    def __contains__(self, name: str) -> bool:
        """Whether there is such a case."""
        return name in self._runs

    def __getitem__(self, name: str) -> Run:
        """The finished run of a case."""
        with self._guard:
            if name in self._waiting:
                self._waiting = {name: self._waiting.pop(name), **self._waiting}
            if not self._is_started:
                self._is_started = True
                for _ in self._runs:
                    self._pool.submit(self._next)
        return self._runs[name].result()

    def close(self) -> None:
        """Start no further case; those that run come to their end."""
        self._pool.shutdown(cancel_futures=True)

    def _next(self) -> None:
        with self._guard:
            name = next(iter(self._waiting))
            case = self._waiting.pop(name)
        try:
            self._runs[name].set_result(self._run(case))
        except BaseException as error:
            self._runs[name].set_exception(error)
