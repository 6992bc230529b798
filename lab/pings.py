"""Runs of ping between pods of a lab, their output kept in files and read back.

Once it has sent its last packet, ping waits for answers no longer than twice the longest round trip that it
saw. On a busy machine a short round trip's last answer may come later than that, and was not lost: so a
socket beside each ping hears what comes after its end.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from crossedge.lab.delayline import SO_RCVBUFFORCE, grow_buffer
from crossedge.lab.network import Network

MARK = b"demo-plaintext!!"
"""Sixteen bytes that fill every ping, and are looked for on the WAN."""
SUMMARY = re.compile(r"(\d+) packets transmitted, (\d+) received")
REPLY = re.compile(r"icmp_seq=(\d+) .*time=([\d.]+) ms")
LATE = re.compile(r"^icmp_seq=(\d+) was answered when ping had ended", re.MULTILINE)
PATIENCE = 2.0
"""Seconds for which answers are waited for after the end of a ping that misses some."""
ECHO_REPLY4, ECHO_REPLY6 = 0, 129
ICMP_FILTER = 1  # of both levels; a bit that is set keeps a type out
SOL_RAW = 255
LISTEN_BUFFER = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class PingResult:
    """What one run of ping saw."""

    sent: int
    received: int
    times: dict[int, float]
    """Round-trip time in milliseconds, by sequence number (from 1), of those that ping waited for."""
    late: tuple[int, ...] = ()
    """Sequence numbers that were answered when ping had ended; they count as received."""

    @property
    def lost(self) -> int:
        """How many were not answered."""
        return self.sent - self.received

    @property
    def missing(self) -> list[int]:
        """The sequence numbers of those."""
        came = {*self.times, *self.late}
        return [number for number in range(1, self.sent + 1) if number not in came]

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
    late = tuple(int(number) for number in LATE.findall(text))
    return PingResult(sent, received + len(late), times, late)


def open_listener(address: str) -> socket.socket:
    """Return a socket in this thread's namespace that hears the echo replies of one address."""
    six = ":" in address
    family, protocol = (
        (socket.AF_INET6, socket.IPPROTO_ICMPV6) if six else (socket.AF_INET, socket.IPPROTO_ICMP)
    )
    listener = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        listener.setblocking(False)
        reply, width = (ECHO_REPLY6, 256) if six else (ECHO_REPLY4, 32)
        kept_out = ((1 << width) - 1) ^ (1 << reply)
        level = socket.IPPROTO_ICMPV6 if six else SOL_RAW
        words = [kept_out >> at & 0xFFFFFFFF for at in range(0, width, 32)]
        listener.setsockopt(level, ICMP_FILTER, struct.pack(f"={len(words)}I", *words))
        grow_buffer(listener, SO_RCVBUFFORCE, socket.SO_RCVBUF, LISTEN_BUFFER)
        listener.connect((address, 0))
    except BaseException:
        listener.close()
        raise
    return listener


class Running:
    """A ping that goes on."""

    def __init__(self, run: PingRun, process: subprocess.Popen[bytes], listener: socket.socket) -> None:
        self.run = run
        self.process = process
        self._listener = listener

    def wait(self, timeout: float, patience: float = PATIENCE) -> PingResult:
        """Wait for its end and for late answers; return what came of it. What takes longer is killed."""
        try:
            self.process.wait(timeout)
            result = parse_ping(self.run.file.read_text(errors="replace"))
            if result.lost:
                late = self._late(set(result.missing), patience)
                with self.run.file.open("a") as file:
                    file.writelines(f"icmp_seq={each} was answered when ping had ended\n" for each in late)
                result = replace(result, received=result.received + len(late), late=tuple(late))
        except subprocess.TimeoutExpired:
            result = PingResult(0, 0, {})
        finally:
            self.close()
        return result

    def close(self) -> None:
        """Kill it, if it still goes on, and listen no more."""
        self.process.kill()
        self.process.wait()
        self._listener.close()

    def _late(self, missing: set[int], patience: float) -> list[int]:
        """Return which of these are answered within so many seconds."""
        late: list[int] = []
        end = time.monotonic() + patience
        while missing and (left := end - time.monotonic()) > 0:
            if not select.select([self._listener], (), (), left)[0]:
                break
            packet = self._listener.recv(2048)
            start = (packet[0] & 15) * 4 if self._listener.family == socket.AF_INET else 0
            number = int.from_bytes(packet[start + 6 : start + 8], "big")
            if number in missing:
                missing.remove(number)
                late.append(number)
        return late


@dataclass(frozen=True, slots=True)
class PingRun:
    """A run to be made: from a pod to an address, `count` packets every `interval` seconds."""

    pod: str
    address: str
    file: Path
    count: int
    interval: float
    options: tuple[str, ...] = ()
    """Further words for ping."""

    def start(self, network: Network) -> Running:
        """Start it; its output goes to the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        listener = network.site(self.pod).namespace.call(open_listener, self.address)
        words = ["ping", "-n", "-c", str(self.count), "-i", str(self.interval), "-W", "2", "-p", MARK.hex()]
        with self.file.open("wb") as output:
            process = network.popen(
                self.pod,
                [*words, *self.options, self.address],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        return Running(self, process, listener)


def run_together(
    network: Network, runs: Iterable[PingRun], timeout: float = 30.0, apart: float = 0.0
) -> list[PingResult]:
    """Make runs at the same time, begun `apart` seconds after each other; return their results in order."""
    started: list[Running] = []
    for run in runs:
        if started and apart:
            time.sleep(apart)  # what the caller asks for: begun all at once they would wait for processors
        started.append(run.start(network))
    return [running.wait(timeout) for running in started]
