"""The same inputs to every decoder of untrusted bytes each time; `make fuzz` tries others, and longer."""

from __future__ import annotations

import pytest

from tests.fuzz import Worst, attempt, fuzz
from tests.fuzz_covered import COVERED, decoders
from tests.fuzz_entries import ENTRIES, Entry

EXAMPLES = 15


@pytest.mark.parametrize("name", ENTRIES)
def test_only_refusals_come_out_within_bounds(name: str) -> None:
    assert fuzz(name, EXAMPLES).inputs >= EXAMPLES / 2


def test_each_decoder_of_untrusted_bytes_has_an_entry() -> None:
    assert set(decoders()) == set(COVERED)
    assert set(COVERED.values()) <= set(ENTRIES)


def test_what_takes_too_much_memory_or_breaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for run, what in ((lambda data: bytes(1 << 23), AssertionError), (lambda data: data[5], IndexError)):
        monkeypatch.setitem(ENTRIES, "bad", Entry(run))
        with pytest.raises(what):
            fuzz("bad", 20)
    monkeypatch.setattr("tests.fuzz.CPU_LIMIT", -1.0)
    with pytest.raises(AssertionError, match="processor time"):
        attempt(Entry(len), b"", Worst())
