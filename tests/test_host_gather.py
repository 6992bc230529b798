"""Trains that are sent from where they lie: real sockets on loopback."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from crossedge.host.gather import Gather, SocketName, argument
from crossedge.host.udp import UdpSocket, open_udp

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[UdpSocket, UdpSocket, SocketName]]:
    """Who sends, who receives, and the receiver's name."""
    host = LOOPBACK[request.param]
    one, other = (open_udp(request.param, 0, address=host, disable=frozenset({"gro"})) for _ in "12")
    yield one, other, SocketName(host, other.port)
    one.close()
    other.close()


def train(*parts: bytes) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in parts]


def received(opened: UdpSocket) -> list[bytes]:
    datagrams = []
    while True:
        try:
            datagrams.append(opened.socket.recv(2048))
        except BlockingIOError:
            return datagrams


def test_parts_leave_as_datagrams_of_one_size(pair: tuple[UdpSocket, UdpSocket, SocketName]) -> None:
    one, other, name = pair
    gather = Gather(train(b"head", b"body1", b"HEAD", b"body2", b"h3", b"b"), 9)
    gather.send(argument(one.socket.fileno()), name)
    assert received(other) == [b"headbody1", b"HEADbody2", b"h3b"]


def test_what_the_parts_hold_at_the_time_is_sent_to_whom_it_is_for(
    pair: tuple[UdpSocket, UdpSocket, SocketName],
) -> None:
    one, other, name = pair
    parts = train(b"a", b"b")
    gather, descriptor = Gather(parts, 1), argument(one.socket.fileno())
    gather.send(descriptor, name)
    parts[1][:] = b"c"
    back = SocketName(LOOPBACK[one.socket.family], one.port)
    gather.send(descriptor, back)
    gather.send(descriptor, name)
    assert (received(other), received(one)) == ([b"a", b"b", b"a", b"c"], [b"a", b"c"])


def test_a_refusal_is_an_error_with_the_kernels_number(pair: tuple[UdpSocket, UdpSocket, SocketName]) -> None:
    one, _, name = pair
    with pytest.raises(OSError) as caught:
        Gather(train(bytes(60_000), bytes(10_000)), 1000).send(argument(one.socket.fileno()), name)
    assert caught.value.errno in (errno.EMSGSIZE, errno.EINVAL)


def test_a_name_has_to_be_an_address() -> None:
    with pytest.raises(OSError, match="illegal IP address"):
        SocketName("example.org", 1)
