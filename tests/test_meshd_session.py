"""Handshakes of two sessions: lost messages, retries, crossing initiations."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from crossedge.meshd.device import Device
from crossedge.meshd.noise import NoiseError
from crossedge.meshd.session import HandshakeFailed, Session, SessionUp
from tests.session_pair import INITIATION, KEYS, RESPONSE, TRANSPORT, Pair, data, lose_everything


@pytest.mark.parametrize("mesh", [False, True])
def test_handshake_brings_both_sides_up(mesh: bool) -> None:
    pair = Pair(mesh=mesh)
    pair.initiate(pair.alice)
    pair.run(1.0)
    assert [len(datagram) for _, datagram in pair.alice.sent] == [148, 32]
    assert [len(datagram) for _, datagram in pair.bob.sent] == [92]
    for node in (pair.alice, pair.bob):
        assert node.event_types() == [SessionUp]
        assert node.session.usable(pair.now)
        assert len(node.device.indices) == 1
        assert not node.device.waiting
        assert not node.device.dropped


def test_responder_sends_nothing_before_the_key_is_confirmed() -> None:
    pair = Pair()
    pair.lose = lambda sender, datagram: datagram[0] == TRANSPORT
    pair.initiate(pair.alice)
    pair.run(1.0)
    assert pair.alice.session.usable(pair.now)
    assert pair.bob.session.next is not None
    assert not pair.bob.session.usable(pair.now)
    assert pair.bob.events == []


def test_superframe_confirms_the_key_as_data_does() -> None:
    pair = Pair(mesh=True)
    pair.lose = lambda sender, datagram: datagram[0] == TRANSPORT
    pair.initiate(pair.alice)
    pair.run(1.0)
    keypair = pair.bob.session.next
    assert keypair is not None
    pair.bob.session.data_received(pair.now, 60_000, keypair)
    assert pair.bob.session.current is keypair
    assert pair.bob.session.poll_event() == SessionUp(keypair)


def test_queued_data_is_the_confirmation() -> None:
    pair = Pair()
    pair.send(pair.alice, data(1))
    pair.run(1.0)
    assert pair.bob.got == [data(1)]
    assert pair.alice.keepalives == []
    assert pair.bob.session.usable(pair.now)


def test_session_may_have_no_weak_key() -> None:
    device = Device(KEYS[0], random.Random(0).randbytes, lambda now: bytes(12))
    with pytest.raises(NoiseError):
        Session(device, bytes(32), now=0.0)


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_lossy_link_delays_the_session_and_does_not_prevent_it(mesh: bool, seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(mesh=mesh)
    pair.lose = lambda sender, datagram: rng.random() < 0.4
    pair.send(pair.alice, data(1))
    pair.run(80.0)
    pair.lose = lambda sender, datagram: False
    pair.send(pair.bob, data(2))
    pair.send(pair.alice, data(3))
    pair.run(20.0)
    assert data(2) in pair.alice.got
    assert data(3) in pair.bob.got


# --- Retries and giving up (paper, 6.4) ----------------------------------------------------------------


def gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def test_unanswered_initiation_is_retried_every_5_s_with_jitter_for_90_s() -> None:
    pair = Pair()
    pair.lose = lose_everything
    pair.initiate(pair.alice)
    pair.run(300.0)
    waits = gaps(pair.alice.times(INITIATION))
    assert all(5.0 <= wait <= 5.334 for wait in waits)
    assert len({round(wait, 4) for wait in waits}) > 10, "no jitter"
    assert 17 <= len(waits) <= 18
    assert pair.alice.event_types() == [HandshakeFailed]
    assert pair.alice.session.initiation is None
    assert not pair.alice.device.waiting


def test_each_retry_is_a_new_initiation() -> None:
    pair = Pair()
    pair.lose = lose_everything
    pair.initiate(pair.alice)
    pair.run(20.0)
    initiations = [datagram for _, datagram in pair.alice.sent]
    assert len({datagram[4:8] for datagram in initiations}) == len(initiations) == 4
    assert len({datagram[8:40] for datagram in initiations}) == 4
    assert len(pair.alice.device.waiting) == 1


def test_wish_for_a_session_keeps_the_handshake_alive() -> None:
    pair = Pair()
    pair.lose = lose_everything
    for _ in range(20):
        pair.send(pair.alice, data(0))
        pair.run(10.0)
    assert pair.alice.events == []
    assert all(wait >= 5.0 for wait in gaps(pair.alice.times(INITIATION)))
    pair.run(100.0)
    assert pair.alice.event_types() == [HandshakeFailed]


def test_mesh_retries_start_at_a_quarter_second() -> None:
    pair = Pair(mesh=True)
    pair.lose = lose_everything
    pair.initiate(pair.alice)
    pair.run(300.0)
    waits = gaps(pair.alice.times(INITIATION))
    for wait, least in zip(waits, [0.25, 0.5, 1.0, 2.0, *[5.0] * 100], strict=False):
        assert least <= wait <= 1.1 * least
    assert pair.alice.event_types() == [HandshakeFailed]
    assert pair.alice.times(INITIATION)[-1] - pair.alice.times(INITIATION)[0] < 90.0


def test_urgent_wish_restarts_the_mesh_retries_but_never_floods() -> None:
    pair = Pair(mesh=True)
    pair.lose = lose_everything
    pair.initiate(pair.alice)
    pair.run(20.0)
    pair.forget()
    for _ in range(50):
        pair.alice.session.initiate(pair.now, urgent=True)
        pair.drain(pair.alice)
    assert len(pair.alice.times(INITIATION)) == 1
    pair.run(0.9)
    assert len(pair.alice.times(INITIATION)) == 3


def test_initiation_may_be_sent_again_on_another_way_and_counts_once() -> None:
    pair = Pair(mesh=True)
    pair.initiate(pair.alice)
    initiation = pair.alice.session.initiation
    assert initiation is not None
    pair.deliver(pair.bob, initiation)
    pair.run(1.0)
    assert len(pair.bob.times(RESPONSE)) == 1
    assert pair.bob.device.dropped == {"replayed-initiation": 1}
    assert pair.alice.session.usable(pair.now)
    assert pair.alice.session.initiation is None


# --- Crossing initiations ------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [0.001, 0.03, 0.12, 0.3, 0.6])
def test_of_two_crossing_mesh_initiations_that_of_the_lower_key_wins(delay: float) -> None:
    pair = Pair(mesh=True, delay=delay)
    pair.send(pair.bob, data(1))
    pair.send(pair.alice, data(2))
    pair.run(5.0)
    assert pair.alice.got == [data(1)]
    assert pair.bob.got == [data(2)]
    assert pair.alice.session.current is not None
    assert pair.bob.session.current is not None
    assert pair.alice.session.current.remote_index == pair.bob.session.current.local_index
    if delay < 0.12:
        assert pair.alice.session.current.initiator
        assert pair.alice.event_types() == pair.bob.event_types() == [SessionUp]
        assert not pair.bob.session.current.initiator
        assert pair.alice.device.dropped == {"crossed-initiation": 1}
        assert len(pair.alice.times(INITIATION)) == len(pair.bob.times(INITIATION)) == 1
        assert pair.bob.session.handshake_at == pytest.approx(1000.0 + 3 * delay)


@pytest.mark.parametrize("seed", range(5))
def test_crossing_mesh_initiations_survive_loss(seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(mesh=True, delay=0.03)
    pair.lose = lambda sender, datagram: rng.random() < 0.3
    pair.initiate(pair.bob)
    pair.initiate(pair.alice)
    pair.run(20.0)
    pair.lose = lambda sender, datagram: False
    pair.send(pair.alice, data(1))
    pair.send(pair.bob, data(2))
    pair.run(6.0)
    assert (pair.bob.got, pair.alice.got) == ([data(1)], [data(2)])


def crossing(seed: int) -> Pair:
    """Let both begin again and again while every message takes two ways, one of them slow; then be calm."""
    rng = random.Random(seed)
    pair = Pair(mesh=True)
    slow = rng.choice((0.02, 0.05, 0.3))
    pair.ways = lambda: (rng.uniform(0.001, 0.01), rng.uniform(0.01, slow))
    for _ in range(rng.randint(2, 5)):
        pair.initiate(rng.choice((pair.alice, pair.bob)))
        pair.run(rng.uniform(0.0, 0.1))
    pair.run(2.0)
    return pair


def test_sides_whose_messages_overtook_each_other_come_to_one_keypair_when_the_higher_key_follows() -> None:
    parted = 0
    for seed in range(300):
        pair = crossing(seed)
        alice, bob = pair.alice.session, pair.bob.session
        assert alice.current is not None
        assert bob.current is not None
        parted += alice.current.remote_index != bob.current.local_index
        if alice.current.remote_index == bob.current.local_index:
            assert alice.follow(bob.current.remote_index, pair.now)
        else:
            assert not alice.follow(bob.current.remote_index, pair.now)
        assert bob.follow(alice.current.remote_index, pair.now)
        pair.send(pair.alice, data(1))
        pair.send(pair.bob, data(2))
        pair.run(1.0)
        assert (pair.bob.got, pair.alice.got) == ([data(1)], [data(2)])
        assert alice.current.remote_index == bob.current.local_index
    assert parted, "the test shows what it is for"


def test_nobody_follows_to_a_keypair_that_is_unknown_or_too_old() -> None:
    pair = Pair(mesh=True)
    pair.connect()
    pair.run(130.0)
    pair.initiate(pair.bob)
    pair.run(1.0)
    bob = pair.bob.session
    before, old = bob.current, bob.previous
    assert before is not None
    assert old is not None
    assert not bob.follow(0x1234567, pair.now)
    pair.now = old.created + 180.0
    assert not bob.follow(old.local_index, pair.now)
    assert bob.current is before


def test_retired_keys_open_what_is_on_its_way_and_are_current_again_by_data_alone() -> None:
    pair = Pair(mesh=True)
    pair.connect()
    alice, bob = pair.alice.session, pair.bob.session
    kept = bob.current
    assert kept is not None
    bob.retire()
    assert not bob.usable(pair.now)
    alice.keepalive(pair.now)
    pair.drain(pair.alice)
    pair.run(0.1)
    assert not bob.follow(kept.local_index, pair.now)
    assert bob.current is None  # a keepalive wants nothing
    pair.send(pair.alice, data(1))
    pair.run(0.1)
    assert pair.bob.got == [data(1)]
    assert bob.current is kept
    assert pair.bob.event_types() == [SessionUp]
    pair.send(pair.bob, data(2))
    pair.run(0.1)
    assert pair.alice.got == [data(2)]


def test_who_retired_its_keys_needs_a_handshake_to_send() -> None:
    pair = Pair(mesh=True)
    pair.connect()
    pair.bob.session.retire()
    pair.send(pair.bob, data(1))
    pair.run(1.0)
    assert pair.alice.got == [data(1)]
    assert len(pair.bob.times(INITIATION)) == 1


def test_lower_key_whose_initiations_do_not_arrive_answers_within_2_s() -> None:
    """Its way to the peer may be dead while the peer knows another one to it: no stalemate."""
    pair = Pair(mesh=True, delay=0.03)
    pair.lose = lambda sender, datagram: sender is pair.alice and datagram[0] == INITIATION
    pair.initiate(pair.alice)
    pair.initiate(pair.bob)
    pair.run(2.2)
    assert pair.alice.session.usable(pair.now)
    assert pair.bob.session.usable(pair.now)


def test_crossing_stock_initiations_end_in_one_session() -> None:
    pair = Pair(mesh=False, delay=0.03)
    pair.send(pair.bob, data(1))
    pair.send(pair.alice, data(2))
    pair.run(12.0)
    assert pair.alice.got == [data(1)]
    assert pair.bob.got == [data(2)]
    assert pair.alice.session.current is not None
    assert pair.bob.session.current is not None
    assert pair.alice.session.current.remote_index == pair.bob.session.current.local_index
