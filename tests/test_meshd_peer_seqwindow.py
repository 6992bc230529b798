"""Replay protection of control messages between nodes."""

from __future__ import annotations

import random

from crossedge.meshd.seqwindow import OLDEST, REMEMBERED, SequenceWindow

START = 1_800_000_000_000_000


def test_number_is_accepted_once() -> None:
    window = SequenceWindow()
    assert window.accept(START)
    assert not window.accept(START)


def test_numbers_may_overtake_each_other() -> None:
    window = SequenceWindow()
    assert all(window.accept(START + offset) for offset in (50, 10, 40, 20, 30))
    assert not any(window.accept(START + offset) for offset in (10, 20, 30, 40, 50))


def test_old_number_is_refused_even_if_it_was_never_seen() -> None:
    window = SequenceWindow()
    assert window.accept(START)
    assert not window.accept(START - OLDEST - 1)


def test_no_number_is_ever_accepted_twice_and_memory_is_bounded() -> None:
    chance = random.Random(7)
    window = SequenceWindow()
    accepted: set[int] = set()
    for step in range(5000):
        seq = START + step * 100 + chance.randrange(-30_000, 30_000)
        if window.accept(seq):
            assert seq not in accepted
            accepted.add(seq)
    assert len(accepted) > 500
    assert not any(window.accept(seq) for seq in accepted)
    assert len(window._seen) <= REMEMBERED  # white box: the bound itself
