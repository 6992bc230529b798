"""The clocks: one that only goes forward, and one that may be wrong."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

STA_UNSYNC = 0x0040
TRIES = 3

_libc = ctypes.CDLL(None, use_errno=True)


class _Timex(ctypes.Structure):
    """The head of struct timex (adjtimex(2)) and room for its tail."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


boottime: Callable[[], float] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)
"""Return seconds since boot, suspension included: `now` of all our cores."""


def process_start(process: int | str = "self") -> float:
    """Return when a process was started, in seconds since boot, rounded up to a tick; raises `OSError`."""
    text = Path(f"/proc/{process}/stat").read_text()
    ticks = int(text.rpartition(")")[2].split()[19])  # field 22 of proc_pid_stat(5)
    return (ticks + 1) / os.sysconf("SC_CLK_TCK")


def realtime_offset() -> float:
    """Return what must be added to `boottime` to get Unix time, in seconds, as the machine has it now.

    Reading two clocks takes time, in which we may be interrupted; the tightest of a few tries is taken.
    """
    best = (float("inf"), 0.0)
    for _ in range(TRIES):
        before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        unix = time.clock_gettime_ns(time.CLOCK_REALTIME)
        after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        best = min(best, (after - before, (2 * unix - before - after) / 2e9))
    return best[1]


def synchronised() -> bool:
    """Tell whether something (NTP, PTP) keeps the clock right, as far as the kernel knows."""
    timex = _Timex()
    if _libc.adjtimex(ctypes.byref(timex)) < 0:
        return False
    return not timex.status & STA_UNSYNC
