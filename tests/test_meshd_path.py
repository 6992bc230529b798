"""A path between two ends, in virtual time: proof, trust, doubt, loss, size and choice.

Path --probe--> [forward: delay, largest size, up or down] --> far end answers
     <--reply-- [backward: the same]                       <--
"""

from __future__ import annotations

import itertools
import random
from heapq import heappop, heappush
from statistics import mean

import pytest

from crossedge.meshd.inner import Probe, ProbeReply
from crossedge.meshd.path import (
    DWELL,
    GIVE_UP,
    HEARTBEAT,
    KEEPALIVE_MAX,
    STANDBY_INTERVAL,
    TRUST,
    Path,
    Role,
    State,
    choose,
)
from crossedge.meshd.pathmtu import AGAIN, BASE
from crossedge.wire.endpoint import RelayEndpoint, UdpEndpoint

DIRECT = UdpEndpoint("198.51.100.7", 41820)
SERVER = UdpEndpoint("203.0.113.1", 3478)
RELAY = RelayEndpoint(SERVER, 0xABCDEF)
FAR_CLOCK = 77_000.0  # the far end's clock has nothing to do with ours


class Wire:
    """What lies between a path and its far end."""

    def __init__(self, path: Path, delay: float = 0.015) -> None:
        self.path = path
        self.delay = delay
        self.now = 100.0
        self.forward = self.backward = 1500
        self.residence = 0.0
        self.lost = 0.0  # the share of probes that never arrive
        self.random = random.Random(7)
        self.sent: list[tuple[float, Probe]] = []
        self._arrivals: list[tuple[float, int, ProbeReply]] = []
        self._ids = itertools.count(1)
        self._order = itertools.count()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            self._pump()
            deadline = self.path.deadline()
            times = [end] + ([max(deadline, self.now)] if deadline is not None else [])
            if self._arrivals:
                times.append(self._arrivals[0][0])
            self.now = min(times)
            while self._arrivals and self._arrivals[0][0] <= self.now:
                _, _, reply = heappop(self._arrivals)
                self.path.replied(reply, self.now, self.now)
            self.path.handle_timeout(self.now)
            if self.now >= end:
                self._pump()
                return

    def _pump(self) -> None:
        for number in self._ids:
            probe = self.path.probe(number, self.now)
            if probe is None:
                return
            assert len(self.sent) < 10_000
            self.sent.append((self.now, probe))
            if probe.size > self.forward or self.random.random() < self.lost:
                continue
            size = probe.size if probe.full_reply else 0
            arrived = self.now + self.delay + FAR_CLOCK
            reply = ProbeReply(
                probe.id, probe.sent, arrived, arrived + self.residence, probe.size, max(size, 72)
            )
            if reply.size <= self.backward:
                when = self.now + 2 * self.delay + self.residence
                heappush(self._arrivals, (when, next(self._order), reply))

    def cut(self) -> None:
        self.forward = 0


def proven(endpoint: UdpEndpoint | RelayEndpoint = DIRECT, role: Role = Role.LIVE, **options: float) -> Wire:
    wire = Wire(Path(endpoint, 100.0), **options)
    wire.path.prove(wire.now)
    wire.path.set_role(role, wire.now)
    wire.run(0.5)
    assert wire.path.state is State.PROVEN
    return wire


def test_path_is_proven_by_one_full_size_round_trip() -> None:
    wire = Wire(Path(DIRECT, 100.0))
    wire.path.prove(wire.now)
    wire.run(0.0301)
    assert wire.path.trusted(wire.now)
    assert wire.sent[0][1].full_reply
    assert wire.sent[0][1].size == BASE


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_path_that_passes_only_small_datagrams_is_never_proven(way: str) -> None:
    wire = Wire(Path(DIRECT, 100.0))
    setattr(wire, way, 1000)
    wire.path.prove(wire.now)
    wire.run(60.0)
    assert wire.path.state is State.LOST
    assert len(wire.sent) < 12


