"""What the processor has."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def has_aes(cpuinfo: Path = CPUINFO) -> bool:
    """Tell whether the processor has AES instructions; where that is not known, it is taken not to."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return "aes" in value.split()
    return False
