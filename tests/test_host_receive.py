"""Many datagrams by one call: lengths, sources, trains and stamps are those of recvmsg."""

import errno
import random
import select
import socket
import time

import pytest

from crossedge.host.receive import SLOT, SLOTS, TRAINS, Receiver, address_of
from crossedge.host.udp import SEGMENT, SOL_UDP, UDP_SEGMENT, UdpSocket, open_udp

pytestmark = [pytest.mark.namespaces, pytest.mark.usefixtures("inside")]
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
families = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])


def read(receiver: Receiver, opened: UdpSocket) -> list[tuple[int, int, int]]:
    assert select.select([opened.socket], [], [], 5)[0]
    return receiver.read(opened.socket.fileno())


@families
def test_each_datagram_has_its_slot_its_source_and_its_stamp(family: int) -> None:
    receiver = Receiver()
    here, there, other = (open_udp(family, 0) for _ in range(3))
    assert receiver.read(here.socket.fileno()) == []
    sent = [(bytes([n]) * (1 + 700 * n), there if n % 3 else other) for n in range(9)]
    for data, sender in sent:
        sender.socket.sendto(data, (LOOPBACK[family], here.port))
    found = read(receiver, here)
    assert [size for size, _, _ in found] == [len(data) for data, _ in sent]
    for slot, ((size, named, controlled), (data, sender)) in enumerate(zip(found, sent, strict=True)):
        assert receiver.buffer[slot * SLOT : slot * SLOT + size] == data
        assert address_of(receiver.name(slot, named)) == (LOOPBACK[family], sender.port)
        segment, stamp = receiver.control(slot, controlled)
        assert segment == 0
        assert abs(time.time() - stamp) < 5
        assert not receiver.is_train(controlled)
    assert receiver.one_name(1, 2)
    assert not receiver.one_name(0, 2)
    assert receiver.read(here.socket.fileno()) == []
    for each in (here, there, other):
        each.close()


@families
@pytest.mark.parametrize("stamps", [True, False])
def test_a_train_tells_how_long_its_datagrams_are(family: int, stamps: bool) -> None:
    receiver = Receiver()
    here = open_udp(family, 0, disable=frozenset() if stamps else frozenset({"stamps"}))
    there = open_udp(family, 0)
    data = bytes(range(256)) * 20
    for _ in range(2):  # what a call changed in the kernel's structures is put back
        cut = [(SOL_UDP, UDP_SEGMENT, SEGMENT.pack(1000))]
        there.socket.sendmsg([data], cut, 0, (LOOPBACK[family], here.port))
        there.socket.sendto(b"alone", (LOOPBACK[family], here.port))
        (size, _, controlled), (alone, _, single) = read(receiver, here)
        assert (size, alone) == (len(data), 5)
        assert receiver.buffer[:size] == data
        assert receiver.is_train(controlled)
        assert not receiver.is_train(single)
        assert receiver.control(0, controlled)[0] == 1000
        assert bool(receiver.control(1, single)[1]) == stamps
    here.close()
    there.close()


def test_a_call_is_full_when_more_may_wait_and_smaller_while_trains_come() -> None:
    receiver = Receiver()
    here, there = open_udp(socket.AF_INET, 0), open_udp(socket.AF_INET, 0)
    target = ("127.0.0.1", here.port)
    for _ in range(SLOTS + 3):
        there.socket.sendto(b"x", target)
    assert len(read(receiver, here)) == SLOTS
    assert receiver.full
    assert len(read(receiver, here)) == 3
    assert not receiver.full
    for _ in range(TRAINS + 2):
        there.socket.sendmsg([bytes(20_000)], [(SOL_UDP, UDP_SEGMENT, SEGMENT.pack(1000))], 0, target)
    assert len(read(receiver, here)) == TRAINS + 2  # they came unforeseen
    for _ in range(TRAINS + 2):
        there.socket.sendmsg([bytes(20_000)], [(SOL_UDP, UDP_SEGMENT, SEGMENT.pack(1000))], 0, target)
    assert len(read(receiver, here)) == TRAINS
    assert receiver.full
    assert len(read(receiver, here)) == 2
    here.close()
    there.close()


@families
@pytest.mark.parametrize("size", [1_472, 1_448, 1_024])
@pytest.mark.parametrize("cut", [1_472, 1_000, 60])
def test_trains_are_taken_apart_and_put_together_again(family: int, size: int, cut: int) -> None:
    receiver = Receiver(16)
    here, there = open_udp(family, 0), open_udp(family, 0)
    rng = random.Random(size)

    def send(length: int) -> bytes:
        data = rng.randbytes(length)
        ancillary = [(SOL_UDP, UDP_SEGMENT, SEGMENT.pack(cut))] if length > cut else []
        there.socket.sendmsg([data], ancillary, 0, (LOOPBACK[family], here.port))
        return data

    longest = min(64 * cut, 65_400)
    send(min(longest, 20 * cut))
    read(receiver, here)
    receiver.part(size)
    for lengths in ([longest, longest - 7, 5, 15], [size, size + 1, size + 16, size + 17, 2 * size, 9_000]):
        sent = [send(min(length, longest)) for length in lengths]
        found = read(receiver, here)
        assert [each[0] for each in found] == [len(data) for data in sent]
        for slot, data in enumerate(sent):
            start, length = slot * SLOT, len(data)
            if receiver.parted and length > size:
                assert receiver.parted == size
                count = -(-length // size)
                heads = [data[at : at + 16] for at in range(size, length, size)]
                assert bytes(receiver.heads(slot, count))[: len(b"".join(heads))] == b"".join(heads)
                bodies = b"".join(data[at + 16 : at + size] for at in range(0, length, size))
                assert receiver.buffer[start : start + 16 + len(bodies)] == data[:16] + bodies
                receiver.join(slot, length)
            assert receiver.buffer[start : start + length] == data
    receiver.part(0)
    sent = [send(longest)]
    read(receiver, here)
    assert receiver.parted == 0
    assert receiver.buffer[: len(sent[0])] == sent[0]
    here.close()
    there.close()


def test_an_error_of_an_earlier_send_is_raised_once() -> None:
    receiver = Receiver()
    opened, closed = open_udp(socket.AF_INET, 0), open_udp(socket.AF_INET, 0)
    opened.socket.connect(("127.0.0.1", closed.port))
    closed.close()
    opened.socket.send(b"nobody listens")
    with pytest.raises(OSError) as caught:
        read(receiver, opened)
    assert caught.value.errno == errno.ECONNREFUSED
    assert receiver.read(opened.socket.fileno()) == []
    opened.close()
