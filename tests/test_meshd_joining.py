"""UDP packets of one flow are joined before they are sealed, and come out as they went in."""

from __future__ import annotations

import random

import pytest

from crossedge.meshd.superframe import FRAME, HEADER, nonce
from crossedge.meshd.virtio import GSO_TCPV4, GSO_UDP_L4
from tests.data_pair import A6, ALICE, B6, Side, packets_of, pair, partial_frame, plain, super_frame, tcp, udp

PATH = 1472


def flow(packet: bytes) -> bytes:
    """Addresses and ports."""
    return packet[12:24] if packet[0] >> 4 == 4 else packet[8:44]


def frame_types(bob: Side, datagrams: list[bytes]) -> list[int]:
    """The types of the first frames in records of one datagram."""
    aead = bob.session.current.chunks_receive
    types = []
    for datagram in datagrams:
        _, index, count, _, counter = HEADER.unpack_from(datagram)
        assert count == 1
        types.append(FRAME.unpack_from(aead.decrypt(nonce(counter, 1, index), datagram[16:], None))[1])
    return types


def some_frame(rng: random.Random, number: int) -> bytes:
    v6 = {"source": A6, "destination": B6} if rng.random() < 0.3 else {}
    port = 4000 + rng.randrange(2)
    body = number.to_bytes(4, "big") * rng.choice([1, 16, 16, 325, 325, 325, 326])
    kind = rng.randrange(12)
    if kind == 0:
        return plain(udp(body, port=port, **v6))
    if kind == 1:
        return partial_frame(tcp(body, port=port, partial=True, **v6))
    if kind == 2:
        return partial_frame(udp(body, port=port, partial=True, identification=number, df=False))
    if kind == 3:
        return super_frame(tcp(body * 20, port=port, partial=True, **v6), 1000)
    return partial_frame(
        udp(body, port=port, partial=True, identification=number, tos=rng.random() < 0.1, **v6)
    )


@pytest.mark.parametrize("growth", [1, 5, 64])
def test_every_packet_comes_out_as_it_went_in_and_flows_keep_their_order(growth: int) -> None:
    rng = random.Random(growth)
    alice, bob = pair(size=PATH)
    alice.link.growth.datagrams = growth
    number = 0
    for _ in range(60):
        frames = []
        for _ in range(rng.randrange(1, 80)):
            number += 1
            frames.append(some_frame(rng, number))
        alice.read(*frames)
        bob.take_trains(*alice.datagrams(), source=ALICE)
        sent, came = packets_of(*frames), bob.packets()
        flows = {flow(packet) for packet in sent}
        assert len(sent) == len(came)
        for each in flows:
            assert [p for p in sent if flow(p) == each] == [p for p in came if flow(p) == each]
    assert not alice.dropped
    assert not bob.dropped


def test_sixty_four_packets_at_most_become_one_write() -> None:
    alice, bob = pair(size=PATH)
    frames = [partial_frame(udp(bytes(64), partial=True, identification=n)) for n in range(100)]
    alice.read(*frames)
    bob.take(*alice.datagrams(), source=ALICE)
    assert [frame[1] for frame in bob.written] == [GSO_UDP_L4, GSO_UDP_L4]
    assert bob.packets() == packets_of(*frames)


@pytest.mark.parametrize(
    "frames",
    [
        [plain(udp(bytes(100))), plain(udp(bytes(100)))],
        [partial_frame(udp(bytes(100), partial=True, df=False, identification=n)) for n in (1, 2)],
        [partial_frame(udp(bytes(100), partial=True, port=port)) for port in (1, 2)],
        [partial_frame(udp(bytes(100), partial=True, tos=tos)) for tos in (0, 1)],
        [partial_frame(udp(bytes(100), partial=True, ttl=ttl)) for ttl in (64, 63)],
        [partial_frame(udp(bytes(size), partial=True)) for size in (100, 99)],
        [partial_frame(tcp(bytes(100), partial=True, sequence=at)) for at in (0, 100)],
    ],
    ids=["whole checksums", "fragmentable", "ports", "tos", "ttl", "sizes", "tcp"],
)
def test_what_is_not_alike_is_not_joined_by_the_sender(frames: list[bytes]) -> None:
    alice, bob = pair(size=PATH)
    alice.read(*frames)
    assert not set(frame_types(bob, alice.datagrams())) & {GSO_UDP_L4, GSO_TCPV4}


def test_nothing_is_joined_for_a_peer_that_cannot_write_it() -> None:
    alice, bob = pair(size=PATH)
    alice.link.gso = frozenset()
    alice.read(*[partial_frame(udp(bytes(100), partial=True)) for _ in range(9)])
    assert set(frame_types(bob, alice.datagrams())) == {0}
