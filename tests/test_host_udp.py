"""UDP sockets carry trains, marks and stamps, and tell what the kernel lacks."""

import errno
import select
import socket

import pytest

from crossedge.host.links import set_link
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.udp import (
    GRO_SIZE,
    OFFLOADS,
    SCM_TIMESTAMPNS,
    SEGMENT,
    SOL_UDP,
    STAMP,
    UDP_GRO,
    UDP_SEGMENT,
    open_udp,
)

pytestmark = [pytest.mark.namespaces, pytest.mark.usefixtures("inside")]
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
families = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])


def receive(opened: socket.socket) -> tuple[bytes, dict[tuple[int, int], bytes]]:
    assert select.select([opened], [], [], 5)[0]
    data, ancillary, _, _ = opened.recvmsg(65536, 256)
    return data, {(level, kind): value for level, kind, value in ancillary}


@families
def test_a_train_arrives_as_one_with_its_segment_size_and_stamp(family: int) -> None:
    sender, receiver = open_udp(family, 0), open_udp(family, 0)
    assert sender.gso
    assert receiver.gro
    assert receiver.stamps
    train = bytes(range(250)) * 8
    sender.socket.sendmsg(
        [train], [(SOL_UDP, UDP_SEGMENT, SEGMENT.pack(500))], 0, (LOOPBACK[family], receiver.port)
    )
    data, ancillary = receive(receiver.socket)
    assert data == train
    assert GRO_SIZE.unpack(ancillary[SOL_UDP, UDP_GRO]) == (500,)
    seconds, nanoseconds = STAMP.unpack(ancillary[socket.SOL_SOCKET, SCM_TIMESTAMPNS])
    assert seconds > 1_500_000_000
    assert 0 <= nanoseconds < 1_000_000_000
    sender.close()
    receiver.close()


@families
def test_disabled_offloads_are_off_and_told(family: int) -> None:
    sender, receiver = open_udp(family, 0), open_udp(family, 0, disable=OFFLOADS)
    assert (receiver.gso, receiver.gro, receiver.stamps) == (False, False, False)
    sender.socket.sendmsg(
        [bytes(1000)], [(SOL_UDP, UDP_SEGMENT, SEGMENT.pack(500))], 0, (LOOPBACK[family], receiver.port)
    )
    assert [receive(receiver.socket) for _ in range(2)] == [(bytes(500), {})] * 2
    sender.close()
    receiver.close()
    with pytest.raises(ValueError, match="gzo"):
        open_udp(family, 0, disable=frozenset({"gzo"}))


@families
def test_sockets_do_not_block_and_have_large_buffers(family: int) -> None:
    opened = open_udp(family, 0)
    with pytest.raises(BlockingIOError):
        opened.socket.recv(1)
    assert opened.receive_buffer >= 212992
    assert opened.send_buffer >= 212992
    opened.close()


@families
def test_the_mark_is_set(family: int) -> None:
    opened = open_udp(family, 0, mark=0xCE5E)
    assert opened.socket.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0xCE5E
    opened.close()


def test_both_families_share_a_port() -> None:
    four = open_udp(socket.AF_INET, 41820)
    six = open_udp(socket.AF_INET6, 41820)
    assert four.port == six.port == 41820
    four.close()
    six.close()


@families
def test_a_datagram_larger_than_the_link_is_refused_not_fragmented(family: int) -> None:
    batch = Batch()
    set_link(batch, "lo", mtu=1400)
    with Netlink() as netlink:
        netlink.run(batch)
    sender, receiver = open_udp(family, 0), open_udp(family, 0)
    fits = 1400 - (28 if family == socket.AF_INET else 48)
    sender.socket.sendto(bytes(fits), (LOOPBACK[family], receiver.port))
    assert len(receive(receiver.socket)[0]) == fits
    with pytest.raises(OSError) as caught:
        sender.socket.sendto(bytes(fits + 1), (LOOPBACK[family], receiver.port))
    assert caught.value.errno == errno.EMSGSIZE
    sender.close()
    receiver.close()


def test_an_inherited_socket_keeps_its_port_and_gets_the_options() -> None:
    inherited = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    inherited.bind(("127.0.0.1", 0))
    port = inherited.getsockname()[1]
    opened = open_udp(socket.AF_INET, 1, descriptor=inherited.detach())
    assert opened.port == port
    assert opened.gro
    assert not opened.socket.getblocking()
    opened.close()
    stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with pytest.raises(OSError, match="no UDP socket"):
        open_udp(socket.AF_INET, 0, descriptor=stream.detach())
