"""A node knows whether it reaches anybody: it checks before it says so, and no more than it has to."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from crossedge.meshd import events as ev
from crossedge.meshd.peer import SESSION_IDLE
from crossedge.meshd.reach import CHECK_TIME, CHECKS, LOOK, Reach
from tests.simworld import SimNode, SimWorld

WINDOW = 60.0


@dataclass
class Peer:
    """One that answers checks after a moment, if it is in reach."""

    proved_at: float | None = None
    reachable: bool = True
    checked: list[float] = field(default_factory=list)

    def check(self, now: float) -> None:
        self.checked.append(now)
        if self.reachable:
            self.proved_at = now + 0.1


def run(reach: Reach, peers: dict[bytes, Peer], start: float, seconds: float) -> dict[float, bool]:
    """Look whenever it is due; return the verdicts by the time they were reached."""
    now, changes = max(start, reach.deadline), {}
    while now < start + seconds:
        if reach.look(peers, None, now):
            changes[now] = reach.cut_off
        assert reach.deadline > now
        now = reach.deadline
    return changes


def crowd(number: int, **how: bool) -> dict[bytes, Peer]:
    return {bytes([each]): Peer(**how) for each in range(number)}


def test_a_network_of_one_node_is_fine() -> None:
    reach = Reach(b"\0", WINDOW, 0.0)
    assert run(reach, {}, 0.0, 10_000.0) == {}


def test_silence_without_a_failed_check_is_no_verdict() -> None:
    """As after a host slept for an hour."""
    reach, peers = Reach(b"\0", WINDOW, 0.0), crowd(3)
    run(reach, peers, 0.0, 100.0)
    assert not reach.look(peers, None, 4000.0)
    assert not reach.cut_off
    assert run(reach, peers, 4000.0, 100.0) == {}


def test_reachable_peers_are_checked_one_by_one_and_only_where_proof_is_old() -> None:
    reach, peers = Reach(b"\0", WINDOW, 0.0), crowd(50)
    assert run(reach, peers, 0.0, 3600.0) == {}
    assert sum(len(peer.checked) for peer in peers.values()) <= 3600 / (WINDOW / 2)
    assert sum(bool(peer.checked) for peer in peers.values()) == 1


def test_cut_off_within_the_window_and_a_check_and_back_with_the_first_proof() -> None:
    reach, peers = Reach(b"\0", WINDOW, 0.0), crowd(3)
    run(reach, peers, 0.0, 100.0)
    last = max(peer.proved_at or 0.0 for peer in peers.values())
    for peer in peers.values():
        peer.reachable = False
    ((when, verdict),) = run(reach, peers, last, 300.0).items()
    assert verdict
    assert WINDOW <= when - last <= WINDOW + 1.0
    peers[b"\1"].reachable = True
    now = reach.deadline
    ((when, verdict),) = run(reach, peers, now, 60.0).items()
    assert not verdict
    assert when - now <= CHECK_TIME + 1.0


def test_checks_are_bounded_and_come_to_everybody_while_the_last_that_was_reached_is_always_among_them() -> (
    None
):
    reach, peers = Reach(b"\0", WINDOW, 0.0), crowd(40, reachable=False)
    peers[b"\7"].proved_at = 5.0
    reach.appeared(0.0)
    run(reach, peers, 0.0, 35.0 + CHECK_TIME + 40 / (CHECKS - 1) * (CHECK_TIME + 2 * LOOK))
    started = sorted(when for peer in peers.values() for when in peer.checked)
    for when in started:
        assert sum(when <= other < when + CHECK_TIME for other in started) <= CHECKS
    assert all(peer.checked for peer in peers.values())
    times = peers[b"\7"].checked
    assert max(b - a for a, b in pairwise(times)) <= CHECK_TIME + 1.0


def test_a_stock_peer_that_is_heard_counts_and_one_that_is_silent_makes_nobody_cut_off() -> None:
    reach, peers = Reach(b"\0", WINDOW, 0.0), crowd(1, reachable=False)
    for now in range(0, 400, 10):
        reach.look(peers, float(now), float(now))
    assert not reach.cut_off
    assert run(reach, {}, 400.0, 400.0) == {}


# Whole nodes


def world_of(count: int) -> tuple[SimWorld, list[SimNode]]:
    world = SimWorld(7)
    nodes = [world.node(f"n{number}") for number in range(count)]
    world.settle(30.0)
    return world, nodes


def verdicts(node: SimNode) -> list[tuple[float, bool]]:
    return [(when, event.cut_off) for when, event in node.events if isinstance(event, ev.ReachChanged)]


def test_an_idle_mesh_whose_nodes_never_talk_is_never_cut_off() -> None:
    world, nodes = world_of(4)
    world.run(3 * SESSION_IDLE)
    assert [verdicts(node) for node in nodes] == [[]] * 4
    assert all(any(peer.proved_at for peer in node.mesh.members.values()) for node in nodes)


@pytest.mark.parametrize("talked", [True, False], ids=["with-sessions", "idle"])
def test_peers_that_all_die_make_a_node_cut_off_within_the_window_and_one_that_is_back_ends_it(
    talked: bool,
) -> None:
    world, (alone, *others) = world_of(4)
    if talked:
        for other in others:
            world.ping(alone, other, count=10)
    world.run(40.0)
    died = world.net.now
    for other in others:
        other.kill()
    world.run(80.0)
    ((when, cut_off),) = verdicts(alone)
    print("cut off after", when - died)
    assert cut_off
    assert when - died <= WINDOW + 1.0
    assert any(
        "pods here are cut off" in each["what"] for each in alone.mesh.status(world.net.now)["problems"]
    )
    world.run(600.0)
    back = world.net.now
    others[0].start()
    assert world.wait(lambda: len(verdicts(alone)) == 2, 20.0)
    print("back after", world.net.now - back)
    assert world.net.now - back < 8.0
    assert not alone.mesh.reach.cut_off


def test_a_node_whose_own_uplink_fails_is_cut_off_and_back() -> None:
    world, (alone, other) = world_of(2)
    world.ping(alone, other, count=10)
    mends = [world.net.cut("n0", "n1"), world.net.cut("n0", "server0")]
    world.run(90.0)
    assert [cut_off for _, cut_off in verdicts(alone)] == [True]
    for mend in mends:
        mend()
    back = world.net.now
    assert world.wait(lambda: not alone.mesh.reach.cut_off, 30.0)
    print("back after", world.net.now - back)
    assert world.net.now - back < 10.0
