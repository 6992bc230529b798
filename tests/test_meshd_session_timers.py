"""Rekeying, keepalives and the end of keys: every timer rule, after 120 virtual seconds or 540."""

from __future__ import annotations

import random

import pytest

from crossedge.meshd.constants import REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES
from crossedge.meshd.keypair import CounterExhaustedError, seal_transport
from crossedge.meshd.session import KeypairRotated, SessionExpired, SessionUp
from tests.session_pair import INITIATION, RESPONSE, Pair, data, lose_everything

# --- Rekeying (paper, 6.2) -----------------------------------------------------------------------------


def test_initiator_rekeys_after_120_s_when_it_sends() -> None:
    pair = Pair()
    pair.connect()
    pair.run(118.0)
    pair.send(pair.alice, data(1))
    assert pair.alice.times(INITIATION) == []
    pair.run(1.1)
    pair.send(pair.alice, data(2))
    assert len(pair.alice.times(INITIATION)) == 1
    pair.run(1.0)
    assert pair.alice.event_types() == pair.bob.event_types() == [KeypairRotated]
    assert pair.bob.got == [data(1), data(2)]


def test_responder_does_not_rekey_by_time() -> None:
    pair = Pair()
    pair.connect()
    pair.run(150.0)
    pair.send(pair.bob, data(1))
    pair.run(1.0)
    assert pair.bob.times(INITIATION) == []


def test_initiator_that_only_receives_rekeys_once_after_165_s() -> None:
    pair = Pair()
    pair.connect()
    pair.run(163.0)
    pair.send(pair.bob, data(1))
    pair.run(0.5)
    assert pair.alice.times(INITIATION) == []
    pair.run(1.0)
    pair.lose = lambda sender, datagram: sender is pair.alice
    pair.send(pair.bob, data(2))
    pair.send(pair.bob, data(3))
    pair.run(1.0)
    assert len(pair.alice.times(INITIATION)) == 1
    assert pair.alice.got == [data(1), data(2), data(3)]


def test_quiet_session_is_not_renewed() -> None:
    pair = Pair()
    pair.connect()
    pair.run(1000.0)
    assert pair.alice.sent == pair.bob.sent == []


def test_either_side_rekeys_after_so_many_messages() -> None:
    for name in ("send_counter", "chunk_counter"):
        pair = Pair()
        pair.connect()
        pair.run(10.0)
        assert pair.bob.session.current is not None
        setattr(pair.bob.session.current, name, REKEY_AFTER_MESSAGES + 1)
        pair.send(pair.bob, data(1))
        assert len(pair.bob.times(INITIATION)) == 1
        pair.run(1.0)
        assert pair.bob.event_types() == [KeypairRotated]


def test_no_counter_is_used_beyond_the_last() -> None:
    pair = Pair()
    pair.connect()
    keypair = pair.alice.session.current
    assert keypair is not None
    keypair.send_counter = REJECT_AFTER_MESSAGES - 1
    assert keypair.can_send(pair.now)
    assert keypair.reserve() == REJECT_AFTER_MESSAGES - 1
    assert not keypair.can_send(pair.now)
    with pytest.raises(CounterExhaustedError):
        keypair.reserve()


def test_keypair_is_rejected_after_180_s_in_both_directions() -> None:
    pair = Pair()
    pair.connect()
    keypair = pair.bob.session.current
    assert keypair is not None
    late = seal_transport(keypair, data(1))
    pair.run(178.9)
    assert pair.alice.session.usable(pair.now)
    pair.run(0.2)
    assert pair.alice.event_types() == [SessionExpired]
    assert not pair.alice.session.usable(pair.now)
    pair.deliver(pair.alice, late)
    assert pair.alice.got == []
    assert pair.alice.device.dropped == {"expired": 1}


