"""Runs of ping between pods of a lab, their output kept in files and read back."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from crossedge.lab.network import Network

MARK = b"demo-plaintext!!"
"""Sixteen bytes that fill every ping, and are looked for on the WAN."""
SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) received")
REPLY = re.compile(r"icmp_seq=(\d+) .*time=([\d.]+) ms")


@dataclass(frozen=True, slots=True)
class PingResult:
    """What one run of ping saw."""

    sent: int
    received: int
    times: dict[int, float]
    """Round-trip time in milliseconds, by sequence number (from 1)."""

    @property
    def lost(self) -> int:
        """How many were not answered."""
        return self.sent - self.received

    @property
    def all(self) -> bool:
        """Tell whether every one was answered."""
        return self.sent > 0 and self.lost == 0

    @property
    def first_ms(self) -> float | None:
        """The time of the first packet; None if it was lost."""
        return self.times.get(1)

    @property
    def settled_ms(self) -> float | None:
        """The median of the later half: what the path is like once it is found."""
        later = [time for number, time in self.times.items() if number > self.sent / 2]
        return median(later) if later else None


def parse_ping(text: str) -> PingResult:
    """Return what the output of ping says; nothing sent where it says nothing."""
    summary = SUMMARY.search(text)
    times: dict[int, float] = {}
    for found in REPLY.finditer(text):
        times.setdefault(int(found[1]), float(found[2]))
    sent, received = (int(summary[1]), int(summary[2])) if summary else (0, 0)
    return PingResult(sent, received, times)


@dataclass(frozen=True, slots=True)
class PingRun:
    """A run to be made: from a pod to an address, `count` packets every `interval` seconds."""

    pod: str
    address: str
    file: Path
    count: int
    interval: float

    def start(self, network: Network) -> subprocess.Popen[bytes]:
        """Start it; its output goes to the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        words = ["ping", "-n", "-c", str(self.count), "-i", str(self.interval), "-W", "2", "-p", MARK.hex()]
        with self.file.open("wb") as output:
            return network.popen(
                self.pod,
                [*words, self.address],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )


def run_together(
    network: Network, runs: Iterable[PingRun], timeout: float = 30.0, apart: float = 0.0
) -> list[PingResult]:
    """Make runs at the same time, begun `apart` seconds after each other; return their results in order."""
    started: list[tuple[PingRun, subprocess.Popen[bytes]]] = []
    for run in runs:
        if started and apart:
            time.sleep(apart)
        started.append((run, run.start(network)))
    results = []
    for run, process in started:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        results.append(parse_ping(run.file.read_text(errors="replace")))
    return results
