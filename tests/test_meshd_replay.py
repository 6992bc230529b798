"""The replay window: every counter is accepted once, and only within the window."""

from __future__ import annotations

import random

import pytest

from crossedge.meshd.constants import REJECT_AFTER_MESSAGES, REPLAY_WINDOW
from crossedge.meshd.replay import ReplayWindow


class Model:
    """A window as one would write it without care for speed."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.newest = 0

    def check(self, counter: int) -> bool:
        return (
            counter < REJECT_AFTER_MESSAGES
            and counter not in self.seen
            and self.newest - counter <= REPLAY_WINDOW
        )

    def commit(self, counter: int) -> bool:
        if not self.check(counter):
            return False
        self.seen.add(counter)
        self.newest = max(self.newest, counter)
        return True


def test_window_is_as_large_as_stock_wireguards() -> None:
    assert REPLAY_WINDOW == 8128


def test_first_counter_is_zero_and_is_accepted_once() -> None:
    window = ReplayWindow()
    assert window.check(0)
    assert window.commit(0)
    assert not window.check(0)
    assert not window.commit(0)


def test_check_alone_consumes_nothing() -> None:
    window = ReplayWindow()
    assert window.check(7)
    assert window.check_range(0, 64) == (1 << 64) - 1
    assert window.commit(7)
    assert window.newest == 7


# The cases of RFC 6479 implementations: (counter, accepted), one after the other in a fresh window.
W = REPLAY_WINDOW
SEQUENCES = {
    "in order": [(0, True), (1, True), (1, False), (9, True), (8, True), (7, True), (7, False)],
    "edge of the window": [(W, True), (0, True), (0, False), (W + 1, True), (0, False), (1, True)],
    "figures of the Linux kernel's self-test": [
        *((n, True) for n in (0, 1)),
        (1, False),
        *((n, True) for n in (9, 8, 7)),
        (7, False),
        *((n, True) for n in (W + 1, W)),
        (W, False),
        *((n, True) for n in (W - 1, 2)),
        (2, False),
        (W + 17, True),
        *((n, False) for n in (3, W + 17)),
        *((n, True) for n in (4 * W + 4, 3 * W + 4)),
        *((n, False) for n in (10, 3 * W + 3, 3 * W + 2)),
        (3 * W + 5, True),
        *((n, False) for n in (3 * W + 4, 0, REJECT_AFTER_MESSAGES)),
        (REJECT_AFTER_MESSAGES - 1, True),
        *((n, False) for n in (REJECT_AFTER_MESSAGES, REJECT_AFTER_MESSAGES - 1)),
        (REJECT_AFTER_MESSAGES - 2, True),
        *((REJECT_AFTER_MESSAGES + n, False) for n in (1, 2, -2)),
        (REJECT_AFTER_MESSAGES - 3, True),
        (0, False),
    ],
    "one too old": [(W + 1, True), (0, False)],
    "jump over the whole ring": [(3, True), (100 * W, True), (3, False), (100 * W - W, True)],
    "last counters": [(REJECT_AFTER_MESSAGES - 1, True), (REJECT_AFTER_MESSAGES, False), (2**64 - 1, False)],
    "ring wraps onto old bits": [(5, True), (5 + 8192, True), (6 + 8192, True), (5 + 8192, False)],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequence(name: str) -> None:
    window = ReplayWindow()
    for counter, accepted in SEQUENCES[name]:
        assert window.check(counter) is accepted, counter
        assert window.commit(counter) is accepted, counter


@pytest.mark.parametrize("seed", range(6))
def test_single_counters_agree_with_the_model(seed: int) -> None:
    rng = random.Random(seed)
    window, model = ReplayWindow(), Model()
    for _ in range(4000):
        spread = rng.choice([3, 70, 200, 9000, 30000])
        counter = max(0, model.newest + rng.randint(-spread, spread // 2))
        assert window.check(counter) == model.check(counter)
        if rng.random() < 0.8:
            assert window.commit(counter) == model.commit(counter)


@pytest.mark.parametrize("seed", range(6))
def test_runs_agree_with_the_model(seed: int) -> None:
    rng = random.Random(100 + seed)
    window, model = ReplayWindow(), Model()
    for _ in range(1500):
        count = rng.choice([1, 2, 63, 64, 65, 200])
        first = max(0, model.newest + rng.randint(-rng.choice([10, 300, 8300]), 200))
        expected = sum(model.check(first + i) << i for i in range(count))
        assert window.check_range(first, count) == expected
        opened = rng.getrandbits(count) if rng.random() < 0.5 else (1 << count) - 1
        assert window.commit_range(first, count, opened) == expected & opened
        for i in range(count):
            if opened >> i & 1:
                model.commit(first + i)
        assert window.newest == model.newest


def test_run_at_the_last_counters_is_cut() -> None:
    window = ReplayWindow()
    first = REJECT_AFTER_MESSAGES - 3
    assert window.check_range(first, 10) == 0b111
    assert window.commit_range(first, 10) == 0b111
    assert window.check_range(first, 10) == 0
    assert window.check_range(REJECT_AFTER_MESSAGES + 5, 10) == 0


def test_run_of_which_nothing_opened_changes_nothing() -> None:
    window = ReplayWindow()
    assert window.commit_range(5000, 64, 0) == 0
    assert window.newest == 0
    assert window.check_range(5000, 64) == (1 << 64) - 1


def test_forged_far_counter_does_not_move_the_window_until_committed() -> None:
    window = ReplayWindow()
    window.commit_range(0, 64)
    assert window.check(2**40)
    assert window.check(64)
    assert window.commit(64)


def test_closed_window_refuses_everything() -> None:
    window = ReplayWindow()
    window.close()
    for counter in (0, 1, 2**32, REJECT_AFTER_MESSAGES - 1):
        assert not window.check(counter)
        assert not window.commit(counter)
        assert window.check_range(counter, 64) == 0
        assert window.commit_range(counter, 64) == 0
