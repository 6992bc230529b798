"""Calls, the channels that they give, and what a channel forwards; against a virtual clock."""

from __future__ import annotations

import pytest

from crossedge.rendezvous.settings import RelayLimits, SourceLimits
from crossedge.wire import messages as m
from crossedge.wire.relay import pack_header
from tests.rendezvous_client import ALICE, BOB, ELSEWHERE, Node, World, code, couple, only


@pytest.fixture
def world() -> World:
    return World()


def test_call_reaches_the_target_and_gives_both_the_same_channel(world: World) -> None:
    alice, bob = couple(world)
    reply = alice.call(bob, b"for bob's eyes")
    assert reply.status == "ok"
    (called,) = bob.pushed(m.Called)
    assert called == m.Called(
        caller=alice.id,
        caller_seq=alice.record.seq,
        channel=reply.channel,
        observed=ALICE,
        sealed=b"for bob's eyes",
        record=alice.record.encode(),
    )
    assert bob.call(alice).channel == reply.channel


def test_largest_call_reaches_the_target(world: World) -> None:
    alice, bob = couple(world)
    assert alice.call(bob, bytes(m.MAX_SEALED)).status == "ok"
    (called,) = bob.pushed(m.Called)
    assert called.sealed == bytes(m.MAX_SEALED)


def test_call_to_nobody_or_oneself_is_unknown(world: World) -> None:
    alice, _ = couple(world)
    assert alice.call(Node(world, "absent")).status == "unknown"
    assert alice.call(alice).status == "unknown"
    assert world.received == []


def test_replayed_call_does_not_reach_the_target_again(world: World) -> None:
    alice, bob = couple(world)
    request = alice.seal(m.Call(id=1, seq=alice.next_seq(), target=bob.id, sealed=b"x"))
    world.send(request, ALICE)
    world.send(request, ALICE)
    world.send(request, ELSEWHERE)
    assert len(bob.pushed(m.Called)) == 1
    assert world.service.status(world.now)["refused"]["stale-sequence"] == 1


def test_call_is_busy_where_no_channel_is_left() -> None:
    world = World(relay=RelayLimits(channels=0))
    alice, bob = couple(world)
    assert alice.call(bob).status == "busy"
    assert bob.pushed(m.Called) == []


def test_node_is_not_called_more_often_than_its_limit() -> None:
    world = World(limits=SourceLimits(called_rate=1))
    alice, bob = couple(world)
    assert [alice.call(bob).status for _ in range(12)] == ["ok"] * 10 + ["busy"] * 2


def test_relay_forwards_after_a_call_with_no_bind(world: World) -> None:
    alice, bob = couple(world)
    header = pack_header(alice.call(bob).channel)
    world.received.clear()
    world.send(header + b"to bob", ALICE)
    world.send(header + b"to alice", BOB)
    world.send(header + b"from a stranger", ELSEWHERE)
    assert world.received == [(header + b"to bob", BOB, 0), (header + b"to alice", ALICE, 0)]
    assert world.service.drops()["relay-not-a-side"] == 1


def test_bind_moves_the_own_side_and_tells_of_the_other(world: World) -> None:
    alice, bob = couple(world)
    channel = alice.call(bob).channel
    bound = only(alice.bind(channel, source=ELSEWHERE), m.Bound)
    assert (bound.channel, bound.observed, bound.peer_bound) == (channel, ELSEWHERE, False)
    assert only(bob.bind(channel), m.Bound).peer_bound
    world.received.clear()
    world.send(pack_header(channel) + b"x", BOB)
    world.send(pack_header(channel) + b"x", ALICE)
    assert [destination for _, destination, _ in world.received] == [ELSEWHERE]


def test_replayed_bind_moves_nothing(world: World) -> None:
    alice, bob = couple(world)
    channel = alice.call(bob).channel
    alice.bind(channel, source=ELSEWHERE)
    captured = alice.seal(m.Bind(id=1, seq=alice.next_seq(), channel=channel))
    world.send(captured, ELSEWHERE)
    alice.cookie = None
    alice.bind(channel)
    world.received.clear()
    world.send(captured, ELSEWHERE)
    world.send(pack_header(channel) + b"x", BOB)
    assert world.received[-1][1] == ALICE


def test_bind_of_a_channel_that_is_not_there_is_refused_by_name(world: World) -> None:
    alice, bob = couple(world)
    carol = Node(world, "carol", ELSEWHERE)
    carol.register()
    channel = alice.call(bob).channel
    assert code(carol.bind(channel)) == "unknown-channel"
    assert code(alice.bind(channel ^ 1)) == "unknown-channel"


def test_channel_follows_a_node_that_restarted_once_there_is_a_call(world: World) -> None:
    alice, bob = couple(world)
    channel = alice.call(bob).channel
    alice.bind(channel)
    alice.new_key()
    alice.endpoint = ELSEWHERE
    alice.record = alice.sign()
    alice.register()
    assert alice.call(bob).channel == channel
    world.received.clear()
    world.send(pack_header(channel) + b"x", ELSEWHERE)
    assert world.received[-1][1] == BOB


# Trains


def test_train_is_sorted_into_relay_runs_and_messages(world: World) -> None:
    alice, bob = couple(world)
    channel = alice.call(bob).channel
    control = alice.seal(m.Keepalive(id=1, seq=alice.next_seq(), epoch=0, version=0))
    size = len(control)
    relayed = pack_header(channel) + bytes(size - 8)
    train = memoryview(relayed * 2 + control + relayed * 3 + relayed[:50])
    runs = world.service.receive_train(train, size, ALICE, 0, world.now)
    assert [(run.start // size, run.end - run.start, run.destination) for run in runs] == [
        (0, 2 * size, BOB),
        (3, 3 * size + 50, BOB),
    ]
    answers = [alice.take(reply) for reply in world.collect(ALICE)]
    assert [type(answer) for answer in answers] == [m.KeepaliveReply]
