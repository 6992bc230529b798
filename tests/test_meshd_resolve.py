"""Names of rendezvous: which address is taken, and what is not a name."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from typing import Any

import pytest

from crossedge.meshd.resolve import keep_resolved, resolve
from crossedge.wire.endpoint import UdpEndpoint

V4, V6 = UdpEndpoint("127.0.0.9", 3478), UdpEndpoint("::1", 3478)


def names(monkeypatch: pytest.MonkeyPatch, *endpoints: UdpEndpoint) -> None:
    """Let every name have these addresses, in this order."""

    def answer(*_: object, **__: object) -> list[Any]:
        return [
            (socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM, 17, "", (host, port))
            for host, port in endpoints
        ]

    monkeypatch.setattr(socket, "getaddrinfo", answer)


@pytest.mark.asyncio
async def test_a_rendezvous_is_asked_over_ipv4_where_that_leads_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names(monkeypatch, V6, V4)
    told: list[UdpEndpoint] = []
    task = asyncio.create_task(keep_resolved("rendezvous.example", 3478, (4, 6), told.append))
    async with asyncio.timeout(5.0):
        while not told:
            await asyncio.sleep(0)
    task.cancel()
    assert told == [V4]
    assert await resolve("x", 3478, (4, 6)) == V6
    assert await resolve("x", 3478, (6,), prefer=4) == V6
    names(monkeypatch, V6, UdpEndpoint("255.255.255.255", 3478))  # no way there without asking for it
    assert await resolve("x", 3478, (4, 6), prefer=4) == V6


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["a" * 70 + ".example", "a..b", "\0"])
async def test_what_can_be_no_name_has_no_address(name: str) -> None:
    assert await resolve(name, 3478, (4, 6)) is None


def test_a_name_server_that_does_not_answer_holds_up_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, never = threading.Event(), threading.Event()

    def silence(*_: object, **__: object) -> list[Any]:
        asked.set()
        never.wait(60.0)
        return []

    async def ask() -> None:
        task = asyncio.create_task(resolve("rendezvous.example", 3478, (4, 6)))
        while not asked.is_set():
            await asyncio.sleep(0)
        task.cancel()

    monkeypatch.setattr(socket, "getaddrinfo", silence)
    start = time.monotonic()
    asyncio.run(ask())
    assert time.monotonic() - start < 30.0
    never.set()
