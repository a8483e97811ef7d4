"""Moves the bytes of one job: reads each tensor once, and appends to each output file what it needs of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ep2tp.checkpoint.conversion import Job
from ep2tp.checkpoint.origin import InputFile, Origin, open_inputs, read, step_of
from ep2tp.checkpoint.runs import Target
from ep2tp.checkpoint.writer import ShardWriter
from ep2tp.errors import CheckpointError

Progress = Callable[[int], None]
"""Called with the bytes read since the last call; may raise to stop the work."""


def run_job(
    job: Job, inputs: Mapping[str, Path], outputs: Collection[str], temporary: Path, folder: Path, progress: Progress
) -> tuple[dict[str, str], dict[str, tuple[int, str]]]:
    """Write some of a job's output files. Memory: one window, one block of rows, and 1 MiB for each output.

    Args:
        inputs: where the source's files are.
        outputs: which output files to write.
        temporary: where files lie while they are written.
        folder: the new checkpoint.

    Returns:
        SHA-256 of the input (none where there are several), and (bytes, SHA-256) of each output.

    Raises:
        CheckpointError: the source holds what the plan does not expect.
        OSError: the disk is full or fails.
    """
    with ExitStack() as stack:
        files = open_inputs(stack, inputs)
        writers = {name: ShardWriter(temporary / name.replace("/", "__")) for name in outputs}
        headers = job.headers
        for name, writer in writers.items():
            stack.callback(writer.close)
            writer.write(headers[name])
        for origin, recipe in job.items:
            wanted = [(writers[name], target) for name, target in job.targets(recipe) if name in writers]
            _transfer(origin, files, wanted, progress)
        digests = {name: file.digest() for name, file in files.items() if file.hashes}
        for file in files.values():
            file.check_unchanged()
        return digests, {name: writer.commit(folder / name) for name, writer in writers.items()}


def _transfer(
    origin: Origin, files: Mapping[str, InputFile], wanted: list[tuple[ShardWriter, Target]], progress: Progress
) -> None:
    row = max((target.source_row for _, target in wanted if target.rows > 1), default=0)
    step, size = step_of(origin, row), origin.tensor.size
    starts = [writer.position for writer, _ in wanted]
    for at in range(0, size, step):
        count = min(step, size - at)
        data = read(origin, files, at, count) if wanted else memoryview(b"")
        for (writer, target), start in zip(wanted, starts, strict=True):
            if target.check is not None:
                _check(origin.tensor.name, target.check, data, at)
            _append(writer, target, data, at, start)
        progress(count)
    for (writer, target), start in zip(wanted, starts, strict=True):
        assert writer.position == start + target.size, origin.tensor.name


def _append(writer: ShardWriter, target: Target, data: memoryview, at: int, start: int) -> None:
    """Append what ``target`` needs of the source's bytes ``at`` and following; the tensor began at ``start``."""
    if target.literal is not None:
        if at == 0:
            writer.write(target.literal)
    elif target.is_copy:
        writer.write(data)
    elif target.rows > 1 and len(data) % target.source_row == 0:
        _append_rows(writer, target, data)
    else:
        _append_runs(writer, target, data, at, start)


def _append_rows(writer: ShardWriter, target: Target, data: memoryview) -> None:
    source = np.frombuffer(data, np.uint8).reshape(-1, target.source_row)
    rows: np.ndarray[Any, Any] = np.empty((len(source), target.target_row), np.uint8)
    if sum(run.count for run in target.runs) < target.target_row:
        rows.view(f"u{len(target.fill)}")[:] = np.frombuffer(target.fill, f"u{len(target.fill)}")[0]
    for run in target.runs:
        rows[:, run.target : run.target + run.count] = source[:, run.source : run.source + run.count]
    writer.write(rows)


def _append_runs(writer: ShardWriter, target: Target, data: memoryview, at: int, start: int) -> None:
    """Like :func:`_append_rows`, for rows that are larger than the memory to hold them."""
    done = 0
    while done < len(data):
        index, column = divmod(at + done, target.source_row)
        count = min(len(data) - done, target.source_row - column)
        row = start + index * target.target_row
        for run in target.runs:
            first, last = max(run.source, column), min(run.source + run.count, column + count)
            if first < last:
                writer.fill(target.fill, row + run.target + first - run.source - writer.position)
                writer.write(data[done + first - column : done + last - column])
        done += count
        if column + count == target.source_row:
            writer.fill(target.fill, row + target.target_row - writer.position)


def _check(name: str, check: tuple[int, bytes], data: memoryview, at: int) -> None:
    position, expected = check
    first, last = max(position, at), min(position + len(expected), at + len(data))
    if first < last and data[first - at : last - at] != expected[first - position : last - position]:
        raise CheckpointError(
            f"{name}: holds {data[first - at : last - at][:16].hex()}..., which the config does not lead to "
            f"({expected[first - position :][:16].hex()}... expected); its groups or its shape are not as "
            "quantization_config says, so it cannot be padded"
        )