def test_small_answer_to_a_full_probe_proves_nothing() -> None:
    path = Path(DIRECT, 0.0)
    path.prove(0.0)
    probe = path.probe(1, 0.0)
    assert probe is not None
    assert path.replied(ProbeReply(1, 0.0, 5.0, 5.0, probe.size, size=72), 0.03, 0.03)
    assert path.state is State.PROBING
    assert path.consented


def test_answer_to_no_probe_of_ours_is_ignored() -> None:
    path = Path(DIRECT, 0.0)
    path.prove(0.0)
    path.probe(1, 0.0)
    assert not path.replied(ProbeReply(2, 0.0, 5.0, 5.0, 1232, size=1232), 0.03, 0.03)
    assert not path.consented


def test_repeated_answer_counts_once() -> None:
    path = Path(DIRECT, 0.0)
    path.prove(0.0)
    path.probe(1, 0.0)
    reply = ProbeReply(1, 0.0, 5.0, 5.0, 1232, size=1232)
    assert path.replied(reply, 0.03, 0.03)
    assert not path.replied(reply, 0.04, 0.04)
    assert path.rtt.answers == 1


def test_heartbeat_goes_at_its_interval_and_keeps_trust() -> None:
    wire = proven()
    before = len(wire.sent)
    wire.run(70 * HEARTBEAT)
    assert 68 <= len(wire.sent) - before <= 72
    assert wire.path.trusted(wire.now)


def test_residence_of_a_busy_far_end_is_not_distance() -> None:
    wire = proven()
    wire.residence = 0.2
    wire.run(10.0)
    assert wire.path.rtt.smoothed == pytest.approx(0.03, abs=1e-6)


def test_trust_ends_within_two_seconds_of_the_cut() -> None:
    wire = proven()
    wire.run(5.0)
    wire.cut()
    start = wire.now
    while wire.path.trusted(wire.now):
        wire.run(0.01)
        assert wire.now - start <= TRUST
    assert wire.path.state is State.SUSPECT


def test_one_lost_heartbeat_is_no_doubt() -> None:
    wire = proven()
    wire.run(3.0)
    wire.cut()
    wire.run(HEARTBEAT + 0.02)
    wire.forward = 1500
    wire.run(1.0)
    assert wire.path.trusted(wire.now)


def test_suspect_path_is_proven_again_by_a_full_round_trip() -> None:
    wire = proven()
    wire.cut()
    wire.run(3.0)
    assert wire.path.state is State.SUSPECT
    wire.forward = 1000
    wire.run(1.0)
    assert wire.path.state is State.SUSPECT
    wire.forward = 1500
    wire.run(0.8)
    assert wire.path.trusted(wire.now)


def test_suspect_path_is_lost_and_then_silent() -> None:
    wire = proven()
    wire.cut()
    wire.run(TRUST + GIVE_UP + 0.5)
    assert wire.path.state is State.LOST
    before = len(wire.sent)
    wire.run(100.0)
    assert len(wire.sent) == before
    assert wire.path.deadline() is None


def test_lost_path_can_be_proven_anew() -> None:
    wire = proven()
    wire.cut()
    wire.run(20.0)
    wire.forward = 1500
    wire.path.prove(wire.now)
    wire.run(0.1)
    assert wire.path.trusted(wire.now)


@pytest.mark.parametrize(("role", "interval"), [(Role.IDLE, KEEPALIVE_MAX), (Role.STANDBY, STANDBY_INTERVAL)])
def test_path_without_traffic_is_kept_open_at_its_interval(role: Role, interval: float) -> None:
    wire = proven(role=role)
    wire.path.keepalive = 600.0
    before = len(wire.sent)
    wire.run(10 * interval + 1.0)
    assert 10 <= len(wire.sent) - before <= 12
    assert wire.path.state is State.PROVEN


def test_idle_path_that_died_is_noticed_by_its_keepalive() -> None:
    wire = proven(role=Role.IDLE)
    wire.cut()
    wire.run(KEEPALIVE_MAX + 2.0)
    assert wire.path.state is not State.PROVEN


def test_traffic_on_an_idle_path_is_proven_before_it_is_trusted() -> None:
    wire = proven(role=Role.IDLE)
    wire.run(15.0)
    assert not wire.path.trusted(wire.now)
    wire.path.set_role(Role.LIVE, wire.now)
    wire.run(0.031)
    assert wire.path.trusted(wire.now)


