"""Processes as /proc shows them."""

from __future__ import annotations

from pathlib import Path


def descendants(process: int) -> set[int]:
    """Return a process and all that it started, directly or not."""
    found = {process}
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            found |= descendants(int(child))
    return found


def alive(processes: set[int]) -> set[int]:
    """Return those of some processes that there are, be it as what nobody has collected yet."""
    return {process for process in processes if Path(f"/proc/{process}").exists()}
