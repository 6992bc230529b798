"""A client among strangers: replays, a rendezvous that went mad, and bounds of what they cost."""

from __future__ import annotations

import pytest

from crossedge.lab.chance import Chance
from crossedge.meshd.client_channel import MAX_QUEUE
from crossedge.meshd.client_requests import MAX_REQUESTS
from crossedge.wire import messages as m
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import PairKeys, seal
from tests.meshd_client_world import STUN, World


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