def test_traffic_on_an_idle_path_that_died_makes_it_suspect() -> None:
    wire = proven(role=Role.IDLE)
    wire.cut()
    wire.run(5.0)
    wire.path.set_role(Role.LIVE, wire.now)
    wire.run(TRUST)
    assert wire.path.state is State.SUSPECT


def test_unused_path_is_not_probed() -> None:
    wire = proven(role=Role.OFF)
    before = len(wire.sent)
    wire.run(100.0)
    assert len(wire.sent) == before
    assert wire.path.state is State.PROVEN


def test_doubt_from_outside_makes_a_path_prove_itself() -> None:
    wire = proven()
    wire.path.doubt(wire.now)
    assert not wire.path.trusted(wire.now)
    wire.run(0.031)
    assert wire.path.trusted(wire.now)


@pytest.mark.parametrize(
    ("mtu", "size"),
    [(1500, 1472), (1492, 1464), (1480, 1452), (1420, 1392), (1400, 1372), (1280, 1252), (1279, 1232)],
)
def test_path_mtu_is_found_on_ipv4(mtu: int, size: int) -> None:
    wire = Wire(Path(DIRECT, 100.0))
    wire.forward = mtu - 28
    wire.path.prove(wire.now)
    wire.path.set_role(Role.LIVE, wire.now)
    wire.run(10.0)
    assert wire.path.size == size
    assert wire.path.trusted(wire.now)


@pytest.mark.parametrize(("mtu", "size"), [(1500, 1452), (1492, 1444), (1280, 1232)])
def test_path_mtu_is_found_on_ipv6(mtu: int, size: int) -> None:
    wire = Wire(Path(UdpEndpoint("2001:db8::7", 41820), 100.0))
    wire.forward = mtu - 48
    wire.path.prove(wire.now)
    wire.path.set_role(Role.LIVE, wire.now)
    wire.run(10.0)
    assert wire.path.size == size


def test_relay_path_leaves_room_for_its_header() -> None:
    wire = Wire(Path(RELAY, 100.0))
    wire.forward = 1472 - 8
    wire.path.prove(wire.now)
    wire.path.set_role(Role.LIVE, wire.now)
    wire.run(0.05)
    assert wire.sent[0][1].size == BASE - 8
    wire.run(10.0)
    assert wire.path.size == 1472 - 8


def test_shrunken_path_falls_back_to_the_size_that_always_passes() -> None:
    wire = proven()
    wire.run(5.0)
    assert wire.path.size == 1472
    wire.forward = 1252
    wire.run(6.0)
    assert wire.path.size in (BASE, 1252)
    wire.run(10.0)
    assert wire.path.size == 1252
    assert wire.path.trusted(wire.now)


def test_widened_path_is_found_later() -> None:
    wire = Wire(Path(DIRECT, 100.0))
    wire.forward = 1252
    wire.path.prove(wire.now)
    wire.path.set_role(Role.LIVE, wire.now)
    wire.run(20.0)
    wire.forward = 1472
    wire.run(AGAIN + 5.0)
    assert wire.path.size == 1472


def test_size_in_use_that_the_kernel_refuses_is_dropped_at_once() -> None:
    wire = proven()
    wire.run(5.0)
    wire.path.too_big(1472, wire.now)
    assert wire.path.size == BASE
    wire.forward = 1400
    wire.run(5.0)
    assert wire.path.size == 1392


@pytest.mark.parametrize("told", [True, False])
def test_probe_that_the_kernel_refuses_is_not_repeated_for_ever(told: bool) -> None:
    path = Path(DIRECT, 0.0)
    path.prove(0.0)
    path.set_role(Role.LIVE, 0.0)
    first = path.probe(0, 0.0)
    assert first is not None
    assert path.replied(ProbeReply(0, 0.0, 9.0, 9.0, 1232, size=1232), 0.03, 0.03)
    sent = []
    for number in range(1, 100):
        probe = path.probe(number, 0.03)
        if probe is None:
            break
        sent.append(probe.size)
        if probe.size > 1400 - 28:  # the interface's MTU is 1,400
            path.too_big(probe.size if told else 0, 0.03)
    assert len(sent) == len(set(sent)) <= 5
    assert path.size == BASE


