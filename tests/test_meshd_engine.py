"""The engine: a fault in one event or timeout leaves the mesh alive."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import pytest

from crossedge.host.clock import boottime
from crossedge.host.tun import Tun
from crossedge.meshd import engine as engine_module
from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.engine import Engine, Own
from crossedge.meshd.events import Notice
from crossedge.meshd.link import Link
from crossedge.meshd.mesh import Mesh


class FakeMesh:
    """A core that has one event and then wants to be called again and again; its first timeout fails."""

    def __init__(self) -> None:
        self.device = SimpleNamespace(indices={})
        self.events = [Notice("info", "hello")]
        self.timeouts = 0
        self.called_twice = asyncio.Event()
        self.netcheck_running = False
        self.stirred = False
        self.ahead = 0.01

    def poll_event(self) -> Notice | None:
        return self.events.pop(0) if self.events else None

    def poll_transmit(self, _: object) -> None:
        return None

    def next_deadline(self) -> float:
        return boottime() + self.ahead

    def handle_timeout(self, now: float) -> None:
        self.timeouts += 1
        if self.timeouts == 1:
            raise RuntimeError(f"a fault at {now}")
        self.called_twice.set()

    def all_dropped(self) -> Counter[str]:
        return Counter()


@pytest.mark.asyncio
async def test_faults_in_an_event_and_in_a_timeout_do_not_stop_the_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "FAULT_PAUSE", 0.01)
    loop = asyncio.get_running_loop()
    faults: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: faults.append(context))
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def refuse(event: object) -> None:
        raise ValueError(event)

    mesh, allowed = FakeMesh(), AllowedIPs[Link]()
    tun = Tun(reading, "crossedge0", frozenset())
    engine = Engine(
        cast(Mesh, mesh), allowed, Own((), None, None), tun, [], mtu=1380, on_event=cast(Any, refuse)
    )
    try:
        with pytest.raises(ValueError, match="hello"):
            engine.start(loop)
        async with asyncio.timeout(5.0):
            await mesh.called_twice.wait()
        assert [type(fault["exception"]) for fault in faults] == [RuntimeError]
    finally:
        engine.stop()
        os.close(reading)
        os.close(writing)


@pytest.mark.asyncio
async def test_the_timer_waits_whole_milliseconds_so_that_it_never_spins() -> None:
    waits: list[float] = []
    loop = cast(
        Any,
        SimpleNamespace(
            add_reader=lambda *_: None,
            remove_reader=lambda _: None,
            call_later=lambda wait, _: waits.append(wait) or SimpleNamespace(cancel=lambda: None),
        ),
    )
    mesh, allowed = FakeMesh(), AllowedIPs[Link]()
    mesh.events.clear()
    tun = Tun(0, "crossedge0", frozenset())
    engine = Engine(
        cast(Mesh, mesh), allowed, Own((), None, None), tun, [], mtu=1380, on_event=cast(Any, print)
    )
    engine.start(loop)
    for mesh.ahead in (0.0003, 0.0031, -1.0, 0.2):
        engine.settle()
    engine.stop()
    for wait, ahead in zip(waits, (0.01, 0.0003, 0.0031, 0.0, 0.2), strict=True):
        assert ahead <= wait < ahead + 0.0015
        assert wait * 1000 == pytest.approx(round(wait * 1000), abs=1e-6)
