"""State is written in order, off the loop, and no oftener than flash likes; a full disk stops nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crossedge.meshd.keeper import PACE, SOON, TIME_AGAIN, Keeper
from crossedge.meshd.state import StateStore
from crossedge.wire.endpoint import UdpEndpoint

RECORDS = ((b"record one", b"certificate one"),)
MORE = (*RECORDS, (b"record two", b"certificate two"))
ACTIVE = ((b"n" * 16, UdpEndpoint("192.0.2.1", 7)), (b"m" * 16, None))


class Disk(StateStore):
    """A store that tells what is written, by whom, and that can be full, or slow."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.written: list[str] = []
        self.threads: set[int] = set()
        self.full = False
        self.slow = threading.Event()
        self.slow.set()

    def _note(self, what: str) -> None:
        self.slow.wait(10)
        self.threads.add(threading.get_ident())
        if self.full:
            raise OSError(28, "No space left on device")
        self.written.append(what)

    def save_members(self, *arguments: object) -> None:
        self._note("members")

    def save_time(self, unix: float) -> None:
        self._note(f"time {unix:.0f}")

    def save_blocklist(self, encoded: bytes) -> None:
        self._note("blocklist")

    def reserve(self, bound: int) -> None:
        self._note(f"bound {bound}")
        self.sequence = bound


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with Disk(tmp_path) as opened:
        yield opened


def kept(disk: Disk, *work: Callable[[Keeper], object]) -> list[str]:
    """Do some work with a fresh keeper and close it; return what was written."""
    keeper = Keeper(disk)
    for each in work:
        each(keeper)
    keeper.close()
    return disk.written


def test_nothing_waits_for_a_slow_disk_and_all_is_written_in_order(disk: Disk) -> None:
    disk.slow.clear()
    keeper = Keeper(disk)
    keeper.members(RECORDS, ACTIVE, 1.0)
    keeper.blocklist(b"signed")
    keeper.time(5.0, 1.0)
    assert disk.written == []
    disk.slow.set()
    keeper.close()
    assert disk.written == ["members", "blocklist", "time 5"]
    assert threading.get_ident() not in disk.threads


def test_members_are_written_only_when_they_are_others(disk: Disk) -> None:
    keeper = Keeper(disk)
    assert not keeper.has_active(ACTIVE)
    keeper.members(RECORDS, ACTIVE, 1.0)
    keeper.members(RECORDS, ACTIVE[::-1], 2.0)
    assert keeper.has_active(ACTIVE[::-1])
    assert not keeper.has_active(ACTIVE[:1])
    keeper.members(MORE, ACTIVE, 3.0)
    keeper.close()
    assert disk.written == ["members", "members"]


def test_a_change_is_written_soon_but_a_large_mesh_not_again_and_again(disk: Disk) -> None:
    keeper = Keeper(disk)
    assert keeper.delay(100.0) == SOON
    keeper.members(RECORDS, ACTIVE, 100.0)
    assert keeper.delay(100.0) == SOON
    keeper.members(((bytes(20 * PACE), b""), *RECORDS), ACTIVE, 100.0)
    assert 18.0 <= keeper.delay(102.0) <= 18.1
    assert keeper.delay(200.0) == SOON
    keeper.close()


def test_the_time_is_written_now_and_then_and_at_the_end(disk: Disk) -> None:
    assert kept(
        disk,
        lambda keeper: keeper.time(1000.0, 0.0),
        lambda keeper: keeper.time(1060.0, 60.0),
        lambda keeper: keeper.time(1600.0, TIME_AGAIN),
        lambda keeper: keeper.time(1601.0, TIME_AGAIN + 1.0, last=True),
    ) == ["time 1000", "time 1600", "time 1601"]


def test_a_full_disk_is_told_once_and_what_it_refused_is_written_later(
    disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    durable: list[int] = []
    disk.full = True
    keeper = Keeper(disk)
    with caplog.at_level(logging.ERROR):
        keeper.reserve_now(7)
        keeper.members(RECORDS, ACTIVE, 1.0)
        keeper.reserve(0, durable.append)
        keeper.wait()
    assert [record.getMessage() for record in caplog.records] == [
        "state cannot be written: [Errno 28] No space left on device"
    ]
    disk.full = False
    keeper.members(RECORDS, ACTIVE, 2.0)
    keeper.reserve(0, durable.append)
    keeper.close()
    assert disk.written == ["members", "bound 7"]
    assert durable == [7]
