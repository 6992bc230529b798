"""Pairs without traffic are measured: by whom, over which path, at what cost; with whole simulated nodes.

quiet (a NAT) ---+                     +--- easy (no NAT)
hard (a NAT that maps by destination) -+--- harder (likewise)          rendezvous in the cloud
"""

from __future__ import annotations

from collections import Counter

import pytest

from crossedge.lab.hosts import Packet
from crossedge.latency.report import PairState
from crossedge.meshd.farewell import PARTING_TIME
from crossedge.meshd.measuring import BURST, LINGER, Phase
from crossedge.meshd.peer import SESSION_IDLE
from tests.simworld import SimNode, SimWorld

PAIR_BYTES = 13_000
"""What one measurement of a pair may cost on the internet: both ends, both ways, and the rendezvous."""
KINDS = {"quiet": "port-restricted", "easy": None, "hard": "symmetric-random", "harder": "symmetric-random"}

PAIRS = len(KINDS) * (len(KINDS) - 1) // 2


def a_world(seed: int = 1, loss: float = 0.0) -> tuple[SimWorld, dict[str, SimNode]]:
    world = SimWorld(seed, measure=True, loss=loss)
    nodes = {name: world.node(name, kind) for name, kind in KINDS.items()}
    world.settle()
    return world, nodes


def state(a: SimNode, b: SimNode) -> PairState | None:
    pair = a.mesh.latency.pair(a.peer(b), a.world.net.now)
    return None if pair is None else pair.state


def quiet(world: SimWorld) -> bool:
    return not any(peer.active for node in world.nodes for peer in node.mesh.members.values())


@pytest.mark.parametrize("seed", range(3))
def test_every_pair_is_measured_over_the_path_that_data_would_take_and_sessions_end(seed: int) -> None:
    world, nodes = a_world(seed)
    world.run(30.0)
    expected = {}
    for a in nodes.values():
        for b in nodes.values():
            if a is b:
                continue
            # A node behind no NAT is reached directly by anyone, these others not by a NAT of their kind.
            easy = "easy" in (a.name, b.name)
            expected[a.name, b.name] = PairState.DIRECT if easy else PairState.RELAYED
    assert {(a.name, b.name): state(a, b) for a in nodes.values() for b in nodes.values() if a is not b} == (
        expected
    )
    assert world.wait(lambda: quiet(world), 30.0)  # nothing is kept open for it
    easy, near = nodes["easy"], nodes["quiet"]
    measured = near.mesh.latency.pair(near.peer(easy), world.net.now)
    assert measured is not None
    assert measured.minimum is not None
    world.ping(near, easy, count=2)
    pings = world.ping(near, easy, count=20)
    assert measured.minimum == pytest.approx(min(pings.rtts), abs=0.000_3)
    assert not any(node.dropped["inner-of-stock-peer"] for node in nodes.values())


def test_measurement_costs_little_and_proves_no_path_at_full_size() -> None:
    world, nodes = a_world()
    sizes: Counter[int] = Counter()
    total = 0

    def watch(packet: Packet, _: float) -> None:
        nonlocal total
        sizes[packet.size] += 1
        total += packet.size

    world.run(20.0)
    assert world.wait(lambda: quiet(world), 30.0)
    world.net.watchers.append(watch)
    for node in nodes.values():
        node.mesh.latency.prober.restart(world.net.now + 1e6)  # never
    world.run(40.0)
    kept, sizes = total, Counter()
    for node in nodes.values():
        node.mesh.latency.prober.restart(world.net.now)
    world.run(40.0)
    round_ = total - 2 * kept  # less what keeps the nodes registered
    assert sum(count for size, count in sizes.items() if size > 1100) == 0
    print("COST", round_ / PAIRS, kept)
    assert round_ / PAIRS < PAIR_BYTES


def test_first_packet_makes_an_ordinary_session_of_one_that_measures() -> None:
    world, nodes = a_world()
    a, b = nodes["quiet"], nodes["easy"]
    assert world.wait(lambda: a.peer(b).measuring.only and a.peer(b).up(world.net.now), 60.0)
    pings = world.ping(a, b, count=100, interval=0.02)
    assert pings.lost == []
    assert world.wait(lambda: a.is_direct(b) and b.is_direct(a), 3.0)
    assert not a.peer(b).measuring.only
    assert not b.peer(a).measuring.only
    world.run(5.0)
    assert a.peer(b).up(world.net.now)  # the end of the measurement did not end it


def measuring(phase: Phase, *, opener: str = "b", kind: str = "port-restricted") -> SimWorld:
    """Return two nodes with two rendezvous of which one measures the pair, at the beginning of a phase."""
    world = SimWorld(servers=2, measure=True)
    a, b = world.node("a", kind), world.node("b", kind)
    world.settle()
    world.run(2.0)
    for node in (a, b):
        node.mesh.latency.prober.restart(world.net.now + 1e6)  # not by itself
    assert world.wait(lambda: quiet(world), 30.0)
    first, second = (a, b) if opener == "a" else (b, a)
    first.peer(second).measuring.begin(world.net.now)
    first.host.wake()
    assert world.wait(lambda: first.peer(second).measuring.phase is phase, 10.0)
    return world


