"""How long records and trains may be: what the receiver counts and reports, what the sender makes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from crossedge.meshd.growth import (
    PAUSE_FIRST,
    PROVEN_DATAGRAMS,
    RECORD_DATAGRAMS,
    REPORT_DATAGRAMS,
    REPORT_INTERVAL,
    REPORT_LEAST,
    Growth,
    Tally,
)
from tests.data_pair import ALICE, NOW, pair, super_frame, tcp, udp

FAST = 100_000  # datagrams per second: more than a train in a millisecond


def reported(growth: Growth, reports: list[tuple[float, int, int]]) -> list[int]:
    """What the records' length is after each report (time, end, opened)."""
    lengths = []
    for now, end, opened in reports:
        growth.report(7, end, opened, now)
        lengths.append(growth.datagrams)
    return lengths


def test_records_begin_with_one_datagram_and_grow_on_a_clean_path() -> None:
    growth = Growth()
    assert growth.datagrams == 1
    clean = [(0.1 * n, int(0.1 * n * FAST), int(0.1 * n * FAST)) for n in range(3)]
    assert reported(growth, clean) == [1, RECORD_DATAGRAMS, RECORD_DATAGRAMS]


def test_a_record_takes_a_millisecond_of_the_measured_rate() -> None:
    slow = [(0.1 * n, 1000 * n, 1000 * n) for n in range(3)]  # 10,000 datagrams per second
    assert reported(Growth(), slow)[-1] == 10
    home = [(0.1 * n, 180 * n, 180 * n) for n in range(9)]  # 20 Mbit/s
    assert reported(Growth(), home)[-1] == 1


def test_the_first_loss_brings_records_back_to_one_for_a_while_that_doubles() -> None:
    growth, now, total, lost = Growth(), 0.0, 0, 0

    def step(lose: int = 0) -> int:
        nonlocal now, total, lost
        now, total, lost = now + 0.1, total + FAST // 10, lost + lose
        growth.report(7, total, total - lost, now)
        return growth.datagrams

    def until_grown() -> float:
        began = now
        while step() == 1:
            assert now < began + 60
        return now - began

    assert until_grown() < 1
    assert step(1) == 1
    first = until_grown()
    assert PAUSE_FIRST - 0.2 <= first <= PAUSE_FIRST + 0.5
    assert step(1) == 1
    assert 2 * PAUSE_FIRST - 0.2 <= until_grown() <= 2 * PAUSE_FIRST + 0.5
    for _ in range(150):
        step()
    assert step(1) == 1
    assert until_grown() <= PAUSE_FIRST + 0.5  # long clean since: it begins anew


def test_trains_are_as_long_as_they_can_be_until_a_rate_is_known_and_then_take_a_millisecond() -> None:
    growth = Growth()
    trains = [growth.train]
    for number in range(4):
        growth.report(7, 180 * number, 180 * number, 0.1 * number)  # 20 Mbit/s
        trains.append(growth.train)
    assert trains == [RECORD_DATAGRAMS, RECORD_DATAGRAMS, 1, 1, 1]
    growth.report(7, 540 + 512, 540 + 512, 0.31)  # the first report of bulk
    assert growth.train == 51


def test_trains_follow_the_rate_where_datagrams_are_lost_as_well() -> None:
    growth = Growth()
    for number in range(5):
        growth.report(7, 1010 * number, 1000 * number, 0.1 * number)
        assert growth.datagrams == 1
    assert growth.train == 10


def test_a_rate_that_is_not_reached_any_more_is_forgotten_in_half_a_second() -> None:
    growth, total = Growth(), 0
    for number in range(4):
        growth.report(7, total, total, 0.01 * number)
        total += FAST // 100
    assert (growth.train, growth.datagrams) == (RECORD_DATAGRAMS, RECORD_DATAGRAMS)
    for number in range(5):
        total += 180
        growth.report(7, total, total, 0.1 + 0.1 * number)
    assert (growth.train, growth.datagrams) == (1, 1)


