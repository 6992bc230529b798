"""A client and a real rendezvous core, with delay, loss and NATs between."""

from __future__ import annotations

import pytest

from crossedge.meshd.client_channel import COOKIE_TIME
from crossedge.meshd.client_events import (
    BlocklistArrived,
    Bound,
    CallAnswered,
    Called,
    ClientState,
    Found,
    Observed,
    Registered,
    RequestFailed,
    StateChanged,
    Synced,
)
from crossedge.rendezvous.settings import SourceLimits
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey
from crossedge.wire.record import Candidate, CandidateKind, Record
from tests.meshd_client_world import PORT, World

HOUR = 3600.0


def test_a_node_registers_through_a_cookie_in_two_round_trips() -> None:
    world = World(delay=0.02)
    node = world.node()
    assert world.settle() < 0.2
    assert world.server.names() == ["node-1"]
    assert world.server.seen["Register"] == 2
    [registered] = node.of(Registered)
    [observed] = node.of(Observed)
    assert isinstance(registered, Registered)
    assert isinstance(observed, Observed)
    router = world.net.routers["router1"]
    assert observed.endpoint == registered.observed == UdpEndpoint(router.addresses[0], PORT)
    assert (observed.server, observed.host) == (node.client.server, world.server.endpoint.host)
    assert registered.restarted


def test_nodes_learn_of_each_other_within_a_second() -> None:
    world = World()
    nodes = [world.node() for _ in range(5)]
    world.settle()
    world.run(1.0)
    for node in nodes:
        assert node.knows() == sorted({other.name for other in nodes} - {node.name})
        assert isinstance(node.events[-1], Synced)


def test_keepalives_hold_the_lease_and_cost_little() -> None:
    world = World()
    node = world.node()
    world.run(600.0)
    assert world.server.names() == ["node-1"]
    assert node.client.sent["Register"] <= 4  # with and without a cookie
    assert 600 / 4 <= node.client.sent["Keepalive"] <= 600 / 3.5
    assert node.client.state is ClientState.REGISTERED
    assert node.client.rtt == pytest.approx(2 * 0.01, abs=0.05)


@pytest.mark.parametrize("loss", [0.05, 0.2])
@pytest.mark.parametrize("seed", range(5))
def test_everything_works_with_loss(loss: float, seed: int) -> None:
    world = World(seed=seed, loss=loss)
    nodes = [world.node() for _ in range(8)]
    world.settle(30.0)
    assert world.net.run_while(lambda: any(len(node.directory) < 7 for node in nodes), 60.0)


def test_the_record_is_renewed_long_before_it_ends() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(5 * HOUR)
    peer = other.directory.get(node.node_id)
    assert peer is not None
    assert peer.record.expires > other.clock.issuing(world.net.now) + HOUR / 4
    assert node.client.sent["Register"] < 16


# --- A rendezvous that dies ---------------------------------------------------------------------------


def test_dead_rendezvous_is_noticed_within_two_keepalives() -> None:
    world = World()
    node = world.node()
    world.run(20.0)
    world.server.kill()
    began = world.net.now
    assert world.net.run_while(lambda: node.client.state is ClientState.REGISTERED, 30.0)
    assert world.net.now - began < 2 * node.client.keepalive
    lost = node.of(StateChanged)[-1]
    assert isinstance(lost, StateChanged)
    assert (lost.old, lost.new) == (ClientState.REGISTERED, ClientState.LOST)
    assert str(world.server.endpoint) in lost.why


