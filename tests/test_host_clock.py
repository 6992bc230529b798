"""The clocks agree with each other."""

import ctypes
import time
from typing import Any

import pytest

from crossedge.host import clock
from crossedge.host.clock import boottime, realtime_offset


def test_boottime_and_offset_give_unix_time() -> None:
    before = time.time()
    unix = boottime() + realtime_offset()
    assert before - 0.05 <= unix <= time.time() + 0.05
    assert boottime() <= boottime()


@pytest.mark.parametrize(("status", "expected"), [(0x0001, True), (0x0041, False), (0x2040, False)])
def test_an_unsynchronised_clock_is_known_by_the_kernels_flag(
    monkeypatch: pytest.MonkeyPatch, status: int, expected: bool
) -> None:
    class Libc:
        def adjtimex(self, pointer: Any) -> int:
            pointer._obj.status = status
            return 0

    monkeypatch.setattr(clock, "_libc", Libc())
    assert clock.synchronised() is expected


def test_the_kernel_fills_the_fields_where_we_look_for_them() -> None:
    timex = clock._Timex()
    assert clock._libc.adjtimex(ctypes.byref(timex)) >= 0
    assert 0 <= timex.maxerror <= 16_000_000
    assert timex.status & ~0xFFFF == 0
