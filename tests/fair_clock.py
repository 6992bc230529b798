"""Time that a test may hold against the code: what passed, less what its processes waited for a processor.

A bar in seconds is for a machine that has time for what is measured. Where others keep its processors busy,
or the host of a virtual machine takes them away, the kernel says for how long every task was ready and did
not run (`/proc/PID/schedstat`, the "steal" of `/proc/stat`); on a quiet machine that is next to nothing.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
LONGEST = 90.0
"""Seconds that may pass beside those of a bar, however busy the machine is."""


class FairClock:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._waits = _waits()
        self._stolen = _stolen()

    @property
    def passed(self) -> float:
        """Seconds that passed."""
        return time.monotonic() - self._start

    @property
    def waited(self) -> float:
        """Seconds for which our tasks were ready and did not run; those that have ended are not counted."""
        found = sum(wait - self._waits.get(task, 0.0) for task, wait in _waits().items())
        return found + _stolen() - self._stolen

    def over(self, seconds: float) -> bool:
        """Tell whether a bar of so many seconds is missed."""
        passed = self.passed
        return passed > seconds and (passed > seconds + LONGEST or passed - self.waited > seconds)


def _waits() -> dict[str, float]:
    """Return the seconds that each task waited: of the tests' own, as /proc shows no others."""
    found = {}
    for process in PROC.iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):
            for task in (process / "task").iterdir():
                with suppress(OSError, IndexError):
                    found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
    return found


def _stolen() -> float:
    """Return the seconds that the host took from our processors."""
    with (PROC / "stat").open() as lines:
        fields = lines.readline().split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0
