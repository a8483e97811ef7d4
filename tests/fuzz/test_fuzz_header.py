"""What the fuzzer runs holds for its seeds and for their cut and changed forms, so that it cannot rot."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import fuzz_header
from tests.fuzz.fuzz_header import HEADER, SEEDS, check


@pytest.mark.parametrize("seed", SEEDS, ids=range(len(SEEDS)))
def test_seeds(seed: bytes) -> None:
    check(seed)


def test_changed_seeds() -> None:
    chance = random.Random(0)
    for _ in range(2000):
        data = bytearray(chance.choice(SEEDS))
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(len(data))] = chance.choice(b'{}[]",:0189-\\\xff')
        check(bytes(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.2 else data))


def test_seeds_reach_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that refuses everything would pass: some seeds are headers and indexes that are accepted."""
    accepted = []
    for name in ("parse_header", "read_weight_map"):
        real = getattr(fuzz_header, name)
        monkeypatch.setattr(fuzz_header, name, lambda *a, real=real, name=name: (real(*a), accepted.append(name))[0])
    for seed in SEEDS:
        check(seed)
    assert accepted.count("parse_header") == 2 * 2 and accepted.count("read_weight_map") == 1


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_header, "read_weight_map", lambda file, text: {"a": "../x.safetensors"})
    with pytest.raises(AssertionError):
        check(b"\x00" + HEADER)
