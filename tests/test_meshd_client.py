"""A client and a real rendezvous core, with delay, loss and NATs between."""

from __future__ import annotations

import pytest

from crossedge.lab.chance import Chance
from crossedge.meshd.client_channel import COOKIE_TIME, MAX_QUEUE
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
    StaleSequence,
    StateChanged,
    Synced,
)
from crossedge.meshd.client_requests import MAX_REQUESTS
from crossedge.rendezvous.settings import SourceLimits
from crossedge.wire import messages as m
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey, PairKeys, seal
from crossedge.wire.record import Candidate, CandidateKind, Record
from tests.meshd_client_world import PORT, STUN, World

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


# --- Numbers and the time -----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1.7e9, 365 * 86_400.0], ids=["1970", "a year ahead"])
def test_a_node_with_a_wrong_clock_gets_its_peers_and_is_listed(offset: float) -> None:
    world = World()
    other = world.node()
    world.settle()
    node = world.node()
    node.host.detach()
    node.clock_offset += offset
    node.synchronised = False
    node.start()
    world.run(5.0)
    assert node.registered
    assert node.knows() == [other.name]
    assert other.knows() == [node.name]
    peer = other.directory.get(node.node_id)
    assert peer is not None
    assert abs(peer.record.issued - other.clock.issuing(world.net.now)) < 60


@pytest.mark.parametrize("first", [-1.7e9, 0.0, 365 * 86_400.0])
@pytest.mark.parametrize("second", [-1.7e9, 0.0, 365 * 86_400.0])
def test_a_node_whose_numbers_were_lost_is_shown_its_newest_record_and_comes_back(
    first: float, second: float
) -> None:
    world = World()
    node = world.node()
    node.host.detach()
    node.synchronised = False
    right = node.clock_offset
    node.clock_offset = right + first
    node.start()
    world.run(30.0)
    assert node.registered
    node.kill()
    node.bounds = [0]
    node.clock_offset = right + second
    node.start()
    world.settle(5.0)
    assert [type(event) for event in node.of(StaleSequence)] in ([], [StaleSequence])


def test_only_a_record_of_our_own_raises_our_numbers() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(2.0)
    peer = node.directory.get(other.node_id)
    assert peer is not None
    forged = Record(
        node_id=node.node_id,
        certificate=node.certificate.fingerprint,
        control_key=node.control_key.public,
        seq=2**63,
        issued=1,
        expires=2,
    ).sign(other.signing)
    for record in (peer.record.encode(), forged.encode(), b"", b"nonsense" * 20):
        answer_next(world, record=record)
        node.client.record_changed(world.net.now)
        node.host.wake()
        world.run(3.0)
    assert node.sequence.last < 2**60
    assert not node.of(StaleSequence)
    assert node.registered


def answer_next(world: World, *, code: str = "stale-sequence", record: bytes = b"") -> None:
    """Let the rendezvous refuse the next registration."""

    def refuse(message: m.Message) -> m.Message | None:
        if not isinstance(message, m.Register):
            return None
        world.server.tamper = None
        return m.Error(id=message.id, code=code, detail="as the test says", record=record)

    world.server.tamper = refuse


def test_refusal_is_told_and_tried_again_later() -> None:
    world = World()
    node = world.node()
    answer_next(world, code="foreign-network")
    world.run(2.0)
    assert node.client.state is ClientState.REFUSED
    [changed] = node.of(StateChanged)
    assert isinstance(changed, StateChanged)
    assert changed.why == "foreign-network: as the test says"
    world.run(10.0)
    assert node.registered


def test_revoked_node_is_refused_and_does_not_hammer() -> None:
    world = World()
    node = world.node()
    world.run(5.0)
    world.server.running.set_blocklist(world.make_blocklist(2, {node.name: 2}).encode(), world.net.now)
    world.run(300.0)
    assert node.client.state is ClientState.REFUSED
    assert node.client.sent["Register"] < 20


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


# --- Strangers ----------------------------------------------------------------------------------------


def test_what_others_send_is_refused_or_counted() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(2.0)
    client, now = node.client, world.net.now
    source = world.server.endpoint
    server, ours = world.server.key, node.control_key.public
    good = PairKeys.derive(server, ours)
    nonce = bytes(24)

    def sealed(message: m.Message, pair: PairKeys = good) -> bytes:
        return seal(m.encode(message), pair, nonce)

    notify = m.Notify(epoch=client.epoch, version=1)
    assert not client.receive(sealed(notify, PairKeys.derive(other.control_key, ours)), source, now)
    assert not client.receive(bytes.fromhex("ce010200") + bytes(72), source, now)  # answers nothing of ours
    torn = sealed(notify)[:-1] + b"\0"
    assert client.receive(torn, source, now)
    elsewhere = sealed(notify, PairKeys.derive(server, other.control_key.public))
    assert client.receive(elsewhere, source, now)
    assert client.receive(
        sealed(
            m.Registered(id=99, observed=source, lease=9, keepalive=9.0, epoch=1, version=1, unix_time=0.0)
        ),
        source,
        now,
    )
    assert client.receive(sealed(m.Ping(id=5, seq=5)), source, now)
    assert client.receive(bytes.fromhex("ce010100") + client.public_key, source, now)
    assert client.dropped == {"bad-mac1": 2, "unasked": 2, "truncated": 1}


