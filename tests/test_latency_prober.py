"""Whom a node measures and when: bounded whatever the mesh's size, fair, and soon where that matters."""

from __future__ import annotations

from collections import Counter

import pytest

from crossedge.lab.chance import Chance
from crossedge.latency.prober import (
    ALL_PAIRS,
    ASKED_FOR,
    ASKERS,
    CHOSEN,
    FIRST_MAX,
    IN_FLIGHT,
    INTERVAL_CHOSEN,
    INTERVAL_MIN,
    MEDOIDS,
    NEAR,
    NEAR_AGAIN,
    RETRY,
    ROTATION,
    Prober,
)
from crossedge.latency.report import Coordinates

HERE = Coordinates((0.0,) * 8, 0.1, 0.2)


def ids(count: int) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in range(1, count + 1)]


def prober(members: int, own: bytes = bytes(16), seed: int = 1) -> Prober:
    made = Prober(own, Chance(seed).token, 0.0)
    for peer in ids(members):
        made.add(peer)
    made.refresh(HERE, 0.0)
    return made


def at(distance: float) -> Coordinates:
    return Coordinates((distance, *(0.0,) * 7), 0.1, 0.2)


def run(made: Prober, seconds: float, start: float = 0.0, takes: float = 2.0) -> list[tuple[float, bytes]]:
    """Let every measurement succeed after `takes` seconds; return when each began."""
    now, begun, running = start, [], []
    while now < start + seconds:
        made.refresh(HERE, now)
        while (peer := made.take(now)) is not None:
            begun.append((now, peer))
            running.append((now + takes, peer))
        assert made.in_flight == len(running) <= IN_FLIGHT
        now = min([max(made.next_deadline(), now + 0.001), *(when for when, _ in running)])
        for each in [each for each in running if each[0] <= now]:
            running.remove(each)
            made.answered(each[1], now)
    return begun


def test_small_mesh_measures_every_pair_once_an_interval() -> None:
    made = prober(ALL_PAIRS)
    assert made.targets == set(ids(ALL_PAIRS))
    begun = Counter(peer for when, peer in run(made, 2 * made.interval) if when >= FIRST_MAX)
    assert set(begun) == made.targets
    assert set(begun.values()) <= {1, 2, 3}
    assert all(when < FIRST_MAX + 20 for when, _ in run(prober(ALL_PAIRS), 70.0))


def test_large_mesh_measures_a_bounded_choice_that_members_of_all_kinds_are_in() -> None:
    members = ids(1001)
    chosen: Counter[bytes] = Counter()
    for number, own in enumerate(members[:50]):
        made = Prober(own, Chance(number).token, 0.0)
        for peer in members:
            made.add(peer)
        made.refresh(HERE, 0.0)
        assert own not in made.targets
        assert CHOSEN - 2 <= len(made.targets) <= CHOSEN
        chosen.update(made.targets)
    assert max(chosen.values()) <= 6  # 50 * 12 draws over 1,001 members: 0.6 expected
    assert len(chosen) > 400


def test_choice_hardly_changes_as_members_come_and_go() -> None:
    made = prober(1000)
    before = made.targets
    stranger = (5000).to_bytes(16, "big")
    made.add(stranger)
    made.refresh(HERE, 1.0)
    assert len(made.targets ^ before) <= 2
    lost = min(before)
    made.remove(lost)
    made.refresh(HERE, 2.0)
    assert lost not in made.targets
    assert len(made.targets ^ before) <= 4


def test_every_slot_draws_anew_once_a_rotation() -> None:
    made = prober(1000)
    seen = [made.targets]
    for quarter in range(1, 5):
        made.refresh(HERE, quarter * ROTATION / 4)
        seen.append(made.targets)
    assert len(seen[1] & seen[0]) >= CHOSEN // 2  # not all at once
    assert len(seen[4] & seen[0]) <= 2


