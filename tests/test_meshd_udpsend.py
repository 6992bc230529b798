"""What a UDP shell does where the kernel refuses or has no room: stand-ins for sockets say so."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from crossedge.host.udp import SOL_UDP, UDP_SEGMENT, open_udp
from crossedge.meshd.udpsend import BACKLOG_BYTES
from crossedge.wire.endpoint import RelayEndpoint, UdpEndpoint
from crossedge.wire.relay import pack_header
from tests.udp_box import Box, train_of


@dataclass
class Kernel:
    """Stands in for a socket; `refuse` decides, per call, which error it raises."""

    descriptor: int
    refuse: Callable[[bool, int], int]
    family: int = socket.AF_INET

    def __post_init__(self) -> None:
        self.sent: list[tuple[bytes, int]] = []

    def fileno(self) -> int:
        return self.descriptor

    def sendmsg(self, parts: list[Any], ancillary: Any, flags: int, address: Any) -> int:
        data = b"".join(parts)
        segments = [data for level, kind, data in ancillary if (level, kind) == (SOL_UDP, UDP_SEGMENT)]
        segment = int.from_bytes(segments[0], "little") if segments else 0
        if number := self.refuse(bool(segment), len(data)):
            raise OSError(number, "refused")
        self.sent.append((data, segment))
        return len(data)

    def recvmsg_into(self, *_: Any) -> Any:
        raise BlockingIOError

    def sendto(self, data: Any, address: Any) -> int:
        return self.sendmsg([data], [], 0, address)


@pytest.fixture
def refusing() -> Iterator[Callable[[Callable[[bool, int], int]], tuple[Box, Kernel]]]:
    real = open_udp(socket.AF_INET, 0, address="127.0.0.1")

    def make(refuse: Callable[[bool, int], int]) -> tuple[Box, Kernel]:
        kernel = Kernel(real.socket.fileno(), refuse)
        return Box([replace(real, socket=kernel)]), kernel

    yield make
    real.close()


PEER = UdpEndpoint("192.0.2.7", 7)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOPROTOOPT, errno.EOPNOTSUPP])
def test_gso_refused_for_good_is_remembered_and_nothing_lost(
    number: int, refusing: Callable[..., tuple[Box, Kernel]]
) -> None:
    box, kernel = refusing(lambda gso, _: number if gso else 0)
    train, parts = train_of(5, 100, 7)
    box.shell.transmit(PEER, [train], 100)
    assert kernel.sent == [(part, 0) for part in parts]
    kernel.refuse = lambda gso, _: pytest.fail("asked again") if gso else 0
    box.shell.transmit(PEER, [train], 100)
    assert len(kernel.sent) == 10
    assert box.shell.offloads()["ipv4"]["gso"] is False
    assert box.shell.dropped == {f"gso-{errno.errorcode[number].lower()}": 1}


def test_gso_refused_for_one_train_is_tried_again(refusing: Callable[..., tuple[Box, Kernel]]) -> None:
    box, kernel = refusing(lambda gso, _: errno.EINVAL if gso else 0)
    train, parts = train_of(3, 100)
    box.shell.transmit(PEER, [train], 100)
    assert kernel.sent == [(part, 0) for part in parts]
    kernel.refuse = lambda *_: 0
    box.shell.transmit(PEER, [train], 100)
    assert kernel.sent[3:] == [(bytes(train), 100)]


@pytest.mark.parametrize("gso", [True, False])
def test_a_datagram_too_long_for_the_device_is_told(
    gso: bool, refusing: Callable[..., tuple[Box, Kernel]]
) -> None:
    box, kernel = refusing(lambda train, size: errno.EMSGSIZE if train or size > 50 else 0)
    train, _ = train_of(3, 100, 10)
    box.shell._sender._v4.gso = gso
    box.shell.transmit(PEER, [train], 100)
    assert set(box.too_big) == {(PEER, 100)}
    assert [len(data) for data, _ in kernel.sent] == ([] if gso else [10])


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EPERM, errno.ENETUNREACH, errno.EHOSTUNREACH])
def test_other_refusals_are_counted_by_name(number: int, refusing: Callable[..., tuple[Box, Kernel]]) -> None:
    box, _ = refusing(lambda *_: number)
    train, _ = train_of(3, 100)
    box.shell.transmit(PEER, [train], 100)
    box.shell.transmit(PEER, [train[:50]], 50)
    box.shell.send(b"control", PEER, ttl=5)
    assert box.shell.dropped == {f"send-{errno.errorcode[number].lower()}": 3}


class Loop:
    """What the shell wants of an event loop."""

    def __init__(self) -> None:
        self.writers: dict[int, tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def add_reader(self, *_: Any) -> None:
        pass

    def remove_reader(self, *_: Any) -> None:
        pass

    def add_writer(self, descriptor: int, callback: Callable[..., None], *arguments: Any) -> None:
        self.writers[descriptor] = callback, arguments

    def remove_writer(self, descriptor: int) -> bool:
        return self.writers.pop(descriptor, None) is not None

    def writable(self) -> None:
        for callback, arguments in list(self.writers.values()):
            callback(*arguments)


@pytest.mark.parametrize("gso", [True, False])
def test_what_the_kernel_has_no_room_for_waits_in_order(
    gso: bool, refusing: Callable[..., tuple[Box, Kernel]]
) -> None:
    room: deque[int] = deque()
    box, kernel = refusing(lambda *_: room.popleft() if room else errno.EAGAIN)
    box.shell._sender._v4.gso = gso
    loop = Loop()
    box.shell.start(loop)
    room.extend([0] if gso else [0] * 4)
    trains = [train_of(count, 100, 30) for count in (4, 3, 1, 2)]
    for train, _ in trains:
        box.shell.transmit(PEER, [train], 100)
    assert box.blocked == [True]
    assert len(loop.writers) == 1
    box.shell.send(b"urgent", PEER)
    loop.writable()
    assert box.blocked == [True]
    room.extend([0] * (1 if gso else 2))
    loop.writable()
    assert box.blocked == [True]
    room.extend([0] * 20)
    loop.writable()
    assert box.blocked == [True, False]
    assert not loop.writers
    sent = [
        data[at : at + (segment or len(data))]
        for data, segment in kernel.sent
        for at in range(0, len(data), segment or len(data))
    ]
    assert sent == [part for _, parts in trains for part in parts]
    assert box.shell.dropped == {"send-eagain": 1}


def test_what_waits_is_bounded(refusing: Callable[..., tuple[Box, Kernel]]) -> None:
    box, kernel = refusing(lambda *_: errno.EAGAIN)
    loop = Loop()
    box.shell.start(loop)
    train, _ = train_of(40, 1400)
    for _ in range(100):
        box.shell.transmit(PEER, [train], 1400)
    kept = BACKLOG_BYTES // len(train)
    assert box.shell.dropped == {"send-queue-full": (100 - kept) * 40}
    kernel.refuse = lambda *_: 0
    loop.writable()
    assert len(kernel.sent) == kept
    kernel.refuse = lambda *_: errno.EAGAIN
    box.shell.transmit(PEER, [train], 1400)
    box.shell.stop()
    assert not loop.writers


@pytest.mark.parametrize(
    ("number", "dropped"), [(0, {}), (errno.EPERM, {"send-eperm": 1}), (errno.ECONNREFUSED, {})]
)
def test_what_sends_one_datagram_to_an_address_may_be_kept(
    refusing: Callable[..., tuple[Box, Kernel]], number: int, dropped: dict[str, int]
) -> None:
    refusals = [number] * (2 if dropped else 1)
    box, kernel = refusing(lambda *_: refusals.pop() if refusals else 0)
    send = box.shell.way(PEER)
    send(memoryview(b"first"))
    send(memoryview(b"second"))
    assert [data for data, _ in kernel.sent] == ([b"second"] if dropped else [b"first", b"second"])
    assert box.shell.dropped == dropped


def test_what_sends_one_datagram_keeps_behind_what_waits(
    refusing: Callable[..., tuple[Box, Kernel]],
) -> None:
    full = True
    box, kernel = refusing(lambda *_: errno.EAGAIN if full else 0)
    loop = asyncio.new_event_loop()
    box.shell.start(loop)
    send = box.shell.way(PEER)
    send(memoryview(b"first"))
    full = False
    send(memoryview(b"second"))
    assert not kernel.sent
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    assert [data for data, _ in kernel.sent] == [b"first", b"second"]
    send(memoryview(b"third"))
    assert [data for data, _ in kernel.sent][2:] == [b"third"]
    box.shell.way(RelayEndpoint(PEER, 5))(memoryview(b"relayed"))
    assert kernel.sent[-1][0] == pack_header(5) + b"relayed"
    box.shell.way(UdpEndpoint("2001:db8::1", 7))(memoryview(b"nowhere"))
    assert box.shell.dropped == {"send-no-socket": 2}
    box.shell.stop()
    loop.close()
