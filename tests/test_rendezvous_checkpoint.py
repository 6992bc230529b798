"""A rendezvous that is started again: with the checkpoint of its last life, without it, or a damaged one."""

from __future__ import annotations

import pytest

from crossedge.wire import messages as m
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import WireError
from tests.rendezvous_client import Node, World, code, couple


@pytest.fixture
def world() -> World:
    return World()


def test_restarted_server_tells_the_nodes_of_the_checkpoint(world: World) -> None:
    alice, bob = couple(world)
    checkpoint = world.service.checkpoint()
    old_epoch = world.service.registry.epoch
    world.start()
    assert world.service.restore(checkpoint, world.now) == 2
    world.advance(0.1)
    (notify,) = alice.pushed(m.Notify)
    assert notify.epoch == world.service.registry.epoch != old_epoch
    assert len(bob.pushed(m.Notify)) == 1
    alice.register()
    world.received.clear()
    world.advance(5)
    assert [notify.epoch for notify in bob.pushed(m.Notify)] == [world.service.registry.epoch]
    world.received.clear()
    world.advance(60)
    assert world.received == []


def test_node_that_is_not_back_yet_outlives_a_second_restart(world: World) -> None:
    alice, _ = couple(world)
    for _ in range(2):
        checkpoint = world.service.checkpoint()
        world.start()
        assert world.service.restore(checkpoint, world.now) == 2
        alice.register()
    world.advance(200)
    alice.register()
    checkpoint = world.service.checkpoint()
    world.start()
    assert world.service.restore(checkpoint, world.now) == 1


def test_hints_are_paced_and_give_no_lease(world: World) -> None:
    nodes = [Node(world, f"n{number}", UdpEndpoint("198.51.100.1", 1000 + number)) for number in range(60)]
    for node in nodes:
        node.register()
    checkpoint = world.service.checkpoint()
    world.start()
    world.service.restore(checkpoint, world.now)
    world.received.clear()
    world.advance(0.05)
    assert 0 < len(world.received) <= 30
    world.advance(1.0)
    assert len(world.received) == 60
    assert world.service.registry.leases == {}
    assert code(nodes[0].keepalive()) == "unregistered"


@pytest.mark.parametrize(
    "damage", [b"", b"\x00", b"\xff" * 100, b"\x82\xa1v\x02\xa1l\x90", b"\x82\xa1v\x01\xa1l\x91\x01"]
)
def test_damaged_checkpoint_is_refused_and_does_no_harm(world: World, damage: bytes) -> None:
    with pytest.raises(WireError):
        world.service.restore(damage, world.now)
    world.advance(10)
    assert world.received == []
