"""Packets of ours for addresses that nobody known has, while a rendezvous is asked whose they are.

A node that has just joined is known to others a moment later; the first packets to its pods need not be lost.
"""

from __future__ import annotations

from collections import deque
from typing import Final

HOLD: Final = 3.0  # seconds that a packet waits
MAX_FRAMES: Final = 256
MAX_BYTES: Final = 256 * 1024


class Unclaimed:
    """A bounded queue of frames, the oldest given up first."""

    __slots__ = ("_frames", "_size")

    def __init__(self) -> None:
        self._frames: deque[tuple[float, bytes]] = deque()
        self._size = 0

    def hold(self, frame: bytes, at: float) -> None:
        """Keep a frame that came at `at`, in seconds of `now`."""
        self._frames.append((at, frame))
        self._size += len(frame)
        while len(self._frames) > MAX_FRAMES or self._size > MAX_BYTES:
            self._size -= len(self._frames.popleft()[1])

    def take(self, now: float) -> list[tuple[float, bytes]]:
        """Return the frames that are not too old, each with when it came, and forget all."""
        fresh = [(at, frame) for at, frame in self._frames if now - at <= HOLD]
        self._frames.clear()
        self._size = 0
        return fresh
