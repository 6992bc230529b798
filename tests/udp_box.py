"""A UDP shell with everything that it says kept, and trains to send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from crossedge.host.clock import boottime
from crossedge.host.udp import UdpSocket
from crossedge.meshd.inbound import Arrival
from crossedge.meshd.superframe import HEADER_SIZE
from crossedge.meshd.udp import UdpShell
from crossedge.wire.endpoint import Endpoint


def datagrams_of(data: bytes, arrival: Arrival) -> list[bytes]:
    size = arrival.segment
    if arrival.heads is None:
        return [data[at : at + size] for at in range(0, len(data), arrival.stride or size)]
    bodies = [data[at : at + size - HEADER_SIZE] for at in range(size, len(data), size - HEADER_SIZE)]
    heads = [arrival.heads[at : at + HEADER_SIZE] for at in range(0, len(arrival.heads), HEADER_SIZE)]
    return [data[:size], *(bytes(head) + body for head, body in zip(heads, bodies, strict=True))]


class Box:
    """A shell with everything that it says kept."""

    def __init__(self, sockets: list[UdpSocket], clock: Callable[[], float] = boottime, **more: Any) -> None:
        self.arrived: list[tuple[bytes, Arrival]] = []
        self.gatherings: list[int] = []
        self.too_big: list[tuple[Endpoint, int]] = []
        self.blocked: list[bool] = []
        self.shell = UdpShell(
            sockets,
            receive=self.receive,
            clock=clock,
            too_big=lambda *said: self.too_big.append(said),
            blocked=self.blocked.append,
            **more,
        )

    def receive(self, buffer: bytearray, arrivals: list[Arrival], now: float) -> None:
        self.gatherings.append(len(arrivals))
        for arrival in arrivals:
            heads = None if arrival.heads is None else memoryview(bytes(arrival.heads))
            data = bytes(buffer[arrival.start : arrival.end])
            self.arrived.append((data, arrival._replace(heads=heads)))

    def datagrams(self) -> list[bytes]:
        return [datagram for data, arrival in self.arrived for datagram in datagrams_of(data, arrival)]

    async def until(self, count: int) -> list[bytes]:
        async with asyncio.timeout(10):
            while len(self.datagrams()) < count:
                await asyncio.sleep(0.001)
        return self.datagrams()


def train_of(count: int, segment: int, last: int | None = None) -> tuple[memoryview, list[bytes]]:
    parts = [bytes([number]) * segment for number in range(count)]
    if last is not None:
        parts[-1] = parts[-1][:last]
    return memoryview(b"".join(parts)), parts