def test_data_after_expiry_starts_a_new_session() -> None:
    pair = Pair()
    pair.connect()
    pair.run(200.0)
    pair.send(pair.bob, data(1))
    pair.run(1.0)
    assert pair.alice.got == [data(1)]
    assert pair.bob.event_types() == [SessionExpired, SessionUp]


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("starter", ["alice", "bob", "both"])
def test_no_packet_is_lost_or_doubled_across_rekeys(mesh: bool, starter: str) -> None:
    """Packets every 20 ms both ways over a 60 ms round trip, while one side, or both at once, change keys."""
    pair = Pair(mesh=mesh, delay=0.03)
    pair.connect()
    pair.run(10.0)
    sent: list[bytes] = []
    for number in range(400):
        sent.append(data(number))
        pair.send(pair.alice, sent[-1])
        pair.send(pair.bob, sent[-1])
        if number in (50, 350):
            for node in (pair.alice, pair.bob):
                if starter in (node.name, "both"):
                    pair.initiate(node)
        pair.run(0.02)
    pair.run(1.0)
    assert pair.alice.got == pair.bob.got == sent
    assert KeypairRotated in pair.alice.event_types()
    assert KeypairRotated in pair.bob.event_types()


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_no_packet_is_lost_whenever_initiations_are_sent(mesh: bool, seed: int) -> None:
    rng = random.Random(seed)
    pair = Pair(mesh=mesh, delay=rng.choice([0.001, 0.03, 0.2, 0.5, 1.2]))
    pair.connect(patience=20.0)
    pair.run(10.0)
    sent: list[bytes] = []
    for number in range(1500):
        sent.append(data(number))
        for node in (pair.alice, pair.bob):
            pair.send(node, sent[-1])
            if rng.random() < 0.02:
                pair.alice.session.initiate(pair.now, urgent=rng.random() < 0.5)
                pair.drain(pair.alice)
            if rng.random() < 0.02:
                pair.initiate(pair.bob)
        pair.run(0.02)
    pair.run(10.0)
    assert pair.alice.got == pair.bob.got == sent
    assert KeypairRotated in pair.alice.event_types()
    assert len(pair.alice.device.indices) <= 3


def test_session_lives_for_long_under_traffic_without_a_lost_packet() -> None:
    pair = Pair(delay=0.05)
    pair.connect()
    sent = [data(number) for number in range(1500)]
    for payload in sent:
        pair.send(pair.alice, payload)
        pair.send(pair.bob, payload)
        pair.run(0.5)
    pair.run(1.0)
    assert pair.alice.got == pair.bob.got == sent
    assert pair.alice.event_types() == [KeypairRotated] * 6
    assert len(pair.alice.device.indices) <= 3


# --- Keepalives (paper, 6.5) ---------------------------------------------------------------------------


def test_received_data_is_acknowledged_by_a_keepalive_after_10_s() -> None:
    pair = Pair()
    pair.connect()
    pair.send(pair.alice, data(1))
    arrival = pair.now + pair.delay
    pair.run(60.0)
    assert pair.bob.keepalives == [pytest.approx(arrival + 10.0)]
    assert pair.alice.keepalives == [], "a keepalive is not answered"


def test_reply_makes_the_keepalive_needless() -> None:
    pair = Pair()
    pair.connect()
    pair.send(pair.alice, data(1))
    pair.run(5.0)
    pair.send(pair.bob, data(2))
    pair.run(60.0)
    assert pair.bob.keepalives == []
    assert len(pair.alice.keepalives) == 1


def test_data_that_came_while_a_keepalive_was_due_gets_another() -> None:
    pair = Pair()
    pair.connect()
    pair.send(pair.alice, data(1))
    first = pair.now + pair.delay + 10.0
    pair.run(3.0)
    pair.send(pair.alice, data(2))
    pair.run(60.0)
    assert pair.bob.keepalives == [pytest.approx(first), pytest.approx(first + 10.0)]


def test_silence_after_sending_starts_a_handshake_after_15_s() -> None:
    pair = Pair()
    pair.connect()
    pair.run(10.0)
    pair.lose = lambda sender, datagram: sender is pair.bob
    pair.send(pair.alice, data(1))
    start = pair.now
    pair.run(14.9)
    assert pair.alice.times(INITIATION) == []
    pair.run(0.5)
    assert 15.0 <= pair.alice.times(INITIATION)[0] - start <= 15.334