@pytest.mark.parametrize("opener", ["a", "b"])
@pytest.mark.parametrize("kind", ["port-restricted", "symmetric-random"], ids=["direct", "relayed"])
@pytest.mark.parametrize("early", [0.03, 0.02, 0.01, 0.0, -0.01, -0.02, -0.03, -0.05])
def test_packets_that_meet_the_end_of_a_measurement_are_not_lost(
    early: float, kind: str, opener: str
) -> None:
    world = measuring(Phase.LINGER, opener=opener, kind=kind)
    a, b = world.nodes
    world.run(LINGER - early)
    assert world.ping(a, b).lost == []
    for node, other in ((a, b), (b, a)):
        assert node.peer(other).up(world.net.now)


@pytest.mark.parametrize("opener", ["a", "b"])
@pytest.mark.parametrize("phase", [Phase.SCOUTING, Phase.BURST, Phase.LINGER])
@pytest.mark.parametrize("dead", [0, 1])
def test_first_packets_of_a_measured_pair_are_not_lost_with_a_rendezvous_that_dies(
    dead: int, phase: Phase, opener: str
) -> None:
    world = measuring(phase, opener=opener)
    a, b = world.nodes
    world.servers[dead].kill()
    assert world.ping(a, b).lost == []
    assert world.direct(a, b)


@pytest.mark.parametrize("early", [0.02, 0.01, 0.0, -0.01, -0.02])
def test_packets_that_meet_the_end_of_an_idle_session_are_not_lost(early: float) -> None:
    world = SimWorld()
    a, b = world.node("a"), world.node("b")
    world.settle()
    world.ping(a, b, count=1, wait=1.0)
    b.peer(a).last_data = world.net.now - 1.0  # b gives it up first
    world.run(SESSION_IDLE - 1.0 - early)
    assert a.peer(b).active
    assert world.ping(a, b).lost == []


def test_session_that_nobody_wants_any_more_is_closed_at_both_ends() -> None:
    world = measuring(Phase.LINGER)
    a, b = world.nodes
    assert world.wait(lambda: b.peer(a).parting, 2 * LINGER)
    world.run(PARTING_TIME + 0.1)
    assert quiet(world)
    assert not world.net.now < b.peer(a).farewell.until


def test_pair_with_traffic_is_measured_by_its_heartbeats() -> None:
    world, nodes = a_world()
    a, b = nodes["quiet"], nodes["easy"]
    world.run(30.0)
    world.ping(a, b, count=100, interval=0.1)
    pair = a.mesh.latency.pair(a.peer(b), world.net.now)
    assert pair is not None
    assert pair.state is PairState.DIRECT
    assert pair.age < 1.0
    assert pair.samples > BURST


def test_unreachable_is_told_from_unmeasured_and_is_no_number() -> None:
    world, nodes = a_world()
    a, b = nodes["quiet"], nodes["easy"]
    mend = world.net.cut("quiet", "easy")
    server = world.net.cut("server0", "easy")
    assert state(a, b) is None
    assert world.wait(lambda: state(a, b) is PairState.UNREACHABLE, 150.0)
    pair = a.mesh.latency.pair(a.peer(b), world.net.now)
    assert pair is not None
    assert (pair.minimum, pair.smoothed, pair.deviation) == (None, None, None)
    row = next(row for row in a.mesh.latency.rows(world.net.now) if row["name"] == "easy")
    assert row["state"] == "unreachable"
    assert row["rtt_ms"] is row["rtt_min_ms"] is row["jitter_ms"] is None
    mend()
    server()
    assert world.wait(lambda: state(a, b) is PairState.DIRECT, 150.0)


def test_pair_whose_traffic_gets_no_answer_any_more_is_unreachable_soon() -> None:
    world, nodes = a_world()
    a, b = nodes["quiet"], nodes["easy"]
    world.ping(a, b, count=50, interval=0.02)
    assert state(a, b) is PairState.DIRECT
    world.net.cut("quiet", "easy")
    world.net.cut("server0", "easy")
    world.ping(a, b, count=80, interval=0.2)
    assert state(a, b) is PairState.UNREACHABLE


def test_lossy_pair_is_measured_and_its_loss_is_told() -> None:
    world, nodes = a_world(loss=0.05)
    world.run(400.0)
    pairs = [pair for node in nodes.values() for pair in node.mesh.latency.pairs(world.net.now)]
    assert len(pairs) == len(nodes) * (len(nodes) - 1)
    assert sum(pair.state.measured for pair in pairs) >= len(pairs) - 1
    losses = [pair.loss for pair in pairs if pair.loss is not None]
    assert 0.02 < sum(losses) / len(losses) < 0.5


def test_node_that_moved_forgets_its_distances_and_measures_again() -> None:
    world, nodes = a_world()
    a, b = nodes["quiet"], nodes["easy"]
    world.run(30.0)
    assert state(a, b) is PairState.DIRECT
    a.move(world.router("port-restricted"))
    assert state(a, b) is None
    assert world.wait(lambda: state(a, b) is PairState.DIRECT, 60.0)


def test_nodes_learn_where_they_are_and_who_is_near_whom() -> None:
    world, nodes = a_world()
    world.run(200.0)
    for node in nodes.values():
        assert node.mesh.latency.vivaldi.samples >= 3 * (len(nodes) - 1) - 2
        assert len(node.mesh.latency.prober._places) == len(nodes) - 1
