"""Waiting for the thing itself, within a bound: the one place where tests sleep between two looks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from crossedge.lab.pings import PingRun
from tests.fair_clock import FairClock

LOOK = 0.01
"""Seconds between looks at a condition."""


def until(what: str, condition: Callable[[], object], seconds: float) -> float:
    """Wait until a condition holds; return how many seconds that took; fail with `what` after `seconds`.

    The bar is for a machine that has time: `FairClock` adds what our processes waited for a processor.
    """
    clock = FairClock()
    while not condition():
        assert not clock.over(seconds), f"not within {seconds} s ({clock.passed:.1f} s passed): {what}"
        time.sleep(LOOK)
    return clock.passed


def eventually(condition: Callable[[], Any], seconds: float = 20.0, look: float = LOOK) -> Any:
    """Return what a condition returns once it is true, or last returned when so much time is over."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(look)
    return found


def answered(run: PingRun) -> int:
    """Return how many pings of a run have been answered until now."""
    return run.file.read_bytes().count(b" time=")
