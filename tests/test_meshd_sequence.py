"""Sequence numbers and the time, under clocks that lie."""

from __future__ import annotations

import pytest

from crossedge.meshd.sequence import RESERVE_AHEAD, SEQUENCE_MAX, Sequence, tai64n
from crossedge.meshd.wallclock import MAX_HINTS, Wallclock

YEAR = 365 * 86_400.0
TODAY = 1_760_000_000.0


class Disk:
    """Remembers the bounds that were made durable."""

    def __init__(self) -> None:
        self.bounds: list[int] = []

    def reserve(self, bound: int) -> None:
        self.bounds.append(bound)


def test_numbers_are_microseconds_of_unix_time() -> None:
    sequence = Sequence(0, lambda now: TODAY + now, Disk().reserve)
    assert sequence.next(1.5) == int((TODAY + 1.5) * 1e6)


def test_numbers_grow_while_the_clock_stands_still_or_goes_back() -> None:
    times = iter([TODAY, TODAY, TODAY - YEAR, 0.0, TODAY + 1])
    sequence = Sequence(0, lambda now: next(times), Disk().reserve)
    numbers = [sequence.next(0.0) for _ in range(5)]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == int((TODAY + 1) * 1e6)


def test_no_number_is_above_what_was_made_durable_before() -> None:
    disk = Disk()
    sequence = Sequence(0, lambda now: TODAY + now, disk.reserve)
    for hour in range(50):
        number = sequence.next(hour * 360.0)
        assert number <= disk.bounds[-1]
    assert len(disk.bounds) <= 50 * 360e6 / RESERVE_AHEAD + 2


def test_the_bound_can_be_raised_in_the_background() -> None:
    disk = Disk()
    sequence = Sequence(0, lambda now: TODAY + now, disk.reserve)
    sequence.next(0.0)
    assert sequence.due(0.0) is None
    hour = RESERVE_AHEAD / 1e6
    bound = sequence.due(0.6 * hour)
    assert bound is not None
    sequence.reserved(bound)
    sequence.next(1.5 * hour)
    assert len(disk.bounds) == 1
    sequence.next(1.7 * hour)
    assert len(disk.bounds) == 2


def test_next_life_continues_above_the_last_whatever_the_clock_says() -> None:
    disk = Disk()
    sequence = Sequence(0, lambda now: TODAY + YEAR, disk.reserve)
    last = sequence.next(0.0)
    again = Sequence(disk.bounds[-1], lambda now: 0.0, disk.reserve)
    assert again.next(0.0) > last


def test_raised_floor_holds() -> None:
    sequence = Sequence(0, lambda now: TODAY, Disk().reserve)
    sequence.raise_to(int(TODAY * 2e6))
    assert sequence.next(0.0) == int(TODAY * 2e6) + 1
    sequence.raise_to(5)
    assert sequence.next(0.0) == int(TODAY * 2e6) + 2


def test_the_end_of_the_numbers_is_an_error_not_a_wrap() -> None:
    sequence = Sequence(0, lambda now: TODAY, Disk().reserve)
    sequence.raise_to(SEQUENCE_MAX)
    assert sequence.next(0.0) == SEQUENCE_MAX
    with pytest.raises(OverflowError):
        sequence.next(0.0)


def test_tai64n_grows_with_the_number() -> None:
    labels = [tai64n(n) for n in (0, 1, 999_999, 1_000_000, int(TODAY * 1e6), int(TODAY * 1e6) + 1)]
    assert labels == sorted(labels)
    assert labels[0].hex() == "400000000000000a00000000"
    assert {len(label) for label in labels} == {12}


@pytest.mark.parametrize("wrong", [0.0, TODAY + YEAR], ids=["1970", "a year ahead"])
def test_wrong_unsynchronised_clock_does_not_say_what_has_expired(wrong: float) -> None:
    clock = Wallclock(TODAY - 86_400, now=100.0)
    clock.set(wrong - 100.0, synchronised=False)
    assert clock.certain(100.0) == TODAY - 86_400
    clock.hint("rendezvous", TODAY, 101.0)
    assert clock.certain(101.0) <= TODAY
    assert clock.issuing(102.0) == TODAY + 1
    assert clock.known(102.0) == TODAY - 86_400 + 2


def test_synchronised_clock_wins_over_every_hint() -> None:
    clock = Wallclock(TODAY - YEAR, now=0.0)
    clock.hint("rendezvous", TODAY + YEAR, 0.0)
    clock.set(TODAY, synchronised=True)
    assert clock.certain(5.0) == clock.issuing(5.0) == clock.known(5.0) == TODAY + 5


def test_a_rendezvous_can_set_the_time_neither_below_the_floor_nor_above_the_clock() -> None:
    clock = Wallclock(TODAY, now=0.0)
    clock.set(TODAY + 100, synchronised=False)
    clock.hint("low", 0.0, 0.0)
    assert clock.certain(0.0) == clock.issuing(0.0) == TODAY
    clock.hint("high", TODAY + YEAR, 0.0)
    assert clock.certain(0.0) == TODAY + 100


def test_hints_are_bounded() -> None:
    clock = Wallclock(0.0, now=0.0)
    for source in range(100):
        clock.hint(source, TODAY + source, 0.0)
    assert len(clock._hints) == MAX_HINTS
