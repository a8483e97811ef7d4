"""Gzip as far as it goes, and a log that is cut off."""

from __future__ import annotations

import gzip
import io
import json
import random
import zlib
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ep2tp.cli import main
from ep2tp.observe.gunzip import Gunzip
from tests.observe.recordings import LOGS

LOG = (LOGS / "vllm-0.32.0-tep2-rewritten.log").read_bytes()
NOTE = "the compressed file is cut off"


def unpack(packed: bytes, buffer: int = 1 << 16) -> tuple[bytes, bool]:
    stream = Gunzip(io.BytesIO(packed))
    return io.BufferedReader(stream, buffer).read(), stream.is_cut


@given(parts=st.lists(st.binary(max_size=300), min_size=1, max_size=4), padding=st.integers(0, 9))
def test_whole_files_are_what_gzip_reads(parts: list[bytes], padding: int) -> None:
    packed = b"".join(map(gzip.compress, parts)) + bytes(padding)
    assert unpack(packed) == (gzip.decompress(packed), False)


@pytest.mark.parametrize("buffer", [1, 7, 1 << 16])
def test_much_that_packs_well(buffer: int) -> None:
    text = b"a" * 300_000 + random.Random(0).randbytes(3000)
    assert unpack(gzip.compress(text), buffer) == (text, False)


@pytest.mark.parametrize("end", [2, 12, 100, 1000, -9, -8, -1])
def test_a_file_that_is_cut_gives_a_beginning(end: int) -> None:
    found, is_cut = unpack(gzip.compress(LOG)[:end])
    assert is_cut and LOG.startswith(found)
    assert found == LOG or end != -8  # the last 8 bytes are the checksum and the size


def test_a_second_member_that_is_cut() -> None:
    first = gzip.compress(b"first\n")
    assert unpack(first + gzip.compress(LOG)[:5]) == (b"first\n", True)


def test_damaged_data_and_what_is_no_gzip() -> None:
    packed = bytearray(gzip.compress(LOG))
    packed[-6] ^= 1
    for damaged in (bytes(packed), gzip.compress(LOG) + b"something else"):
        with pytest.raises(zlib.error):
            unpack(damaged)


def detect(path: Path) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["detect", "--json", str(path)])
    return result.exit_code, result.stdout


def test_a_log_that_is_cut_off_is_read_up_to_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "boot.log.gz"
    packed = gzip.compress(LOG)
    path.write_bytes(packed)
    status, whole = detect(path)
    assert status == 0 and NOTE not in whole
    for end in (len(packed) - 20, 5):
        path.write_bytes(packed[:end])
        status, out = detect(path)
        assert status == 0 and NOTE in json.loads(out)["evidence"][-1]["says"]
        assert json.loads(out)["plan"] == ("TP" if end > 5 else "unknown")


def test_a_trace_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(b'{"schemaVersion": 1, "traceEvents": [' + b'{"ph": "X"},' * 9000)[:-12])
    assert detect(path)[0] == 1
