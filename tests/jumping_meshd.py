"""Run `meshd` with a CLOCK_REALTIME that a file sets: jumping_meshd.py FILE WORD ...

Nothing but the machine's own clock could be set otherwise. The file is a double: the seconds that are added
to what this interpreter says of that clock; every other clock stays as it is, the kernel's stamps too.
"""

from __future__ import annotations

import mmap
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

OFFSET = struct.Struct("=d")


def set_offset(file: Path, seconds: float) -> None:
    """Have the clock of whoever runs with this file be ahead by so much."""
    with file.open("r+b" if file.exists() else "wb") as opened:
        opened.write(OFFSET.pack(seconds))


def main() -> None:
    """Put the clock that jumps in the place of the interpreter's; run the daemon."""
    with open(sys.argv[1], "rb") as opened:
        shared = mmap.mmap(opened.fileno(), OFFSET.size, prot=mmap.PROT_READ)
    right: Callable[[int], int] = time.clock_gettime_ns

    def clock_gettime_ns(clock: int) -> int:
        ahead: float = OFFSET.unpack_from(shared)[0] if clock == time.CLOCK_REALTIME else 0.0
        return right(clock) + int(ahead * 1e9)

    time.clock_gettime_ns = clock_gettime_ns
    time.clock_gettime = lambda clock: clock_gettime_ns(clock) / 1e9
    time.time_ns = lambda: clock_gettime_ns(time.CLOCK_REALTIME)
    time.time = lambda: clock_gettime_ns(time.CLOCK_REALTIME) / 1e9
    del sys.argv[1]
    from crossedge.meshd.main import main as meshd

    meshd()


if __name__ == "__main__":
    main()
