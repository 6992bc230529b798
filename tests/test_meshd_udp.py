"""The shell around UDP sockets, real ones."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from crossedge.host.clock import boottime
from crossedge.host.receive import SLOT
from crossedge.host.udp import UdpSocket, open_udp
from crossedge.meshd.superframe import HEADER, MAGIC
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, UdpEndpoint
from crossedge.wire.relay import pack_header
from tests.udp_box import Box, train_of

IP_RECVTTL = 12  # the socket module has no name for it
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@pytest.fixture(params=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    return socket.AF_INET6 if request.param == "ipv6" else socket.AF_INET


@pytest.fixture
def opened() -> Iterator[Callable[..., UdpSocket]]:
    sockets: list[UdpSocket] = []

    def make(family: int = socket.AF_INET, **options: Any) -> UdpSocket:
        sockets.append(open_udp(family, 0, address=LOOPBACK[socket.AddressFamily(family)], **options))
        return sockets[-1]

    yield make
    for each in sockets:
        each.close()


def endpoint_of(opened: UdpSocket) -> UdpEndpoint:
    return UdpEndpoint(*opened.socket.getsockname()[:2])


def in_two(datagram: memoryview) -> tuple[memoryview, memoryview]:
    return datagram[:16], datagram[16:]


@pytest.mark.asyncio
@pytest.mark.parametrize("without", [(), ("gro",), ("stamps",)])
async def test_a_datagram_that_comes_alone_is_offered_first(
    without: tuple[str, ...], family: int, opened: Callable[..., UdpSocket]
) -> None:
    first, second = (opened(family, disable=frozenset(without)) for _ in range(2))
    offered: list[tuple[bytes, Endpoint]] = []

    def lone(buffer: bytearray, length: int, source: Endpoint, now: float) -> bool:
        assert now == pytest.approx(boottime(), abs=5)
        offered.append((bytes(buffer[:length]), source))
        return buffer[:length] == b"taken"

    sender, receiver = Box([first]), Box([second], lone=lone)
    receiver.shell.start(asyncio.get_running_loop())
    target, source = endpoint_of(second), endpoint_of(first)
    for datagram in (b"taken", b"refused", b"taken", b"refused"):
        sender.shell.transmit(target, [memoryview(datagram)], len(datagram))
        async with asyncio.timeout(10):
            while not offered or offered[-1][0] != datagram:
                await asyncio.sleep(0)
    await receiver.until(2)
    assert receiver.datagrams() == [b"refused"] * 2
    assert offered == [(b"taken", source), (b"refused", source)] * 2
    offered.clear()
    sender.shell.transmit(target, [memoryview(b"one"), memoryview(b"two")], 3)
    sender.shell.transmit(target, [memoryview(b"six")], 3)
    await receiver.until(5)
    receiver.shell.stop()
    assert receiver.datagrams()[2:] == [b"one", b"two", b"six"]
    assert not offered, "none of these came alone"


@pytest.mark.asyncio
@pytest.mark.parametrize("without", [(), ("gso",), ("gro",), ("gso", "gro", "stamps")])
async def test_trains_arrive_whatever_the_kernel_offers(
    family: int, without: tuple[str, ...], opened: Callable[..., UdpSocket]
) -> None:
    first, second = (opened(family, disable=frozenset(without)) for _ in range(2))
    sender, receiver = Box([first]), Box([second])
    receiver.shell.start(asyncio.get_running_loop())
    train, parts = train_of(40, 1400, 77)
    before = boottime()
    sender.shell.transmit(endpoint_of(second), [train], 1400)
    sender.shell.transmit(endpoint_of(second), [memoryview(b"alone")], 5)
    halves = [half for start in range(0, len(train), 1400) for half in in_two(train[start : start + 1400])]
    sender.shell.transmit(endpoint_of(second), halves, 1400)
    assert await receiver.until(81) == [*parts, b"alone", *parts]
    receiver.shell.stop()
    assert not sender.shell.dropped
    assert not receiver.shell.dropped
    for _, arrival in receiver.arrived:
        assert type(arrival.source) is UdpEndpoint
        assert arrival.source == endpoint_of(first)
        assert before - 0.1 < arrival.stamp <= boottime()
    name = "ipv6" if family == socket.AF_INET6 else "ipv4"
    assert sender.shell.offloads()[name] == {
        offload: offload not in without for offload in ("gso", "gro", "stamps")
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("without", [(), ("gso",)])
async def test_each_datagram_of_a_train_to_a_relay_has_its_header(
    without: tuple[str, ...], opened: Callable[..., UdpSocket]
) -> None:
    first, second = opened(disable=frozenset(without)), opened(disable=frozenset({"gro"}))
    sender, receiver = Box([first]), Box([second])
    receiver.shell.start(asyncio.get_running_loop())
    train, parts = train_of(10, 500, 3)
    relay = RelayEndpoint(endpoint_of(second), 0xABCDEF)
    sender.shell.transmit(relay, [train], 500)
    halves = [half for start in range(0, len(train), 500) for half in in_two(train[start : start + 500])]
    sender.shell.transmit(relay, halves, 500)
    sender.shell.send(b"control", relay)
    sender.shell.send(b"low", relay, ttl=3)
    header = bytes.fromhex("ce02000000abcdef")
    assert await receiver.until(22) == [header + part for part in [*parts, *parts, b"control", b"low"]]
    receiver.shell.stop()


def record(count: int, segment: int, counter: int, behind: bytes = b"") -> list[bytes]:
    """What looks like the chunks of one record, each behind something else where that is told."""
    return [
        behind + HEADER.pack(MAGIC, index, count, 7, counter) + bytes([counter, index] * (segment // 2 - 8))
        for index in range(count)
    ]


@pytest.mark.asyncio
async def test_trains_of_one_record_each_are_taken_apart_once_they_are_foreseen(
    family: int, opened: Callable[..., UdpSocket]
) -> None:
    first, second = (opened(family) for _ in range(2))
    sender, receiver = Box([first]), Box([second])
    receiver.shell.start(asyncio.get_running_loop())
    shapes = (
        [(40, 1400)] * 6 + [(40, 1388)] * 4 + [(40, 1400), (12, 1400), (30, 1100), (30, 1100), (30, 1100)]
    )
    sent: list[bytes] = []
    apart = []
    for counter, (count, segment) in enumerate(shapes):
        chunks = record(count, segment, counter)
        sent += chunks
        sender.shell.transmit(endpoint_of(second), [memoryview(b"".join(chunks))], segment)
        lone = record(1, 300, counter)
        sent += lone
        sender.shell.transmit(endpoint_of(second), [memoryview(lone[0])], 300)
        before = len(receiver.arrived)
        assert (await receiver.until(len(sent)))[-1] == lone[0]
        apart.append(any(arrival.heads is not None for _, arrival in receiver.arrived[before:]))
    assert receiver.datagrams() == sent
    assert apart[:6] == [False, False, True, True, True, True]
    assert apart[6:10] == [False, False, True, True]
    receiver.shell.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("behind", [b"", pack_header(5)], ids=["direct", "relayed"])
@pytest.mark.parametrize("size", [1100, 1200, 1420])
async def test_datagrams_that_come_singly_are_whole_where_trains_are_foreseen(
    size: int, behind: bytes, family: int, opened: Callable[..., UdpSocket]
) -> None:
    first, second = (opened(family) for _ in range(2))
    sender, receiver = Box([first]), Box([second])
    receiver.shell.start(asyncio.get_running_loop())
    sent: list[bytes] = []
    for counter in range(3):
        chunks = record(40, 1200, counter)
        sent += chunks
        sender.shell.transmit(endpoint_of(second), [memoryview(b"".join(chunks))], 1200)
        assert await receiver.until(len(sent)) == sent
    assert receiver.arrived[-1][1].heads is not None
    for counter in range(100, 120):  # all of them wait to be read
        (alone,) = record(1, size, counter, behind)
        sent.append(alone)
        first.socket.sendto(alone, endpoint_of(second))
    assert await receiver.until(len(sent)) == sent
    receiver.shell.stop()


@pytest.mark.asyncio
@pytest.mark.parametrize("behind", [b"", pack_header(5)], ids=["direct", "relayed"])
async def test_chunks_that_come_one_by_one_are_handed_on_together(
    behind: bytes, opened: Callable[..., UdpSocket]
) -> None:
    first, second = opened(), opened(disable=frozenset({"gro"}))
    sender, receiver = Box([first]), Box([second])
    chunks = record(40, 1400, 1, behind)
    for chunk in chunks:
        sender.shell.transmit(endpoint_of(second), [memoryview(chunk)], len(chunk))
    receiver.shell.start(asyncio.get_running_loop())
    assert await receiver.until(40) == chunks
    receiver.shell.stop()
    assert [arrival.stride for _, arrival in receiver.arrived] == [0, SLOT], "the first as if it came alone"


@pytest.mark.asyncio
async def test_what_is_waiting_is_gathered_before_it_is_handed_on(opened: Callable[..., UdpSocket]) -> None:
    first, second = opened(), opened(disable=frozenset({"gro"}))
    sender, receiver = Box([first]), Box([second])
    train, parts = train_of(60, 1000)
    sender.shell.transmit(endpoint_of(second), [train], 1000)
    receiver.shell.start(asyncio.get_running_loop())
    assert await receiver.until(60) == parts
    receiver.shell.stop()
    assert receiver.gatherings == [60]


def test_an_address_family_without_a_socket_is_counted(opened: Callable[..., UdpSocket]) -> None:
    box = Box([opened()])
    box.shell.transmit(UdpEndpoint("::1", 9), [memoryview(b"x")], 1)
    box.shell.send(b"x", RelayEndpoint(UdpEndpoint("::1", 9), 1))
    assert box.shell.dropped == {"send-no-socket": 2}


@pytest.mark.asyncio
async def test_a_low_ttl_holds_for_one_datagram(family: int, opened: Callable[..., UdpSocket]) -> None:
    first, second = opened(family), opened(family)
    level, wants, name = (
        (socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, socket.IPV6_HOPLIMIT)
        if family == socket.AF_INET6
        else (socket.IPPROTO_IP, IP_RECVTTL, socket.IP_TTL)
    )
    second.socket.setsockopt(level, wants, 1)
    box = Box([first])
    box.shell.send(b"low", endpoint_of(second), ttl=3)
    box.shell.send(b"usual", endpoint_of(second))
    second.socket.setblocking(True)
    second.socket.settimeout(5)
    seen = []
    for _ in range(2):
        _, ancillary, _, _ = second.socket.recvmsg(100, 200)
        seen += [int.from_bytes(data[:4], "little") for _, kind, data in ancillary if kind == name]
    assert seen == [3, 64]


# --- Stamps -------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("error", [3600.0, -3600.0])
async def test_a_stamp_of_a_clock_that_was_set_is_not_believed(
    error: float, opened: Callable[..., UdpSocket]
) -> None:
    first, second = opened(), opened()
    sender = Box([first])
    receiver = Box([second], clock=lambda: 500.0, offset=lambda: error)
    receiver.shell.start(asyncio.get_running_loop())
    sender.shell.send(b"x", endpoint_of(second))
    await receiver.until(1)
    receiver.shell.stop()
    assert receiver.arrived[0][1].stamp == 500.0