def test_a_pause_says_nothing_about_the_rate() -> None:
    growth, total = Growth(), 0
    for number in range(PROVEN_DATAGRAMS * 2):
        growth.report(7, number, number, 0.2 * number)
    assert (growth.train, growth.datagrams) == (RECORD_DATAGRAMS, 1)
    growth = Growth()
    for number in range(4):
        growth.report(7, total, total, 0.01 * number)
        total += FAST // 100
    for number in range(100):
        growth.report(7, total, total, 1.0 + number)
        total += 3
    assert (growth.train, growth.datagrams) == (RECORD_DATAGRAMS, RECORD_DATAGRAMS)


def test_reports_that_were_held_up_do_not_make_the_path_faster() -> None:
    growth = Growth()
    for number in range(3):
        growth.report(7, 180 * number, 180 * number, 0.1 * number)
    for number in range(5):
        growth.report(7, 360 + 20 * number, 360 + 20 * number, 0.2 + 0.000_01 * number)
    assert growth.train <= 2


@pytest.mark.parametrize("train", [1, 2, 5, 64])
@pytest.mark.parametrize("transport", [tcp, udp])
def test_bulk_leaves_in_trains_as_long_as_the_path_wants_them(
    train: int, transport: Callable[..., bytes]
) -> None:
    alice, bob = pair(size=1472)
    alice.link.growth.train = train
    frame = super_frame(transport(bytes(40_000), partial=True), 1300)
    alice.read(frame)
    counts = [-(-len(data) // segment) for _, data, segment in alice.sent]
    assert max(counts) <= train
    assert all(count == train for count in counts[:-1])
    whole, taker = pair(size=1472)
    whole.read(frame)
    taker.take(*whole.datagrams(), source=ALICE)
    bob.take(*alice.datagrams(), source=ALICE)
    assert bob.packets() == taker.packets()


def test_few_datagrams_prove_nothing() -> None:
    few = PROVEN_DATAGRAMS // 3
    assert reported(Growth(), [(0.001 * n, few * n, few * n) for n in range(3)]) == [1, 1, 1]


def test_an_old_report_and_one_of_another_keypair_say_nothing() -> None:
    growth = Growth()
    reported(growth, [(0.1 * n, 10_000 * n, 10_000 * n) for n in range(3)])
    grown = growth.datagrams
    growth.report(7, 10_000, 10_000, 0.5)
    growth.report(8, 50, 3, 0.6)  # what was lost before this report is not known
    assert growth.datagrams == grown


def test_another_path_begins_anew() -> None:
    alice, _ = pair()
    alice.link.growth.datagrams = 64
    alice.link.growth.train = 3
    alice.link.set_path((ALICE,))
    assert alice.link.growth.datagrams == 1
    assert alice.link.growth.train == RECORD_DATAGRAMS


def test_a_report_is_due_in_time_after_many_datagrams_and_soon_after_a_loss() -> None:
    tally = Tally()
    tally.add(0, 10)
    assert tally.due(NOW)
    tally.add(10, 10)
    assert not tally.due(NOW + REPORT_LEAST)
    assert tally.due(NOW + 1.1 * REPORT_INTERVAL)
    tally.add(20, REPORT_DATAGRAMS)
    assert not tally.due(NOW + 1.1 * REPORT_INTERVAL + REPORT_LEAST / 2)
    assert tally.due(NOW + 1.1 * REPORT_INTERVAL + 1.5 * REPORT_LEAST)
    tally.add(20 + REPORT_DATAGRAMS + 1, 1)  # one is missing
    assert tally.due(NOW + 1.1 * REPORT_INTERVAL + 3 * REPORT_LEAST)
    assert (tally.end, tally.opened) == (20 + REPORT_DATAGRAMS + 2, 21 + REPORT_DATAGRAMS)


def test_the_receiver_counts_every_datagram_that_opened() -> None:
    alice, bob = pair(size=1472)
    frame = super_frame(tcp(bytes(40_000), partial=True), 1328)
    alice.read(frame)
    singles = alice.datagrams()
    bob.take(*singles[:3], *singles[4:], source=ALICE)
    alice.link.growth.datagrams = 8
    alice.read(frame)
    records = alice.datagrams()
    bob.take_trains(*records, source=ALICE)
    tally = bob.session.current.tally
    assert tally.end == len(singles) + len(records)
    assert tally.opened == tally.end - 1