def test_our_own_message_reflected_is_not_taken() -> None:
    world = World()
    node = world.node()
    world.run(2.0)
    node.client.find_node(node.node_id, world.net.now)
    item = node.client.poll_transmit()
    assert item is not None
    assert not node.client.receive(item.datagram, world.server.endpoint, world.net.now)


def test_replayed_notifications_of_an_earlier_life_move_nothing() -> None:
    world = World()
    node = world.node()
    world.run(2.0)
    old = node.client.epoch
    world.server.kill()
    world.server.start()
    world.run(6.0)
    assert node.client.epoch != old
    pair = PairKeys.derive(world.server.key, node.control_key.public)
    before = node.client.sent["Register"]
    for n in range(50):
        datagram = seal(m.encode(m.Notify(epoch=old, version=n)), pair, world.net.random(24))
        node.client.receive(datagram, world.server.endpoint, world.net.now)
        node.host.wake()
        world.run(0.1)
    assert node.client.sent["Register"] == before
    assert node.client.dropped["old-epoch"] == 50


def test_notifications_of_ever_new_epochs_cost_one_registration_a_second() -> None:
    world = World()
    node = world.node()
    world.run(2.0)
    pair = PairKeys.derive(world.server.key, node.control_key.public)
    before = node.client.sent["Register"]
    for n in range(100):
        datagram = seal(m.encode(m.Notify(epoch=n + 1, version=0)), pair, world.net.random(24))
        node.client.receive(datagram, world.server.endpoint, world.net.now)
        node.host.wake()
        world.run(0.05)
    assert node.client.sent["Register"] - before <= 6
    assert node.registered


def test_absurd_versions_do_not_make_us_pull_for_ever() -> None:
    world = World()
    node = world.node()
    world.run(2.0)
    pair = PairKeys.derive(world.server.key, node.control_key.public)
    before = node.client.sent["Pull"]
    notify = m.Notify(epoch=node.client.epoch, version=2**63)
    node.client.receive(seal(m.encode(notify), pair, bytes(24)), world.server.endpoint, world.net.now)
    node.host.wake()
    world.run(60.0)
    assert node.client.sent["Pull"] - before <= 3


def mad_answer(message: m.Message, chance: Chance) -> m.Message:
    """Return something well-formed and authentic that makes no sense."""
    id_ = getattr(message, "id", 0)
    somewhere = UdpEndpoint("192.0.2.66", 1 + chance.below(65_535))
    number = chance.bits() >> chance.below(64)
    junk = chance.token(chance.below(300))
    codes = ("stale-sequence", "unregistered", "digests-needed", "unknown-channel", "no-such-code")
    answers: list[m.Message] = [
        m.Registered(
            id=id_,
            observed=somewhere,
            lease=chance.below(1000),
            keepalive=chance.uniform() * 1e6,
            epoch=number,
            version=number,
            unix_time=chance.uniform() * 4e9,
        ),
        m.KeepaliveReply(id=id_, observed=somewhere, epoch=number, version=number, keepalive=0.0),
        m.Page(
            id=id_,
            epoch=chance.below(3),
            version=number,
            items=((junk, junk),),
            gone=(chance.token(16),),
            more=chance.below(2) == 0,
            index=chance.below(20),
            next=chance.token(16) if chance.below(2) else b"",
        ),
        m.Found(id=id_, record=junk, certificate=junk),
        m.CallReply(id=id_, status="ok", channel=chance.below(1 << 48)),
        m.Bound(id=id_, channel=chance.below(1 << 48), observed=somewhere),
        m.Error(id=id_, code=codes[chance.below(len(codes))], record=junk),
        m.BlocklistPart(id=id_, serial=number, total=chance.below(1 << 20), offset=0, data=junk),
        m.Notify(epoch=chance.below(4), version=number),
    ]
    return answers[chance.below(len(answers))]


@pytest.mark.parametrize("seed", range(10))
def test_a_mad_rendezvous_cannot_break_us_or_make_us_busy(seed: int) -> None:
    world = World(seed=seed)
    node, other = world.node(), world.node()
    world.run(3.0)
    chance = Chance(f"mad {seed}")
    world.server.tamper = lambda message: mad_answer(message, chance)
    before = sum(node.client.sent.values())
    for _ in range(30):
        node.client.call(other.node_id, b"x", world.net.now)
        node.client.find_node(other.node_id, world.net.now)
        node.client.fetch_blocklist(0, world.net.now)
        node.host.wake()
        world.run(10.0)
    assert sum(node.client.sent.values()) - before < 300 * 20
    assert node.knows() == [other.name]
    world.server.tamper = None
    world.run(90.0)
    assert node.registered


def test_nothing_is_ever_sent_anywhere_but_to_the_rendezvous() -> None:
    world = World(loss=0.1)
    nodes = [world.node() for _ in range(3)]
    seen = set()
    world.net.watchers.append(lambda packet, _: seen.add((packet.origin.name, packet.destination)))
    world.run(60.0)
    assert {where for who, where in seen if who in {n.host.name for n in nodes}} == {
        (world.server.endpoint.host, STUN)
    }


def test_queues_and_tables_are_bounded() -> None:
    world = World()
    node, other = world.node(), world.node()
    world.run(2.0)
    for _ in range(2 * MAX_REQUESTS):
        node.client.call(other.node_id, b"x", world.net.now)
    assert node.client.dropped["too-many-requests"] >= MAX_REQUESTS
    assert sum(1 for _ in iter(node.client.poll_transmit, None)) <= MAX_QUEUE
    world.run(20.0)
    assert node.registered
