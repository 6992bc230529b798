"""The shell around the TUN device: reads frames into the data path's buffer, writes frames, counts
refusals.

Where the device is a veth pair, frames are read from one packet socket at its far end and written to another.
An Ethernet header lies between virtio header and packet there; it is put aside and put on here.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter
from collections.abc import Callable
from struct import Struct
from typing import Final

from crossedge.meshd.virtio import ETHERNET, NEEDS_CHECKSUM, PLAIN, SIZE

DRAIN_FRAMES: Final = 64  # read in one wake-up
DRAIN_BYTES: Final = 512 * 1024
LOOKS_SKIPPED: Final = 16  # at most, where looks have found nothing
ALONE: Final = 0.001  # seconds without frames after which the next is not kept to leave with others
GONE: Final = frozenset({errno.EBADF, errno.EBADFD, errno.ENODEV})
NO_MEMORY: Final = frozenset({errno.ENOBUFS, errno.ENOMEM, errno.EMSGSIZE})  # for so much at once
OUR_MAC: Final = bytes.fromhex("02ce5e000000")  # whence what is written comes: nobody answers it
_TYPES: Final = {4: b"\x08\x00", 6: b"\x86\xdd"}  # Ethernet's, by IP version
_CHECKSUM_START: Final = 6  # in the virtio header
_WORD = Struct("=H")


class TunShell:
    """One open TUN on one event loop."""

    def __init__(
        self,
        descriptor: int,
        buffer: bytearray,
        *,
        lone: Callable[[int, float], bool] = lambda *_: False,
        after: Callable[[], None] = lambda: None,
        outbound: Callable[[int, float], None],
        flush: Callable[[float], None],
        clock: Callable[[], float],
        lost: Callable[[OSError], None],
        vnet_header: bool = True,
        sender: int = -1,
        mac: bytes = b"",
    ) -> None:
        """Take a non-blocking descriptor; it stays the caller's to close, after `stop`.

        - `buffer`: where frames are read to; `outbound(length, now)` takes each, `flush(now)` ends a drain;
        - `lone(length, now)` takes the first after a while without, or of a look, if it can leave at once,
          without a drain;
          `after()`: it did;
        - `lost(error)`: the device is gone, reading has stopped;
        - `vnet_header`: whether frames have a virtio header; where not, one is put on and taken off here;
        - `sender`: where to write, if that is another descriptor: both are packet sockets of a veth pair
          then, and `mac` is the address of its near end.
        """
        self.dropped: Counter[str] = Counter()
        self._descriptor = descriptor
        self._buffer = buffer
        self._view = memoryview(buffer)
        self._skip = 0 if vnet_header else SIZE
        self._target: list[memoryview | bytearray] = [self._view[0 if vnet_header else SIZE :]]
        self._sender = sender
        self._links = {version: mac + OUR_MAC + kind for version, kind in _TYPES.items()}
        self.write: Callable[[memoryview], None] = self._write if sender < 0 else self._write_behind_link
        """Write one frame, virtio header first; a refusal is counted."""
        if sender >= 0:
            self._target = [self._view[:SIZE], bytearray(ETHERNET), self._view[SIZE:]]
        self._lone = lone
        self._after = after
        self._outbound = outbound
        self._flush = flush
        self._clock = clock
        self._lost = lost
        self._paused = False
        self._read_at = float("-inf")
        self._skips = 0
        self._skipped = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read from now on."""
        self._loop = loop
        loop.add_reader(self._descriptor, self._readable)

    def stop(self) -> None:
        """Do not read any more."""
        if self._loop is not None:
            self._loop.remove_reader(self._descriptor)
            self._loop = None

    def pause(self, yes: bool) -> None:
        """Leave frames in the device, which drops what overflows, while nothing can leave the host."""
        self._paused = yes
        if self._loop is None:
            return
        if yes:
            self._loop.remove_reader(self._descriptor)
        else:
            self._loop.add_reader(self._descriptor, self._readable)

    def _write(self, frame: memoryview) -> None:
        try:
            os.write(self._descriptor, frame[self._skip :] if self._skip else frame)
        except OSError as error:
            self.dropped[f"tun-write-{_name(error)}"] += 1

    def _write_behind_link(self, frame: memoryview) -> None:
        try:
            os.writev(self._sender, (frame[:SIZE], self._links[frame[SIZE] >> 4], frame[SIZE:]))
        except OSError as error:
            self.dropped[f"tun-write-{_name(error)}"] += 1

    def join(self, parts: list[memoryview]) -> bool:
        """Write one frame that is in parts to a veth pair; a refusal is counted.

        Returns whether that is done: False where the kernel has no memory for so much at once.
        """
        first = parts[0]
        try:
            os.writev(self._sender, (first[:SIZE], self._links[first[SIZE] >> 4], first[SIZE:], *parts[1:]))
        except OSError as error:
            if error.errno in NO_MEMORY:
                return False
            self.dropped[f"tun-write-{_name(error)}"] += 1
        return True

    def look(self) -> None:
        """Read what waits: what was written just now may have been answered at once.

        Where that is not so, again and again, one in so many looks is taken.
        """
        if self._loop is None or self._paused:
            return
        if self._skipped < self._skips:
            self._skipped += 1
            return
        self._skipped = 0
        self._skips = 0 if self._readable(looking=True) else min(2 * self._skips + 1, LOOKS_SKIPPED)

    def _readable(self, looking: bool = False) -> bool:
        """Read a drain; returns whether there was a frame."""
        now = self._clock()
        alone = now - self._read_at > ALONE
        offered = alone or looking
        total = 0
        skip = self._skip
        for _ in range(DRAIN_FRAMES):
            if skip:
                self._view[:skip] = PLAIN
            try:
                size = os.readv(self._descriptor, self._target)
            except BlockingIOError:
                if not total:
                    return False
                break
            except OSError as error:
                self.dropped[f"tun-read-{_name(error)}"] += 1
                if error.errno in GONE:
                    self.stop()
                    self._lost(error)
                break
            if self._sender >= 0:
                size -= ETHERNET
                if self._buffer[0] & NEEDS_CHECKSUM:
                    (start,) = _WORD.unpack_from(self._buffer, _CHECKSUM_START)
                    _WORD.pack_into(self._buffer, _CHECKSUM_START, start - ETHERNET)
            self._read_at = now
            if offered:
                if self._lone(size + skip, now):
                    self._after()
                    return True  # whatever else there is, the loop will tell
                offered = False
            self._outbound(size + skip, now)
            if alone:  # what a look at the empty device costs need not make it late
                alone = False
                self._flush(now)
                if self._loop is None:
                    return True  # that stopped us
            total += size
            if total >= DRAIN_BYTES or self._paused:
                break
        self._flush(now)
        return total > 0


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "error").lower()
