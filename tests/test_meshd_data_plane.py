"""The data path as a whole: whose packet it is, what waits, what is told to whom."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from crossedge.meshd.constants import REJECT_AFTER_TIME
from crossedge.meshd.link import (
    LARGEST_DATAGRAM,
    QUEUE_BYTES,
    QUEUE_FRAMES,
    SMALLEST_DATAGRAM,
    Link,
)
from crossedge.meshd.unclaimed import HOLD, MAX_BYTES, MAX_FRAMES
from crossedge.wire.endpoint import RelayEndpoint, UdpEndpoint
from tests.data_pair import (
    A4,
    A6,
    ALICE,
    B6,
    BOB,
    NOW,
    RELAY,
    FakeSession,
    keypairs,
    packets_of,
    pair,
    partial_frame,
    plain,
    super_frame,
    tcp,
    udp,
)

# --- Outbound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "packet"),
    [
        ("outbound-source", udp(b"x", source="10.160.3.1")),
        ("outbound-source", udp(b"x", source="192.168.1.1")),
        ("outbound-source", udp(b"x", source="fe80::1", destination=B6)),
        ("outbound-no-peer", udp(b"x", destination="10.160.9.9")),
        ("outbound-no-peer", udp(b"x", destination="8.8.8.8")),
        ("outbound-no-peer", udp(b"x", source=A6, destination="fd00:9::1")),
        ("outbound-multicast", udp(b"x", destination="224.0.0.1")),
        ("outbound-multicast", udp(b"x", source=A6, destination="ff02::2")),
        ("outbound-version", b"\x50" + bytes(60)),
        ("outbound-version", b"\x45" + bytes(18)),
        ("outbound-version", b"\x60" + bytes(38)),
    ],
)
def test_what_may_not_leave_is_counted(reason: str, packet: bytes) -> None:
    alice, _ = pair()
    alice.read(plain(packet), plain(udp(b"good")))
    assert len(alice.datagrams()) == 1
    assert alice.dropped == {reason: 1}
    assert not alice.wanted


def test_an_address_that_nobody_known_has_is_asked_for() -> None:
    alice, _ = pair()
    alice.read(
        plain(udp(b"x", destination="10.160.9.9")),
        plain(udp(b"x", source=A6, destination="fd00:9::1")),
        plain(udp(b"x", source="192.168.1.1", destination="10.160.9.8")),  # not ours: nothing is asked for it
        plain(udp(b"good")),
    )
    assert alice.unknown == ["10.160.9.9", "fd00:9::1"]


def test_first_packets_for_somebody_not_yet_known_leave_in_order_once_he_is() -> None:
    alice, bob = pair()
    early = [udp(bytes([number]) * 99, destination="10.160.9.9") for number in range(3)]
    other = udp(b"for nobody", source=A6, destination="fd00:9::1")
    alice.read(*map(plain, early), plain(other), now=NOW)
    assert alice.dropped == {"outbound-no-peer": 4}
    alice.allowed.insert(ip_network("10.160.9.0/24"), alice.link)
    bob.mine.insert(ip_network("10.160.9.0/24"), True)
    alice.plane.claim(NOW + HOLD)
    assert alice.dropped == {"outbound-no-peer": 1}
    bob.take(*alice.datagrams(), source=alice.endpoint)
    assert [packet[28:] for packet in bob.packets()] == [packet[28:] for packet in early]
    alice.allowed.insert(ip_network("fd00:9::/64"), alice.link)
    alice.plane.claim(NOW + HOLD + 0.1)  # too late for the other one
    assert alice.datagrams() == []
    assert alice.dropped == {"outbound-no-peer": 1}


def test_what_waits_for_somebody_not_yet_known_is_bounded() -> None:
    alice, _ = pair()
    for number in range(3 * MAX_FRAMES):
        alice.read(plain(udp(bytes([number % 256]) * 100, destination="10.160.9.9")))
    alice.allowed.insert(ip_network("10.160.9.0/24"), alice.link)
    alice.plane.claim(NOW)
    assert len(alice.datagrams()) <= MAX_FRAMES
    assert alice.dropped == {"outbound-no-peer": 2 * MAX_FRAMES}
    for _ in range(20):
        alice.read(plain(udp(bytes(60_000), destination="10.160.10.9")))
    alice.allowed.insert(ip_network("10.160.10.0/24"), alice.link)
    alice.plane.claim(NOW)
    assert alice.plane.dropped["outbound-no-peer"] == 2 * MAX_FRAMES + 20 - MAX_BYTES // 60_100


@pytest.mark.parametrize(
    "frame",
    [
        bytes([1, 3]) + super_frame(udp(bytes(3000), partial=True), 1000)[2:],  # UFO
        bytes([1, 4]) + super_frame(tcp(bytes(3000), partial=True), 1000)[2:],
        bytes([0, 1]) + super_frame(tcp(bytes(3000), partial=True), 1000)[2:],
        super_frame(tcp(bytes(3000), partial=True), 1000)[:-5],
        super_frame(tcp(bytes(3000), partial=True), 0),
        partial_frame(udp(b"x", partial=True))[:6] + b"\xff\x7f\x06\0" + udp(b"x", partial=True),
    ],
)
def test_a_kernel_that_says_strange_things_is_counted(frame: bytes) -> None:
    alice, _ = pair()
    alice.read(frame)
    assert alice.dropped == {"outbound-malformed": 1}
    assert not alice.datagrams()


def test_a_peer_may_change_at_any_time() -> None:
    alice, _ = pair()
    alice.read(plain(udp(b"1")))
    other = Link("other", FakeSession())
    alice.allowed.insert(ip_network("10.160.2.10/32"), other)
    alice.read(plain(udp(b"2")))
    assert [len(alice.datagrams()), len(other.queue)] == [1, 1]
    alice.allowed.remove_value(other)
    alice.mine.remove(ip_network("10.160.1.0/24"))
    alice.read(plain(udp(b"3")))
    assert alice.dropped == {"outbound-source": 1}


def test_packets_for_many_peers_in_one_drain_all_leave() -> None:
    alice, _ = pair()
    others = []
    for number in range(70):
        session = FakeSession()
        session.current = keypairs()[0]
        link = Link(str(number), session)
        link.set_path((UdpEndpoint("192.0.2.99", number + 1),))
        link.allow_superframes(session.current, frozenset(), 65_000)
        alice.allowed.insert(ip_network(f"10.161.{number}.0/24"), link)
        others.append((link, session))
    frames = [plain(udp(b"x", destination=f"10.161.{number}.1")) for number in range(70)]
    alice.read(*frames, *frames)
    assert sorted(endpoint.port for endpoint, _, _ in alice.sent) == list(range(1, 71))
    assert all(len(session.sent) == 1 for _, session in others)
    assert all(link.sent.datagrams == 1 for link, _ in others)


@pytest.mark.parametrize("superframes", [True, False])
def test_a_flow_keeps_its_order_whatever_its_packets_become(superframes: bool) -> None:
    alice, bob = pair(superframes=superframes)
    at, frames = 0, []
    for size in (900, 900, 5000, 300, 9000, 700, 700, 1000, 4000, 200, 200, 800, 200, 900):
        body = bytes([size % 251]) * size
        packet = tcp(body, sequence=at, partial=True)
        gso_size = {800: 300}.get(size, 1000)
        frames.append(super_frame(packet, gso_size) if size > gso_size else partial_frame(packet))
        at += size
    alice.read(*frames)
    datagrams = alice.datagrams()
    counters = [int.from_bytes(datagram[8:16], "little") for datagram in datagrams]
    assert counters == sorted(counters)
    bob.take(*datagrams, source=ALICE)
    assert bob.packets() == packets_of(*frames)


# --- The queue ----------------------------------------------------------------------------------------------


def test_without_a_session_packets_wait_in_order_and_it_is_wanted_once_per_drain() -> None:
    alice, bob = pair()
    keypair, alice.session.current = alice.session.current, None
    frames = [plain(udp(bytes([number]))) for number in range(5)]
    frames.insert(2, super_frame(tcp(bytes(9000), partial=True), 1000))
    alice.read(*frames[:4])
    alice.read(*frames[4:])
    assert alice.wanted == ["bob", "bob"]
    assert not alice.sent
    alice.plane.flush_queue(alice.link, NOW)
    assert len(alice.link.queue) == 6
    alice.session.current = keypair
    alice.plane.flush_queue(alice.link, NOW)
    bob.take(*alice.datagrams(), source=ALICE)
    small = [packet for packet in bob.packets() if packet[9] == 17]
    assert small == packets_of(*(frame for frame in frames if not frame[1]))
    assert alice.link.queued_bytes == 0


@pytest.mark.parametrize("lack", ["session", "endpoint", "age"])
def test_what_is_lacking_is_wanted(lack: str) -> None:
    alice, _ = pair()
    now = NOW
    if lack == "session":
        alice.session.current = None
    elif lack == "endpoint":
        alice.link.set_path(())
    else:
        now += REJECT_AFTER_TIME
    alice.read(plain(udp(b"x")), now=now)
    assert alice.wanted == ["bob"]
    assert len(alice.link.queue) == 1
    assert not alice.session.sent


def test_the_queue_is_bounded_in_frames_and_bytes_and_drops_the_oldest() -> None:
    alice, _ = pair()
    alice.session.current = None
    alice.read(*(plain(udp(number.to_bytes(2, "big"))) for number in range(QUEUE_FRAMES + 10)))
    assert len(alice.link.queue) == QUEUE_FRAMES
    assert alice.link.queue[0][-2:] == (10).to_bytes(2, "big")
    assert alice.dropped == {"queue-full": 10}
    alice.read(*[super_frame(tcp(bytes(60_000), partial=True), 1000)] * 20)
    assert alice.link.queued_bytes == sum(map(len, alice.link.queue)) <= QUEUE_BYTES


# --- What sessions are told ---------------------------------------------------------------------------------


def test_the_session_is_told_once_per_drain_and_once_per_wake_up() -> None:
    alice, bob = pair()
    frames = [plain(udp(bytes(100))), super_frame(tcp(bytes(9000), partial=True), 1000)] * 3
    alice.read(*frames)
    assert [now for now, _ in alice.session.sent] == [NOW]
    assert alice.session.sent[0][1] > 27_000
    datagrams = alice.datagrams()
    bob.take(*datagrams, source=ALICE, now=NOW + 1)
    [(now, size, keypair)] = bob.session.received
    assert (now, keypair) == (NOW + 1, bob.session.current)
    assert size > 27_000
    assert (alice.link.sent.datagrams, alice.link.sent.at) == (len(datagrams), NOW)
    assert (bob.link.received.datagrams, bob.link.received.at) == (len(datagrams), NOW + 1)


def test_a_drain_without_packets_tells_nobody() -> None:
    alice, bob = pair()
    alice.read()
    alice.read(plain(udp(b"x", destination="8.8.8.8")))
    bob.take(b"\xce\x03\0\1" + bytes(60), source=ALICE)
    assert not alice.session.sent
    assert not bob.session.received


# --- Where it comes from ------------------------------------------------------------------------------------


def test_a_new_source_is_told_once_and_only_for_what_is_genuine() -> None:
    alice, bob = pair()
    elsewhere = UdpEndpoint("203.0.113.5", 5)
    alice.read(*[plain(udp(bytes(1100)))] * 3)
    datagrams = alice.datagrams()
    bob.take(datagrams[0][:-1] + b"!", source=elsewhere)
    assert not bob.moved
    bob.take(*datagrams, source=elsewhere)
    assert bob.moved == [elsewhere]
    assert len(bob.packets()) == 3
    bob.take(*datagrams, source=UdpEndpoint("203.0.113.6", 6))
    assert bob.moved == [elsewhere]
    assert bob.link.endpoints == (ALICE,)


def relayed(datagram: bytes, channel: int = 0x1234) -> bytes:
    return b"\xce\x02" + channel.to_bytes(6, "big") + datagram


def test_through_a_relay_the_source_is_the_channel() -> None:
    alice, bob = pair()
    bob.link.set_path((RELAY,))
    alice.read(super_frame(tcp(bytes(9000), partial=True), 1000), plain(udp(bytes(1350))))
    bob.take(*map(relayed, alice.datagrams()), source=RELAY.server)
    assert bob.packets() == packets_of(
        super_frame(tcp(bytes(9000), partial=True), 1000), plain(udp(bytes(1350)))
    )
    assert not bob.moved
    handshake = b"\1\0\0\0" + bytes(144)
    bob.take(relayed(handshake, 5), source=RELAY.server)
    assert bob.control == [(handshake, RelayEndpoint(RELAY.server, 5), NOW)]


# --- What else arrives --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "datagram",
    [
        b"\1\0\0\0" + bytes(144),
        b"\2\0\0\0" + bytes(88),
        b"\3\0\0\0" + bytes(60),
        b"\xce\x01" + bytes(120),
        b"\1\1\0\0\x21\x12\xa4\x42" + bytes(12),
    ],
)
def test_what_is_not_data_goes_to_the_control_side(datagram: bytes) -> None:
    _, bob = pair()
    bob.take(datagram, source=ALICE)
    assert bob.control == [(datagram, ALICE, NOW)]
    assert not bob.dropped


@pytest.mark.parametrize(
    ("reason", "datagram"),
    [
        ("unknown-datagram", b"GET / HTTP/1.1\r\n\r\n" + bytes(40)),
        ("unknown-datagram", b"\4\1\0\0" + bytes(60)),
        ("unknown-datagram", b"\xce\x04" + bytes(60)),
        ("unknown-datagram", b"\xce"),
        ("relay-malformed", b"\xce\x02" + bytes(6)),
        ("unknown-datagram", b"\xce\x02" + bytes(7)),
        ("relay-malformed", relayed(relayed(bytes(60)))),
        ("relay-malformed", relayed(relayed(bytes(4)))),
        ("truncated", b"\4\0\0\0" + bytes(27)),
        ("truncated", b"\xce\x03\0\1" + bytes(27)),
        ("truncated", relayed(b"\xce\x03\0\1" + bytes(20))),
        ("unknown-receiver", b"\4\0\0\0" + bytes(28)),
        ("unknown-receiver", b"\xce\x03\0\1" + bytes(60)),
    ],
)
def test_what_is_for_nobody_is_counted(reason: str, datagram: bytes) -> None:
    _, bob = pair()
    bob.take(datagram, source=ALICE)
    assert bob.dropped == {reason: 1}
    assert not bob.control


def test_an_old_or_forgotten_keypair_opens_nothing() -> None:
    alice, bob = pair()
    alice.read(*[plain(udp(bytes(1100)))] * 2)
    first, second = alice.datagrams()
    bob.take(first, source=ALICE, now=NOW + REJECT_AFTER_TIME)
    assert bob.dropped == {"unknown-receiver": 1}
    _, keypair = bob.indices.pop(9)
    bob.take(first, source=ALICE)
    assert bob.dropped == {"unknown-receiver": 2}
    bob.indices[9] = object(), keypair
    bob.take(first, source=ALICE)
    assert bob.dropped == {"unknown-receiver": 3}
    bob.indices[9] = bob.session, keypair
    bob.take(second, source=ALICE)
    assert len(bob.packets()) == 1


def test_superframes_that_were_not_agreed_are_not_opened() -> None:
    alice, bob = pair()
    alice.read(plain(udp(b"x")))
    keypair = keypairs(aead=None)[1]
    bob.indices[9] = bob.session, keypair
    bob.take(*alice.datagrams(), source=ALICE)
    assert bob.dropped == {"superframe-not-agreed": 1}


def test_after_a_rekey_transport_data_is_sent_until_superframes_are_agreed_again() -> None:
    alice, _ = pair()
    alice.session.current = keypairs()[0]
    assert not alice.link.superframes
    alice.read(plain(udp(b"x")))
    assert alice.datagrams()[0][0] == 4


def test_one_wake_up_may_bring_everything_at_once() -> None:
    alice, bob = pair()
    alice.read(super_frame(tcp(bytes(5000), partial=True), 1000))
    alice.link.agreed = None
    alice.read(plain(udp(b"transport")))
    datagrams = alice.datagrams()
    control = b"\xce\x01" + bytes(120)
    bob.take(datagrams[0], control, *datagrams[1:3], b"rubbish!", *map(relayed, datagrams[3:]), source=ALICE)
    assert sorted(bob.packets()) == sorted(
        packets_of(super_frame(tcp(bytes(5000), partial=True), 1000), plain(udp(b"transport")))
    )
    assert bob.control == [(control, ALICE, NOW)]
    assert bob.dropped == {"unknown-datagram": 1}


# --- The link -----------------------------------------------------------------------------------------------


def test_a_links_datagrams_stay_within_sense_and_leave_room_for_the_relay() -> None:
    link = Link("peer", FakeSession())
    for size, expected in ((1232, 1232), (10, SMALLEST_DATAGRAM), (10**6, LARGEST_DATAGRAM)):
        link.set_path((BOB,), size)
        assert (link.datagram_size, link.overhead) == (expected, 0)
    link.set_path((BOB, RELAY), 1232)
    assert (link.datagram_size, link.overhead) == (1224, 8)
    link.set_path(())
    assert link.endpoints == ()


def test_a_spoofed_address_of_ours_is_refused_even_from_a_peer_that_may_send_everything() -> None:
    alice, bob = pair()
    bob.allowed.insert(ip_network("0.0.0.0/0"), bob.link)
    alice.mine.insert(ip_network("10.160.2.0/24"), True)
    alice.mine.insert(ip_network("8.8.8.8/32"), True)
    alice.read(
        plain(udp(b"x", source="10.160.2.1")), plain(udp(b"y", source="8.8.8.8")), plain(udp(b"z", source=A4))
    )
    bob.take(*alice.datagrams(), source=ALICE)
    assert len(bob.packets()) == 2
    assert bob.dropped == {"inner-source": 1}