def test_nearest_members_by_coordinates_are_measured_too() -> None:
    made = prober(1000)
    near = ids(1000)[100:110]
    for peer in ids(1000)[:100]:
        made.hear(peer, at(80.0))
    for number, peer in enumerate(near):
        made.hear(peer, at(1.0 + number))
    made.hear((5000).to_bytes(16, "big"), at(0.0))  # nobody of ours
    made.refresh(HERE, NEAR_AGAIN + 1)
    assert set(near[:NEAR]) <= made.targets
    assert len(made.targets) <= CHOSEN + NEAR


def test_members_that_schedulers_name_are_measured_within_a_bound_and_for_a_time() -> None:
    made, members = prober(1000), ids(1000)
    own = made.targets
    spare = [peer for peer in members if peer not in own]
    stranger = (5000).to_bytes(16, "big")
    assert made.ask("one", [stranger, *spare[:3], spare[0]], 1.0) == 5 - MEDOIDS
    made.refresh(HERE, 1.0)
    assert made.targets == own | set(spare[:MEDOIDS])
    assert made.ask("one", [], 2.0) == 0  # other words take the place of those before
    made.refresh(HERE, 2.0)
    assert made.targets == own
    for number in range(3 * ASKERS):
        made.ask(f"scheduler {number}", spare[2 * number : 2 * number + 2], 3.0)
        made.refresh(HERE, 3.0)
        assert len(made.targets) == len(own) + MEDOIDS
    named = made.targets - own
    made.remove(next(iter(named)))
    made.refresh(HERE, 4.0)
    assert len(made.targets - own) == MEDOIDS  # another one's wish takes its place
    made.refresh(HERE, 3.0 + ASKED_FOR)
    assert not made.targets & named
    small = prober(ALL_PAIRS)
    small.ask("one", ids(2), 1.0)
    small.refresh(HERE, 1.0)
    assert small.targets == set(ids(ALL_PAIRS))


def test_interval_grows_with_the_pairs_and_then_no_more() -> None:
    assert prober(3).interval == INTERVAL_MIN
    assert prober(20).interval == 200.0
    assert prober(ALL_PAIRS).interval == 630.0
    assert prober(1000).interval == prober(5000).interval == INTERVAL_CHOSEN


def test_failures_make_a_pair_unreachable_after_a_second_try_and_it_is_tried_on() -> None:
    made = prober(1)
    (peer,) = ids(1)
    assert made.take(60.0) == peer
    assert made.take(61.0) is None
    assert not made.failed(peer, 68.0)
    assert made.take(68.0 + RETRY[0]) is None
    assert made.take(68.0 + RETRY[1]) == peer
    assert made.failed(peer, 108.0)
    assert made.take(150.0) is None
    assert made.take(170.0) == peer
    made.answered(peer, 172.0)
    assert made.take(173.0) is None
    assert made.take(233.0) == peer
    assert not made.failed(peer, 241.0)


def test_bursts_in_flight_are_bounded_and_one_that_is_gone_leaves_its_place() -> None:
    made = prober(ALL_PAIRS)
    now, taken = 100.0, []
    while len(taken) < IN_FLIGHT:
        now += 0.1
        peer = made.take(now)
        taken += [] if peer is None else [peer]
    assert made.take(now + 10) is None
    made.remove(taken[0])
    made.refresh(HERE, now + 11)
    assert made.in_flight == IN_FLIGHT - 1
    assert made.take(now + 12) is not None


def test_pair_that_the_other_end_measured_waits_for_its_interval() -> None:
    made = prober(10)
    for peer in ids(10):
        made.answered(peer, 1.0)
    assert made.next_deadline() >= min(60.0, 1.0 + 0.8 * made.interval)
    assert run(made, 75.0) == []


def test_node_that_moved_measures_everything_soon() -> None:
    made = prober(10)
    run(made, 20.0)
    made.restart(20.0)
    assert {peer for _, peer in run(made, 12.0, start=20.0)} == made.targets


@pytest.mark.parametrize("peer", [bytes(16), (9).to_bytes(16, "big")])
def test_what_is_no_target_is_ignored(peer: bytes) -> None:
    made = prober(3)
    made.add(bytes(16))
    made.remove((9).to_bytes(16, "big"))
    made.answered(peer, 1.0)
    assert not made.failed(peer, 1.0)
    assert made.targets == set(ids(3))
