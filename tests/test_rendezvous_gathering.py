"""What is read one by one for the relay and leaves as one train: neighbours alike, within bounds."""

from __future__ import annotations

import random

import pytest

from crossedge.rendezvous.gathering import TRAIN_BYTES, TRAIN_DATAGRAMS, Gathered, Gathering
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.relay import HEADER, pack_header

ALICE, BOB = UdpEndpoint("192.0.2.1", 7), UdpEndpoint("192.0.2.2", 7)


def read(gathering: Gathering, datagram: bytes) -> int:
    start = gathering.used
    gathering.view[start : start + len(datagram)] = datagram
    return len(datagram)


@pytest.fixture
def gathering() -> Gathering:
    return Gathering(memoryview(bytearray(TRAIN_BYTES + 65_536)))


def relayed(size: int, channel: int = 1) -> bytes:
    return pack_header(channel) + random.Random(size).randbytes(size - HEADER)


def test_neighbours_alike_become_one_train_whose_last_may_be_shorter(gathering: Gathering) -> None:
    assert gathering.take() is None
    sent = [relayed(1400), relayed(1400), relayed(1400), relayed(900)]
    for datagram in sent:
        assert gathering.add(read(gathering, datagram), ALICE, 3)
    assert not gathering.add(read(gathering, relayed(900)), ALICE, 3), "a shorter one ended the train"
    assert gathering.take() == Gathered(5100, 1400, ALICE, 3)
    assert gathering.view[:5100] == b"".join(sent)
    assert gathering.take() is None
    assert gathering.used == 0


@pytest.mark.parametrize(
    ("datagram", "source", "local"),
    [
        (relayed(1401), ALICE, 3),
        (relayed(1400, 2), ALICE, 3),
        (relayed(1400), BOB, 3),
        (relayed(1400), ALICE, 4),
        (b"\xce\x01" + bytes(1398), ALICE, 3),
        (b"\xce\x02", ALICE, 3),
        (b"", ALICE, 3),
    ],
)
def test_what_differs_does_not_join(
    gathering: Gathering, datagram: bytes, source: UdpEndpoint, local: int
) -> None:
    assert gathering.add(read(gathering, relayed(1400)), ALICE, 3)
    assert not gathering.add(read(gathering, datagram), source, local)
    assert gathering.take() == Gathered(1400, 1400, ALICE, 3)


@pytest.mark.parametrize(("size", "most"), [(100, TRAIN_DATAGRAMS), (1400, TRAIN_BYTES // 1400)])
def test_trains_are_bounded(gathering: Gathering, size: int, most: int) -> None:
    for _ in range(most):
        assert gathering.add(read(gathering, relayed(size)), ALICE, 3)
    assert not gathering.add(read(gathering, relayed(size)), ALICE, 3)
