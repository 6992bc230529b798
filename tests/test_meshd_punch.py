"""The plan of a punch: who fires when, how often, and when both fall silent."""

from __future__ import annotations

import pytest

from crossedge.meshd.natplan import FIRST_TRY_TIME, PAUSES, Method, Plan, Role
from crossedge.meshd.punch import (
    FIRST_TRY,
    FOLLOWER_EXTRA,
    HEARD,
    LATER_TRY_TIME,
    OPENING_TTL,
    CallNow,
    Phase,
    Plannable,
    Punch,
    Shot,
    Volley,
)
from crossedge.wire.endpoint import SocketEndpoint, UdpEndpoint

PUBLIC = UdpEndpoint("198.51.100.7", 41820)
OTHER = UdpEndpoint("198.51.100.8", 41820)
LAN = UdpEndpoint("192.168.1.7", 41820)
LEADER, FOLLOWER = Plan(), Plan(role=Role.FOLLOWER)


def run(
    punch: Punch, start: float, seconds: float, plan: Plan = LEADER
) -> list[tuple[float, Plannable | CallNow]]:
    """Return what the punch does in that time, each with the seconds since `start`."""
    seen: list[tuple[float, Plannable | CallNow]] = []
    now = start
    while True:
        seen += [(round(now - start, 3), shot) for shot in punch.take(now)]
        call = punch.handle_timeout(now, plan)
        if call is not None:
            seen.append((round(now - start, 3), call))
        deadline = punch.deadline()
        if deadline is None or deadline > start + seconds:
            return seen
        now = max(now, deadline)


def test_first_try_fires_at_once_and_a_few_times_more() -> None:
    punch = Punch()
    punch.start([PUBLIC], 10.0)
    seen = run(punch, 10.0, FIRST_TRY_TIME - 0.1)
    assert seen == [(offset, Shot(PUBLIC, 1)) for offset in FIRST_TRY]


def test_lan_address_gets_fewer_pings() -> None:
    punch = Punch()
    punch.start([PUBLIC, LAN], 0.0)
    shots = [item.endpoint for _, item in run(punch, 0.0, 1.9) if isinstance(item, Shot)]
    assert shots.count(LAN) < shots.count(PUBLIC)


def test_leader_calls_for_the_second_try_and_waits_half_the_round_trip() -> None:
    punch = Punch()
    punch.start([PUBLIC], 0.0)
    when, call = run(punch, 0.0, FIRST_TRY_TIME)[-1]
    assert (when, call) == (FIRST_TRY_TIME, CallNow(2))
    punch.synchronise([PUBLIC], 2, 0.080, FIRST_TRY_TIME, called=False)
    assert punch.take(FIRST_TRY_TIME) == []
    assert punch.deadline() == pytest.approx(FIRST_TRY_TIME + 0.040)
    assert punch.take(FIRST_TRY_TIME + 0.040) == [Shot(PUBLIC, 2)]


def test_follower_fires_when_the_call_reaches_it() -> None:
    punch = Punch()
    punch.start([PUBLIC], 0.0)
    run(punch, 0.0, FIRST_TRY_TIME, FOLLOWER)
    assert punch.phase is Phase.PAUSED
    punch.synchronise([PUBLIC], 2, 0.080, FIRST_TRY_TIME + 0.04, called=True)
    assert punch.take(FIRST_TRY_TIME + 0.04) == [Shot(PUBLIC, 2)]


def test_peer_cannot_make_us_wait_for_long() -> None:
    punch = Punch()
    punch.synchronise([PUBLIC], 2, 1e9, 0.0, called=False)
    deadline = punch.deadline()
    assert deadline is not None
    assert deadline <= 0.5


@pytest.mark.parametrize("plan", [LEADER, FOLLOWER], ids=["leader", "follower"])
def test_after_failure_both_pause_and_who_does_not_lead_for_longer(plan: Plan) -> None:
    punch = Punch()
    punch.later(2, 0.0, LATER_TRY_TIME)
    run(punch, 0.0, LATER_TRY_TIME, plan)
    assert punch.phase is Phase.PAUSED
    pause = PAUSES[Method.FRESH][0] + (FOLLOWER_EXTRA if plan is FOLLOWER else 0.0)
    assert run(punch, LATER_TRY_TIME, pause - 0.1, plan) == []
    assert [item for _, item in run(punch, LATER_TRY_TIME, pause, plan)] == [CallNow(3)]


