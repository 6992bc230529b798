"""The shell around the TUN: drains, pauses, refusals. A socket of packets stands in for the device."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from crossedge.meshd.tun import DRAIN_FRAMES, TunShell

HEADER = bytes(range(1, 11))


class Device:
    """Both ends of something that keeps packets apart, as a TUN does."""

    def __init__(self, vnet_header: bool = True) -> None:
        self.kernel, self.ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        self.ours.setblocking(False)
        self.buffer = bytearray(70_000)
        self.frames: list[bytes] = []
        self.drains: list[int] = []
        self.lost: list[OSError] = []
        self.pause_after = 0
        self.shell = TunShell(
            self.ours.fileno(),
            self.buffer,
            outbound=self.outbound,
            flush=lambda _: self.drains.append(len(self.frames)),
            clock=lambda: 5.0,
            lost=self.lost.append,
            vnet_header=vnet_header,
        )

    def outbound(self, length: int, now: float) -> None:
        assert now == 5.0
        self.frames.append(bytes(self.buffer[:length]))
        self.buffer[:10] = b"\xff" * 10  # the data path overwrites it
        if len(self.frames) == self.pause_after:
            self.shell.pause(True)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.frames) < count:
                await asyncio.sleep(0.001)


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.shell.stop()
    made.kernel.close()
    made.ours.close()


@pytest.mark.asyncio
async def test_a_drain_is_bounded_and_flushed_and_its_first_frame_goes_at_once(device: Device) -> None:
    for number in range(DRAIN_FRAMES + 5):
        device.kernel.send(HEADER + bytes([number]) * 50)
    device.shell.start(asyncio.get_running_loop())
    await device.until(DRAIN_FRAMES + 5)
    assert device.frames == [HEADER + bytes([number]) * 50 for number in range(DRAIN_FRAMES + 5)]
    assert device.drains[:3] == [1, DRAIN_FRAMES, DRAIN_FRAMES + 5]


@pytest.mark.asyncio
async def test_a_flush_may_stop_the_shell(device: Device) -> None:
    device.shell = TunShell(
        device.ours.fileno(),
        device.buffer,
        outbound=device.outbound,
        flush=lambda _: device.shell.stop(),
        clock=lambda: 5.0,
        lost=device.lost.append,
    )
    device.kernel.send(HEADER)
    device.kernel.send(HEADER)
    device.shell.start(asyncio.get_running_loop())
    await device.until(1)
    await asyncio.sleep(0.01)
    assert len(device.frames) == 1


@pytest.mark.asyncio
async def test_what_comes_alone_is_offered_first_and_what_waits_behind_it_is_read_as_a_drain(
    device: Device,
) -> None:
    now = 5.0
    alone: list[bytes] = []

    def lone(length: int, _: float) -> bool:
        alone.append(bytes(device.buffer[:length]))
        return device.buffer[10] != 2

    device.shell = TunShell(
        device.ours.fileno(),
        device.buffer,
        lone=lone,
        outbound=lambda length, _: device.frames.append(bytes(device.buffer[:length])),
        flush=lambda _: device.drains.append(len(device.frames)),
        clock=lambda: now,
        lost=device.lost.append,
    )
    for number in range(3):
        device.kernel.send(HEADER + bytes([number]))
    device.shell.start(asyncio.get_running_loop())
    await device.until(2)
    assert alone == [HEADER + b"\0"]
    assert device.frames == [HEADER + b"\1", HEADER + b"\2"]
    assert device.drains == [2]
    now = 6.0
    device.kernel.send(HEADER + b"\2")
    device.shell.look()
    assert (len(alone), len(device.frames), device.drains) == (2, 3, [2, 3, 3]), (
        "it was none for the short way"
    )
    now = 7.0
    device.shell.look()
    assert (len(alone), len(device.frames), device.drains) == (2, 3, [2, 3, 3]), "nothing waits"
    device.kernel.send(HEADER + b"\1")
    device.shell.look()
    assert len(alone) == 2, "one look is skipped after one that found nothing"
    device.shell.pause(True)
    device.shell.look()
    assert len(alone) == 2
    device.shell.pause(False)
    device.shell.look()
    assert len(alone) == 3
    for _ in range(2):
        device.kernel.send(HEADER + b"\1")
        device.shell.look()
    assert len(alone) == 5, "however soon: it may be an answer to what was told nobody yet"
    device.kernel.send(HEADER + b"\1")
    device.shell.stop()
    device.shell.look()
    assert len(alone) == 5


@pytest.mark.asyncio
async def test_while_paused_nothing_is_read(device: Device) -> None:
    loop = asyncio.get_running_loop()
    device.pause_after = 2
    for _ in range(4):
        device.kernel.send(HEADER)
    device.shell.start(loop)
    await device.until(2)
    await asyncio.sleep(0.02)
    assert len(device.frames) == 2
    assert device.drains == [1, 2]
    device.shell.pause(False)
    await device.until(4)


def test_writing(device: Device) -> None:
    device.shell.write(memoryview(HEADER + b"packet"))
    assert device.kernel.recv(100) == HEADER + b"packet"
    assert not device.shell.dropped


@pytest.mark.asyncio
async def test_without_a_virtio_header_one_is_put_on_and_taken_off() -> None:
    device = Device(vnet_header=False)
    device.kernel.send(b"one")
    device.kernel.send(b"two")
    device.shell.start(asyncio.get_running_loop())
    await device.until(2)
    assert device.frames == [bytes(10) + b"one", bytes(10) + b"two"]
    device.shell.write(memoryview(bytes(10) + b"three"))
    assert device.kernel.recv(100) == b"three"
    device.shell.stop()
    device.kernel.close()
    device.ours.close()


def refusing(number: int) -> Callable[..., int]:
    def refuse(*_: Any) -> int:
        raise OSError(number, "refused")

    return refuse


def test_refused_writes_are_counted_by_name(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.EINVAL, errno.EIO, errno.EIO):
        monkeypatch.setattr(os, "write", refusing(number))
        device.shell.write(memoryview(HEADER))
    assert device.shell.dropped == {"tun-write-einval": 1, "tun-write-eio": 2}


@pytest.mark.asyncio
@pytest.mark.parametrize(("number", "gone"), [(errno.EBADFD, True), (errno.EIO, False)])
async def test_a_device_that_is_gone_is_told_and_not_read_any_more(
    number: int, gone: bool, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    with monkeypatch.context() as patched:
        patched.setattr(os, "readv", refusing(number))
        device.kernel.send(HEADER)
        device.shell.start(loop)
        async with asyncio.timeout(10):
            while not device.shell.dropped:
                await asyncio.sleep(0.001)
    assert [error.errno for error in device.lost] == ([number] if gone else [])
    assert device.shell.dropped[f"tun-read-{errno.errorcode[number].lower()}"] >= 1
    if not gone:
        await device.until(1)