@pytest.mark.parametrize("down", [0.5, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("hints", [False, True], ids=["everything forgotten", "with a checkpoint"])
@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_restarted_rendezvous_has_all_its_nodes_back_within_five_seconds(
    down: float, hints: bool, loss: float
) -> None:
    world = World(loss=loss)
    nodes = [world.node() for _ in range(20)]
    world.settle(30.0)
    world.run(10.0)
    world.server.kill()
    world.run(down)
    world.server.start(hints=hints)
    began = world.net.now
    expected = sorted(node.name for node in nodes)
    assert world.net.run_while(lambda: world.server.names() != expected, 5.0)
    assert world.net.now - began < 5.0
    world.run(1.0)
    assert all(node.registered for node in nodes)


def test_restarted_rendezvous_with_a_checkpoint_has_its_nodes_back_at_once() -> None:
    world = World()
    for _ in range(20):
        world.node()
    world.settle()
    world.server.kill()
    world.server.start(hints=True)
    world.run(1.0)
    assert len(world.server.names()) == 20


def test_a_dead_rendezvous_is_tried_every_second_with_the_small_message() -> None:
    world = World()
    node = world.node()
    world.settle()
    world.server.kill()
    world.run(10.0)
    before = node.client.sent.copy()
    world.run(600.0)
    assert node.client.sent["Register"] == before["Register"]
    assert 600 <= node.client.sent["Keepalive"] - before["Keepalive"] <= 1200


def test_a_change_while_the_rendezvous_was_dead_is_not_lost() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(5.0)
    restore = world.net.cut("node1", "server0")
    world.run(10.0)
    static = Candidate(CandidateKind.STATIC, UdpEndpoint("192.0.2.77", 7))
    node.own.update(candidates=[static])
    node.client.record_changed(world.net.now)
    node.host.wake()
    world.run(20.0)
    restore()
    world.run(4.0)
    peer = other.directory.get(node.node_id)
    assert peer is not None
    assert peer.record.candidates == (static,)


def test_two_rendezvous_are_independent() -> None:
    world = World(servers=2)
    nodes = [world.node() for _ in range(4)]
    world.run(10.0)
    world.servers[0].kill()
    world.run(60.0)
    assert [client.state for client in nodes[0].clients] == [ClientState.LOST, ClientState.REGISTERED]
    late = world.node()
    world.run(2.0)
    assert len(late.knows()) == 4
    assert all(late.name in node.knows() for node in nodes)
    call = nodes[0].clients[1].call(late.node_id, b"x" * 100, world.net.now)
    nodes[0].host.wake()
    world.run(0.5)
    [called] = late.of(Called)
    [answered] = nodes[0].of(CallAnswered)
    assert isinstance(called, Called)
    assert isinstance(answered, CallAnswered)
    assert (answered.id, answered.status, answered.channel) == (call, "ok", called.channel)


def test_both_rendezvous_get_the_same_record() -> None:
    world = World(servers=2)
    node = world.node()
    world.run(5.0)
    records = {next(iter(server.running.registry.leases.values())).node.record for server in world.servers}
    assert len(records) == 1
    assert Record.decode(records.pop()).node_id == node.node_id


def test_a_node_that_is_gone_is_forgotten_when_its_record_has_run_out() -> None:
    world = World(limits=SourceLimits(lease=15))
    node, other = world.node(), world.node()
    world.run(5.0)
    node.kill()
    world.run(HOUR / 2)
    assert other.directory.is_listed(node.node_id)
    world.run(HOUR)  # its record has run out at the rendezvous
    assert not other.directory.is_listed(node.node_id)
    assert other.knows() == []


# --- Addresses ----------------------------------------------------------------------------------------


def test_moved_mapping_is_noticed_and_told() -> None:
    world = World()
    node = world.node("port-restricted-random")
    world.run(10.0)
    first = node.client.observed
    world.net.routers["router1"].reboot()
    world.run(6.0)
    assert node.client.observed != first
    observed = [event for event in node.events if isinstance(event, Observed)]
    assert [event.endpoint for event in observed] == [first, node.client.observed]
    [lease] = world.server.running.registry.leases.values()
    assert lease.endpoint == node.client.observed


def test_network_change_is_followed_at_once() -> None:
    world = World()
    node = world.node()
    world.run(10.0)
    world.net.router("other", region="home", link=world.link).join(node.host)
    node.client.network_changed(world.net.now)
    node.host.wake()
    world.run(0.2)
    assert node.client.observed is not None
    assert node.client.observed.host == world.net.routers["other"].addresses[0]


def test_changes_are_debounced() -> None:
    world = World()
    node = world.node()
    world.run(10.0)
    before = node.client.sent["Register"]
    for n in range(100):
        node.own.update(candidates=[Candidate(CandidateKind.STATIC, UdpEndpoint("192.0.2.77", n + 1))])
        node.client.record_changed(world.net.now)
        node.host.wake()
        world.run(0.05)
    assert node.client.sent["Register"] - before <= 7


def test_a_rendezvous_with_a_new_address_is_followed() -> None:
    world = World(servers=2)
    node = world.node()
    world.run(5.0)
    moved = world.servers[0]
    moved.kill()
    moved.host = world.net.host("moved", region="cloud")
    moved.start()
    node.clients[0].set_endpoint(moved.endpoint, world.net.now)
    node.host.wake()
    world.run(1.0)
    assert moved.names() == ["node-1"]


def test_control_key_is_rotated_without_a_gap() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(5.0)
    key = ControlKey.generate(world.net.random)
    node.own.update(control_key=key.public)
    node.client.set_control_key(key, world.net.now)
    node.host.wake()
    world.run(1.0)
    assert node.client.state is ClientState.REGISTERED
    assert len(world.server.names()) == 2
    assert other.directory.by_control_key(key.public) is not None


# --- Questions ----------------------------------------------------------------------------------------


def test_call_is_handed_over_with_a_channel_that_both_may_bind() -> None:
    world = World()
    caller, called = world.node(), world.node()
    world.run(2.0)
    caller.client.call(called.node_id, b"sealed for the other", world.net.now)
    caller.host.wake()
    world.run(0.2)
    [answered], [event] = caller.of(CallAnswered), called.of(Called)
    assert isinstance(answered, CallAnswered)
    assert isinstance(event, Called)
    assert (answered.target, answered.status) == (called.node_id, "ok")
    assert (event.caller, event.sealed) == (caller.node_id, b"sealed for the other")
    assert event.channel == answered.channel
    assert event.observed == caller.client.observed
    assert Record.decode(event.record).node_id == caller.node_id
    for node, peer_bound in ((caller, False), (called, True)):
        node.client.bind(event.channel, world.net.now)
        node.host.wake()
        world.run(0.2)
        [bound] = node.of(Bound)
        assert isinstance(bound, Bound)
        assert (bound.channel, bound.peer_bound) == (event.channel, peer_bound)
        assert bound.observed == node.client.observed


def test_calls_survive_loss() -> None:
    world = World(loss=0.2, seed=3)
    caller, called = world.node(), world.node()
    world.settle(30.0)
    world.run(5.0)
    for _ in range(20):
        assert caller.client.call(called.node_id, b"x" * 300, world.net.now) is not None
        caller.host.wake()
        world.run(0.5)
    world.run(10.0)
    assert len(caller.of(CallAnswered)) + len(caller.of(RequestFailed)) == 20
    assert len(caller.of(CallAnswered)) >= 19
    assert len(called.of(Called)) >= 15


def test_find_by_node_and_by_address() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(2.0)
    asked = [
        node.client.find_node(other.node_id, world.net.now),
        node.client.find_address(bytes([10, 160, 2, 99]), world.net.now),
        node.client.find_address(bytes([10, 99, 0, 1]), world.net.now),
    ]
    node.host.wake()
    world.run(0.5)
    found = {event.id: event for event in node.of(Found) if isinstance(event, Found)}
    ids = [id_ for id_ in asked if id_ is not None]
    assert len(ids) == len(asked)
    assert sorted(found) == sorted(ids)
    for id_ in ids[:2]:
        assert Record.decode(found[id_].record).node_id == other.node_id
        assert found[id_].certificate == other.certificate.encode()
    missing = found[ids[2]]
    assert (missing.record, missing.subject) == (b"", bytes([10, 99, 0, 1]))


def test_a_question_that_nobody_answers_fails_by_name() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(3.0)
    world.server.kill()
    id_ = node.client.call(other.node_id, b"x", world.net.now)
    node.host.wake()
    world.run(20.0)
    [failed] = node.of(RequestFailed)
    assert failed == RequestFailed(node.client.server, id_ or 0, "Call", "timeout", other.node_id)
    assert node.client.call(other.node_id, b"x", world.net.now) is None  # not registered now


def test_a_bind_to_a_channel_that_is_not_ours_fails_by_name() -> None:
    world = World()
    node = world.node()
    world.run(2.0)
    node.client.bind(12345, world.net.now)
    node.host.wake()
    world.run(0.5)
    [failed] = node.of(RequestFailed)
    assert isinstance(failed, RequestFailed)
    assert (failed.kind, failed.code) == ("Bind", "unknown-channel")
    assert int.from_bytes(failed.subject, "big") == 12345


@pytest.mark.parametrize("names", [0, 300])
def test_newer_blocklist_is_fetched_whole(names: int) -> None:
    world = World(loss=0.05)
    node = world.node()
    world.settle(10.0)
    revoked = {f"former-member-of-the-network-{n}": n + 1 for n in range(names)}
    newer = world.make_blocklist(7, revoked).encode()
    world.server.running.set_blocklist(newer, world.net.now)
    node.client.fetch_blocklist(1, world.net.now)
    node.host.wake()
    world.run(5.0)
    [arrived] = node.of(BlocklistArrived)
    assert isinstance(arrived, BlocklistArrived)
    assert arrived.encoded == newer
    assert node.directory.offer_blocklist(arrived.encoded, world.net.now)
    node.client.fetch_blocklist(7, world.net.now)
    node.host.wake()
    world.run(5.0)
    assert len(node.of(BlocklistArrived)) == 1


def test_cookie_is_kept_for_two_minutes_and_renewed_when_asked() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(2 * COOKIE_TIME + 10)
    node.client.find_node(other.node_id, world.net.now)
    node.host.wake()
    world.run(1.0)
    assert len(node.of(Found)) == 1