def test_hopeless_pair_is_left_after_the_first_try() -> None:
    plan = Plan(Method.NONE, likely=False)
    punch = Punch()
    punch.start([PUBLIC], 0.0, plan.first_time)
    assert all(isinstance(item, Shot) for _, item in run(punch, 0.0, 3600.0, plan))
    assert punch.phase is Phase.SPENT
    assert punch.deadline() is None


def test_spray_is_tried_twice_and_then_not_until_something_changes() -> None:
    plan = Plan(Method.SPRAY, Role.OPENER, likely=False)
    punch = Punch()
    punch.start([PUBLIC], 0.0, plan.first_time)
    now, attempts = 0.0, []
    while punch.phase is not Phase.SPENT:
        (when, call) = run(punch, now, 3600.0, plan)[-1]
        assert isinstance(call, CallNow)
        now += when
        attempts.append(call.attempt)
        punch.later(call.attempt, now, 1.0)
        run(punch, now, 1.0, plan)
    assert attempts == [2, 3]
    punch.start([PUBLIC], now, plan.first_time)
    assert punch.phase is Phase.TRYING


def test_first_receive_ends_the_guessing() -> None:
    punch = Punch()
    punch.later(2, 0.0, 5.0)
    targets = tuple(UdpEndpoint("198.51.100.7", port) for port in range(1024, 1040))
    punch.add_shots((0.1 * number, Volley(targets, 2, spray=True)) for number in range(10))
    assert len(punch.take(0.1)) == 2
    found = SocketEndpoint(PUBLIC, 1001)
    punch.heard(found, 0.15, short=False)
    assert [item for _, item in run(punch, 0.15, 2.0)] == [Shot(found, 2)] * len(HEARD)


def test_third_try_opens_with_a_packet_that_dies_on_its_way() -> None:
    punch = Punch()
    punch.synchronise([PUBLIC], 3, 0.0, 0.0, called=False)
    shots = [item for _, item in run(punch, 0.0, 1.0) if isinstance(item, Shot)]
    assert shots[0].ttl == OPENING_TTL
    assert all(shot.ttl is None for shot in shots[1:])


@pytest.mark.parametrize("method", [Method.FRESH, Method.PREDICT])
def test_pauses_grow_to_a_bound(method: Method) -> None:
    punch, plan = Punch(), Plan(method)
    now, attempt, pauses = 0.0, 2, []
    for _ in range(8):
        punch.synchronise([PUBLIC], attempt, 0.0, now, called=False)
        (when, call) = run(punch, now, 700.0, plan)[-1]
        assert isinstance(call, CallNow)
        pauses.append(round(when - LATER_TRY_TIME))
        now, attempt = now + when, call.attempt
    assert pauses[: len(PAUSES[method])] == list(PAUSES[method])
    assert pauses[-1] == PAUSES[method][-1]


def test_first_receive_is_answered_by_three_more_packets_and_the_second_by_none() -> None:
    punch = Punch()
    punch.start([], 0.0)
    punch.heard(OTHER, 0.5)
    punch.heard(OTHER, 0.6)
    shots = [item for _, item in run(punch, 0.5, 1.0)]
    assert shots == [Shot(OTHER, 1, short=True)] * len(HEARD)


def test_first_receive_in_a_pause_is_answered_too() -> None:
    punch = Punch()
    punch.start([PUBLIC], 0.0)
    run(punch, 0.0, FIRST_TRY_TIME)
    punch.heard(OTHER, 20.0)
    assert len(punch.take(21.0)) == len(HEARD)


def test_success_stops_everything() -> None:
    punch = Punch()
    punch.start([PUBLIC], 0.0)
    punch.done()
    assert punch.take(100.0) == []
    assert punch.deadline() is None
    punch.heard(PUBLIC, 101.0)
    assert punch.take(102.0) == []


def test_candidate_that_comes_later_joins_the_try() -> None:
    punch = Punch()
    punch.start([PUBLIC], 0.0)
    punch.add(OTHER, 0.2)
    assert Shot(OTHER, 1) in punch.take(0.2)


def test_candidates_and_shots_are_bounded() -> None:
    punch = Punch()
    punch.start([UdpEndpoint("198.51.100.7", port) for port in range(1, 500)], 0.0)
    for port in range(1, 500):
        punch.add(UdpEndpoint("198.51.100.9", port), 0.0)
        punch.heard(UdpEndpoint("198.51.100.10", port), 0.0)
    assert len(punch.take(0.0)) < 600