def trusted_path(endpoint: UdpEndpoint | RelayEndpoint, rtt: float) -> Path:
    path = Path(endpoint, 0.0)
    path.prove(0.0)
    path.probe(1, 0.0)
    assert path.replied(ProbeReply(1, 0.0, 9.0, 9.0, 1232, size=1232), rtt, 1.0)
    assert path.trusted(1.0)
    return path


def test_direct_wins_over_relay_at_once() -> None:
    direct, relay = trusted_path(DIRECT, 0.05), trusted_path(RELAY, 0.04)
    assert choose([relay, direct], relay, 0.9, 1.0) is direct


def test_lossy_direct_path_gives_way_to_the_relay() -> None:
    direct, relay = trusted_path(DIRECT, 0.05), trusted_path(RELAY, 0.04)
    for number in range(40):
        if number % 2:
            direct.rtt.lost()
        else:
            direct.rtt.add(0.05, 1.0)
    assert choose([relay, direct], direct, 1.0 - DWELL, 1.0) is relay


@pytest.mark.parametrize("down", [0.4, 0.9, 2.5, 5.0, 12.0])
def test_peer_that_restarts_again_and_again_does_not_make_its_path_lossy(down: float) -> None:
    wire = proven()
    for _ in range(8):
        wire.run(1.0)
        wire.forward = 0
        wire.run(down)
        wire.forward = 1500
        wire.path.forgive()
        if wire.path.state is State.LOST:
            wire.path.prove(wire.now)
    wire.run(8.0)
    assert wire.path.state is State.PROVEN
    assert wire.path.rtt.samples >= 8
    assert wire.path.rtt.loss == 0.0
    relay = trusted_path(RELAY, 0.030)
    relay.last_proof = wire.now
    assert choose([wire.path, relay], relay, 0.0, wire.now) is wire.path


def test_cuts_of_a_path_whose_peer_stays_make_it_lossy() -> None:
    wire = proven()
    for _ in range(20):
        wire.run(1.0)
        wire.forward = 0
        wire.run(3.5)
        wire.forward = 1500
    wire.run(4.0)
    assert wire.path.state is State.PROVEN
    assert wire.path.rtt.loss > 0.25


def test_answer_that_comes_when_its_probe_was_given_up_is_no_measurement() -> None:
    wire = proven()
    before = wire.path.rtt.smoothed
    wire.delay = 4.0
    wire.run(9.0)
    assert wire.path.state is State.SUSPECT
    assert wire.path.rtt.smoothed == before


def test_loss_is_that_of_the_path_and_not_of_the_moments_after_a_loss() -> None:
    losses = []
    for seed in range(10):
        wire = proven()
        wire.lost, wire.random = 0.4, random.Random(seed)
        wire.run(200.0)
        losses.append(wire.path.rtt.loss)
    assert mean(losses) == pytest.approx(0.4, abs=0.05)


def test_slightly_better_path_does_not_take_over() -> None:
    first, second = trusted_path(DIRECT, 0.050), trusted_path(UdpEndpoint("198.51.100.8", 1), 0.047)
    assert choose([first, second], first, -100.0, 1.0) is first
    third = trusted_path(UdpEndpoint("198.51.100.9", 1), 0.030)
    assert choose([first, third], first, 0.0, 1.0) is first
    assert choose([first, third], first, 1.0 - DWELL, 1.0) is third


def test_untrusted_path_is_never_chosen() -> None:
    direct, relay = trusted_path(DIRECT, 0.001), trusted_path(RELAY, 0.04)
    later = 1.0 + TRUST + 0.1
    assert choose([direct], direct, 0.0, later) is None
    relay.last_proof = later
    assert choose([direct, relay], direct, 0.0, later) is relay


def test_lan_path_wins_over_the_same_path_through_the_router() -> None:
    outside, inside = trusted_path(DIRECT, 0.001), trusted_path(UdpEndpoint("192.168.1.7", 41820), 0.001)
    assert choose([outside, inside], None, 0.0, 1.0) is inside
