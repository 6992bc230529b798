"""The short ways through the data path for what comes alone: they do what the usual ways do, or nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossedge.meshd.constants import REJECT_AFTER_MESSAGES, REJECT_AFTER_TIME
from crossedge.meshd.growth import REPORT_SIZE
from crossedge.meshd.link import SAFE_DATAGRAM
from crossedge.meshd.lone import LONG
from crossedge.meshd.replay import ReplayWindow
from crossedge.meshd.superframe import HEADER, OVERHEAD
from tests import data_pair as lab
from tests.data_pair import ALICE, BOB, NOW, RELAY, Side, pair, plain, super_frame, tcp, udp

PING = plain(lab.ip(lab.A4, lab.B4, 1, b"\x08\x00" + bytes(60)))


@pytest.mark.parametrize(
    "frame", [PING, plain(tcp(b"x" * 30)), plain(udp(b"x" * 30)), plain(tcp(b"", port=5))]
)
def test_after_the_first_of_a_flow_packets_that_come_alone_take_the_short_way(frame: bytes) -> None:
    alice, bob = pair()
    short = []
    for number in range(3):
        went = alice.read_lone(frame, NOW + number)
        (datagram,) = alice.datagrams()
        short.append((went, bob.take_lone(datagram, ALICE, NOW + number)))
        assert bob.written.pop() == frame
    assert short == [(False, True), (True, True), (True, True)]
    assert not alice.dropped
    assert not bob.dropped
    assert [size for _, size in alice.session.sent] == [len(frame) - 2] * 3
    assert [size for _, size, _ in bob.session.received] == [len(frame) - 2] * 3
    assert (alice.link.sent.datagrams, bob.link.received.datagrams) == (3, 3)
    assert alice.link.sent.size == bob.link.received.size == 3 * (len(frame) - 2)
    assert alice.link.sent.at == bob.link.received.at == NOW + 2


@pytest.mark.parametrize("usual", [False, True], ids=["lone", "usual"])
def test_an_answer_leaves_before_the_session_is_told_what_it_answers_but_is_told_of_after(
    usual: bool,
) -> None:
    alice, bob = pair()
    back = plain(lab.ip(lab.B4, lab.A4, 1, b"\0\0" + bytes(1700 if usual else 60)))
    bob.read(back)
    bob.datagrams()
    told: list[str] = []
    bob.session.told = told.append
    for number in range(1, 4):
        alice.read(PING)
        bob.answers.append(lambda: told.append("looked"))
        bob.answers.append(lambda: bob.read_lone(back, NOW))
        told.clear()
        assert bob.take_lone(*alice.datagrams(), ALICE)
        assert told == ["looked", "received", "sent"]
        assert len(bob.written) == number
        assert bool(bob.datagrams())
    assert not bob.answers


def test_an_answer_under_keys_that_it_proves_is_left_to_the_usual_way() -> None:
    alice, bob = pair()
    alice.read(PING)
    bob.session.current = lab.keypairs()[0]
    bob.answers.append(lambda: pytest.fail("looked"))
    assert bob.take_lone(*alice.datagrams(), ALICE)
    assert [size for _, size, _ in bob.session.received] == [len(PING) - 2]


def test_an_arrival_is_told_of_even_where_the_look_for_an_answer_fails() -> None:
    alice, bob = pair()
    alice.read(PING)
    (datagram,) = alice.datagrams()
    bob.answers.append(lambda: {}[0])
    with pytest.raises(KeyError):
        bob.take_lone(datagram, ALICE)
    assert len(bob.session.received) == 1
    assert not bob.plane.inbound_lone(bytearray(datagram), len(datagram), ALICE, NOW), "a copy"


def test_short_packets_that_come_alone_call_for_no_report() -> None:
    alice, bob = pair()
    for frame, reports in ((PING, 0), (plain(udp(bytes(REPORT_SIZE))), 1)):
        alice.read(frame)
        assert bob.take_lone(*alice.datagrams(), ALICE)
        assert len(bob.reported) == reports


def test_what_is_no_lone_packet_leaves_the_usual_way() -> None:
    alice, _ = pair()
    alice.read_lone(PING)
    assert alice.read_lone(PING)
    keypair, agreed = alice.session.current, alice.link.agreed
    assert keypair is not None
    long = plain(udp(bytes(SAFE_DATAGRAM)))
    alice.read_lone(long)
    assert not alice.read_lone(long), "needs more than a datagram"
    assert not alice.read_lone(super_frame(tcp(bytes(6000), partial=True), 1200))
    alice.link.agreed = None
    assert not alice.read_lone(PING), "no superframes are agreed"
    alice.link.agreed = agreed
    alice.session.current = lab.keypairs()[0]
    assert not alice.read_lone(PING), "another keypair is in use"
    alice.session.current = keypair
    assert not alice.read_lone(PING, NOW + REJECT_AFTER_TIME), "the keypair is too old"
    keypair.chunk_counter = REJECT_AFTER_MESSAGES
    assert not alice.read_lone(PING), "or used up"
    keypair.chunk_counter = 100
    alice.plane.buffer[: len(PING)] = PING
    alice.plane.outbound(len(PING), NOW)
    alice.plane.buffer[: len(PING)] = PING
    assert not alice.plane.lone(len(PING), NOW), "one before it has not left yet"
    alice.plane.flush(NOW)
    alice.link.set_path(())
    assert not alice.read_lone(PING), "there is no way"
    assert [len(frame) for frame in alice.link.queue][-1:] == [len(PING)]


def test_a_lone_packet_leaves_on_both_ways_while_the_path_is_in_doubt() -> None:
    alice, _ = pair()
    alice.read_lone(PING)
    alice.sent.clear()
    alice.link.set_path((BOB, RELAY))
    assert alice.read_lone(PING)
    assert [endpoint for endpoint, _, _ in alice.sent] == [BOB, RELAY]
    assert len({train for _, train, _ in alice.sent}) == 1


@dataclass
class Source:
    """Datagrams of all sorts for bob, from a path that may change on the way."""

    pick: random.Random
    alice: Side = field(default_factory=lambda: pair(size=1472)[0])
    made: list[bytes] = field(default_factory=list)

    def next(self, choice: int) -> bytes:
        alice, pick = self.alice, self.pick
        if choice < 4 and self.made:  # a copy, a forgery, a part, another kind
            datagram = bytearray(pick.choice(self.made))
            if choice == 1:
                datagram[pick.randrange(len(datagram))] ^= 1 << pick.randrange(8)
            elif choice == 2:
                del datagram[pick.randrange(len(datagram)) :]
            elif choice == 3:
                datagram[:4] = pick.choice(
                    (b"\x04\0\0\0", b"\x01\0\0\0", b"\xce\x03\x01\x01", b"\xce\x03\0\0")
                )
            return bytes(datagram)
        alice.link.growth.datagrams = pick.choice((1, 64))
        frames = [PING, plain(tcp(bytes(100))), plain(udp(b"abc")), plain(tcp(b"", source="10.160.9.9"))]
        frames += [super_frame(tcp(bytes(3000), partial=True), 1000), plain(udp(bytes(2000)))]
        alice.read(*pick.choices(frames, k=pick.choice((1, 1, 1, 2))), PING)
        self.made += alice.datagrams()
        return self.made[-1]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 9), min_size=20, max_size=60))
def test_datagrams_that_come_alone_end_as_they_do_the_usual_way(
    pick: random.Random, choices: list[int]
) -> None:
    source = Source(pick)
    (_, short), (_, usual) = pair(size=1472), pair(size=1472)
    for now, choice in enumerate(choices, int(NOW)):
        datagram = source.next(choice)
        sender = pick.choice((ALICE, ALICE, ALICE, BOB))
        short.take_lone(datagram, sender, now)
        usual.take(datagram, source=sender, now=now)
        assert short.written == usual.written
        assert short.dropped == usual.dropped
        assert [said[:2] for said in short.session.received] == [said[:2] for said in usual.session.received]
        assert (short.control, short.inner, short.moved) == (usual.control, usual.inner, usual.moved)
        assert short.link.received == usual.link.received


def test_where_the_short_way_in_is_not_taken_nothing_was_done() -> None:
    alice, bob = pair()
    alice.read(PING)
    (datagram,) = alice.datagrams()
    buffer = bytearray(datagram)
    buffer[-1] ^= 1
    keypair = bob.indices[9][1]
    before = keypair.chunk_replay.newest, keypair.tally.opened
    cases = [(bytes(buffer), ALICE, NOW), (datagram, BOB, NOW), (datagram[: OVERHEAD - 1], ALICE, NOW)]
    cases.append((datagram, ALICE, NOW + REJECT_AFTER_TIME))
    cases.append((HEADER.pack(0x03CE, 0, 1, 1234, 0) + datagram[16:], ALICE, NOW))
    for wrong, source, now in cases:
        assert not bob.plane.inbound_lone(bytearray(wrong), len(wrong), source, now)
    assert (keypair.chunk_replay.newest, keypair.tally.opened) == before
    assert not bob.written
    assert not bob.dropped
    assert not bob.session.received
    assert bob.plane.inbound_lone(bytearray(datagram), len(datagram), ALICE, NOW)
    assert not bob.plane.inbound_lone(bytearray(datagram), len(datagram), ALICE, NOW), "a copy"


def test_bulk_from_the_tun_is_not_looked_at_for_the_short_way() -> None:
    alice, _ = pair()
    long = plain(udp(bytes(LONG)))
    alice.link.set_path((BOB,), 60_000)
    assert not alice.read_lone(long)
    assert not alice.read_lone(long)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3000), max_size=60))
def test_marking_what_was_checked_is_committing_it(counters: list[int]) -> None:
    one, other = ReplayWindow(), ReplayWindow()
    for counter in counters:
        fresh = one.check(counter)
        assert other.commit(counter) == fresh
        if fresh:
            one.mark(counter)
        assert one.newest == other.newest
    assert [one.check(each) for each in range(3100)] == [other.check(each) for each in range(3100)]
