"""A client whose clock is wrong or whose numbers were lost, and what it makes of refusals."""

from __future__ import annotations

import pytest

from crossedge.meshd.client_events import (
    ClientState,
    StaleSequence,
    StateChanged,
)
from crossedge.wire import messages as m
from crossedge.wire.record import Record
from tests.meshd_client_world import World


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