def test_anything_heard_after_sending_prevents_the_handshake() -> None:
    pair = Pair()
    pair.connect()
    pair.run(10.0)
    pair.send(pair.alice, data(1))
    pair.run(60.0)
    assert pair.alice.times(INITIATION) == []
    assert len(pair.bob.keepalives) == 1


def test_persistent_keepalive_goes_out_at_its_interval() -> None:
    pair = Pair()
    pair.connect()
    pair.alice.session.set_persistent_keepalive(25.0, pair.now)
    start = pair.now
    pair.run(110.0)
    assert [when - start for when in pair.alice.keepalives] == pytest.approx([0.0, 25.0, 50.0, 75.0, 100.0])
    assert pair.bob.sent == []
    pair.alice.session.set_persistent_keepalive(0.0, pair.now)
    pair.forget()
    pair.run(100.0)
    assert pair.alice.sent == []


def test_persistent_keepalive_waits_while_other_messages_pass() -> None:
    pair = Pair()
    pair.connect()
    pair.alice.session.set_persistent_keepalive(25.0, pair.now)
    pair.run(1.0)
    pair.forget()
    for number in range(10):
        pair.send(pair.alice, data(number))
        pair.run(9.0)
    assert pair.alice.keepalives == []


def test_persistent_keepalive_brings_a_session_up_and_tries_for_ever() -> None:
    pair = Pair()
    pair.lose = lose_everything
    pair.alice.session.set_persistent_keepalive(25.0, pair.now)
    pair.run(1000.0)
    assert pair.alice.times(INITIATION)[-1] > pair.now - 130.0
    pair.lose = lambda sender, datagram: False
    pair.run(60.0)
    assert pair.bob.session.usable(pair.now)
    pair.run(3000.0)
    assert pair.bob.session.usable(pair.now)


# --- Erasing keys (paper, 6.3) -------------------------------------------------------------------------


def test_keys_are_erased_540_s_after_the_last_handshake() -> None:
    pair = Pair()
    pair.connect()
    pair.run(200.0)
    pair.send(pair.alice, data(1))
    pair.run(1.0)
    keypairs = [node.session.current for node in (pair.alice, pair.bob)]
    pair.run(538.0)
    assert all(keypair is not None and not keypair.erased for keypair in keypairs)
    pair.run(2.0)
    for node, keypair in zip((pair.alice, pair.bob), keypairs, strict=True):
        assert keypair is not None
        assert keypair.erased
        assert keypair.send_key == keypair.receive_key == b""
        assert node.session.current is node.session.previous is node.session.next is None
        assert not node.device.indices
        assert node.session.next_deadline() is None


def test_what_a_failed_handshake_left_is_erased() -> None:
    pair = Pair()
    pair.lose = lambda sender, datagram: datagram[0] == RESPONSE
    pair.initiate(pair.alice)
    pair.run(100.0)
    keypair = pair.bob.session.next
    assert keypair is not None
    pair.run(550.0)
    assert keypair.erased
    assert not pair.bob.device.indices
    assert pair.alice.session.next_deadline() is None


def test_replaced_keypairs_are_erased_and_their_indices_free() -> None:
    pair = Pair(mesh=True)
    pair.connect()
    first = pair.alice.session.current
    for _ in range(2):
        pair.run(10.0)
        pair.initiate(pair.alice)
        pair.run(1.0)
    assert first is not None
    assert first.erased
    assert len(pair.alice.device.indices) == 2
    for session, keypair in pair.alice.device.indices.values():
        assert session is pair.alice.session
        assert keypair in (session.current, session.previous)


def test_closed_session_leaves_nothing() -> None:
    pair = Pair(mesh=True)
    pair.connect()
    pair.run(10.0)
    pair.initiate(pair.alice)
    pair.alice.session.close()
    assert not pair.alice.device.indices
    assert not pair.alice.device.waiting
    assert pair.alice.session.next_deadline() is None
    assert pair.alice.session.poll_transmit() is None
    assert not pair.alice.session.usable(pair.now)
