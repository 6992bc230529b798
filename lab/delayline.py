"""The delay line: joins pairs of links as a wire does, with delay, jitter, loss, reordering,
a rate and an MTU.

A process of its own. Of each wire both ends are veth ends in one namespace; frames are read from one by
AF_PACKET (with their virtio header, so that a train stays one frame) and written to the other when their time
has come.
Time counts from the kernel's receive stamp, so that a busy processor does not lengthen the wire.

The parent writes one JSON object per line to stdin and reads answers from stdout; the end of stdin ends the
process:  {"wires": [...], "namespace": fd}  {"set": NAME, ...}  {"stats": true}  {"trace": NAME}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from crossedge.host.namespaces import Namespace
from crossedge.lab.chance import Chance
from crossedge.lab.trains import VNET_SIZE, count, keep, too_big

ETH_P_ALL = 0x0003
SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_VNET_HDR = 15
PACKET_IGNORE_OUTGOING = 23
PACKET_QDISC_BYPASS = 20
SO_TIMESTAMPNS = 35
SO_RCVBUFFORCE = 33
SO_SNDBUFFORCE = 32
PR_SET_TIMERSLACK = 29
STAMP = struct.Struct("=qq")
ANCILLARY = socket.CMSG_SPACE(STAMP.size)

FRAMES_PER_TURN = 64
READ_BUFFER = 16 * 1024 * 1024
FRAME_LIMIT = 1 << 17
HELD_LIMIT = 256 * 1024 * 1024
"""Most bytes that all wires hold; more are dropped."""
STAMP_TRUST_NS = 2_000_000_000
LATE_SAMPLES = 8192


@dataclass(frozen=True, slots=True)
class Treatment:
    """What one direction of a wire does; nanoseconds, bytes, shares."""

    delay: int = 0
    jitter: int = 0
    loss: float = 0.0
    reorder: float = 0.0
    behind: int = 0
    """How long what is reordered is held back."""
    rate: float | None = None
    queue: int = 512 * 1024
    mtu: int = 65_535
    mtu_icmp: bool = True
    cut: bool = False

    @classmethod
    def of(cls, given: dict[str, Any]) -> Treatment:
        """Make one of the keys of a topology's `Conditions`, and `cut`."""
        rate = given.get("rate_mbit")
        return cls(
            delay=int(given.get("delay_ms", 0) * 1e6),
            jitter=int(given.get("jitter_ms", 0) * 1e6),
            loss=given.get("loss", 0.0),
            reorder=given.get("reorder", 0.0),
            behind=int(given.get("reorder_ms", 0) * 1e6),
            rate=None if rate is None else rate * 1e6 / 8 / 1e9,
            queue=given.get("queue_kib", 512) * 1024,
            mtu=given.get("mtu", 65_535),
            mtu_icmp=given.get("mtu_icmp", True),
            cut=given.get("cut", False),
        )


class Direction:
    """One direction of a wire: frames that wait, and what was counted."""

    __slots__ = (
        "back",
        "busy_until",
        "chance",
        "counts",
        "dropped",
        "held",
        "late",
        "queue",
        "receiver",
        "residence",
        "sender",
        "treatment",
    )

    def __init__(
        self, receiver: socket.socket, sender: socket.socket, treatment: Treatment, chance: Chance
    ) -> None:
        self.receiver = receiver
        self.sender = sender
        self.treatment = treatment
        self.chance = chance
        self.queue: deque[tuple[int, int, bytes]] = deque()
        self.back: deque[tuple[int, int, bytes]] = deque()
        """What is held back, so that others overtake it."""
        self.held = 0
        self.busy_until = 0
        self.counts: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.late: deque[int] = deque(maxlen=LATE_SAMPLES)
        """By how much each of the last frames left after its time, in nanoseconds."""
        self.residence: deque[tuple[int, int, int]] = deque(maxlen=LATE_SAMPLES)
        """Of each of the last frames: the kernel's stamp, its bytes, and how long it was here, from the stamp
        to the end of its write; times in nanoseconds."""

    def admit(self, frame: bytes, stamp: int) -> None:
        """Drop a frame, or parts of it, or hold it until its time."""
        treatment = self.treatment
        packets, largest = count(frame)
        self.counts["frames"] += 1
        self.counts["packets"] += packets
        self.counts["bytes"] += len(frame) - VNET_SIZE
        if treatment.cut:
            self.dropped["cut"] += packets
            return
        if largest > treatment.mtu:
            self.dropped["mtu"] += packets
            answer = too_big(frame, treatment.mtu) if treatment.mtu_icmp else None
            if answer is not None:
                self.write(answer, self.receiver)
            return
        frames = [frame]
        if treatment.loss:
            kept = [self.chance.uniform() >= treatment.loss for _ in range(packets)]
            lost = packets - sum(kept)
            if lost:
                self.dropped["loss"] += lost
                frames = keep(frame, kept)
        for part in frames:
            if not treatment.reorder:
                self._hold(part, stamp)
                continue
            late = [self.chance.uniform() < treatment.reorder for _ in range(count(part)[0])]
            self.counts["reordered"] += sum(late)
            for those in keep(part, [not each for each in late]):
                self._hold(those, stamp)
            for those in keep(part, late):
                self._hold(those, stamp, treatment.behind)

    def _hold(self, frame: bytes, stamp: int, behind: int = 0) -> None:
        treatment = self.treatment
        depart = stamp
        if treatment.rate is not None:
            depart = max(stamp, self.busy_until)
            if (depart - stamp) * treatment.rate > treatment.queue:
                self.dropped["queue"] += count(frame)[0]
                return
            depart += int((len(frame) - VNET_SIZE) / treatment.rate)
            self.busy_until = depart
        depart += treatment.delay
        if treatment.jitter:
            depart += int(treatment.jitter * self.chance.uniform())
        queue = self.back if behind else self.queue
        depart += behind
        if queue and queue[-1][0] > depart:
            depart = queue[-1][0]
        queue.append((depart, stamp, frame))
        self.held += len(frame)

    def release(self, now: int) -> None:
        """Write what is due."""
        for queue in (self.queue, self.back):
            while queue and queue[0][0] <= now:
                due, stamp, frame = queue.popleft()
                self.held -= len(frame)
                self.write(frame, self.sender)
                self.late.append(now - due)
                self.residence.append((stamp, len(frame) - VNET_SIZE, time.time_ns() - stamp))

    def due(self) -> Iterable[int]:
        """Yield when the next frames are due, in nanoseconds."""
        for queue in (self.queue, self.back):
            if queue:
                yield queue[0][0]

    def write(self, frame: bytes, sender: socket.socket) -> None:
        """Write one frame; what the kernel refuses is counted."""
        try:
            sender.send(frame)
        except OSError as error:
            self.dropped[f"write: {os.strerror(error.errno or 0)}"] += 1

    def stats(self) -> dict[str, Any]:
        """Return counts, drops by reason, and how long frames were here and how late they left (us)."""
        overrun = struct.unpack("=II", self.receiver.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]
        self.dropped["overrun"] += overrun
        return {
            **self.counts,
            "dropped": {name: number for name, number in self.dropped.items() if number},
            "held": len(self.queue) + len(self.back),
            "late_us": quantiles(self.late),
            "residence_us": quantiles(here for _, _, here in self.residence),
        }


def quantiles(nanoseconds: Iterable[int]) -> dict[str, int | None]:
    """Return median, 99th percentile and maximum in microseconds; None where there is nothing."""
    ordered = sorted(nanoseconds)
    if not ordered:
        return {"p50": None, "p99": None, "max": None}
    at = {"p50": len(ordered) // 2, "p99": int(len(ordered) * 0.99), "max": -1}
    return {name: round(ordered[index] / 1000) for name, index in at.items()}


class DelayLine:
    """All wires of a lab."""

    def __init__(self, seed: int = 1) -> None:
        self.directions: dict[str, tuple[Direction, Direction]] = {}
        self.chance = Chance(seed)
        self._readers: dict[int, Direction] = {}

    def add(self, name: str, ends: tuple[str, str], treatment: Treatment) -> None:
        """Join two interfaces of this thread's namespace."""
        a, b = (open_end(end) for end in ends)
        pair = (
            Direction(a, b, treatment, self.chance.fork(f"{name} a")),
            Direction(b, a, treatment, self.chance.fork(f"{name} b")),
        )
        self.directions[name] = pair
        for direction in pair:
            self._readers[direction.receiver.fileno()] = direction

    def set(self, name: str, treatment: Treatment, way: str = "both") -> None:
        """Change what a wire does: to "both" directions, or to what comes in at end "a" or "b"."""
        for end, direction in zip("ab", self.directions[name], strict=True):
            if way in ("both", end):
                direction.treatment = treatment

    def stats(self) -> dict[str, Any]:
        """Return the counts of every wire, for what came in at either end."""
        return {name: {"a": a.stats(), "b": b.stats()} for name, (a, b) in self.directions.items()}

    def run(self, control: int) -> None:
        """Carry frames until the control descriptor ends; obey what is written to it."""
        pending = b""
        readers = [control, *self._readers]
        scratch = bytearray(FRAME_LIMIT)
        while True:
            now = time.time_ns()
            due = min((when for d in self._readers.values() for when in d.due()), default=None)
            timeout = None if due is None else max(0.0, (due - now) / 1e9)
            ready, _, _ = select.select(readers, (), (), timeout)
            for descriptor in ready:
                if descriptor != control:
                    self._read(self._readers[descriptor], scratch)
                    continue
                data = os.read(control, 65_536)
                if not data:
                    return
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    answer(self._obey(json.loads(line)))
            now = time.time_ns()
            for direction in self._readers.values():
                direction.release(now)

    def _read(self, direction: Direction, scratch: bytearray) -> None:
        receive = direction.receiver.recvmsg_into
        view = memoryview(scratch)
        held = sum(d.held for d in self._readers.values())
        for _ in range(FRAMES_PER_TURN):
            try:
                size, ancillary, _, _ = receive([scratch], ANCILLARY)
            except BlockingIOError:
                return
            except OSError as error:  # the link went down or away
                direction.dropped[f"read: {os.strerror(error.errno or 0)}"] += 1
                return
            now = time.time_ns()
            stamp = now
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == SO_TIMESTAMPNS:
                    seconds, nanoseconds = STAMP.unpack(data)
                    stamp = seconds * 1_000_000_000 + nanoseconds
            if not now - STAMP_TRUST_NS < stamp <= now:
                stamp = now
            held += size
            if held > HELD_LIMIT:
                direction.dropped["memory"] += 1
                continue
            direction.admit(bytes(view[:size]), stamp)

    def _obey(self, order: dict[str, Any]) -> dict[str, Any]:
        if "set" in order:
            if order["set"] not in self.directions:
                return {"error": f"no wire {order['set']!r}"}
            self.set(order["set"], Treatment.of(order.get("conditions", {})), order.get("way", "both"))
            return {"ok": True}
        if "trace" in order:
            pair = self.directions[order["trace"]]
            return {"ok": True, "a": list(pair[0].residence), "b": list(pair[1].residence)}
        if "stats" in order:
            return {"ok": True, "wires": self.stats()}
        return {"error": "not understood"}


def grow_buffer(end: socket.socket, force: int, plain: int, size: int) -> None:
    """Ask for a socket buffer of so many bytes, beyond the machine's limit only where we may (real root)."""
    try:
        end.setsockopt(socket.SOL_SOCKET, force, size)
    except OSError:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, plain, size)


def open_end(interface: str) -> socket.socket:
    """Return a packet socket on one end of a wire, with virtio headers and kernel receive stamps."""
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        end.setblocking(False)
        end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        end.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        end.setsockopt(SOL_PACKET, PACKET_QDISC_BYPASS, 1)
        end.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        grow_buffer(end, SO_RCVBUFFORCE, socket.SO_RCVBUF, READ_BUFFER)
        grow_buffer(end, SO_SNDBUFFORCE, socket.SO_SNDBUF, READ_BUFFER)
        end.bind((interface, ETH_P_ALL))
    except BaseException:
        end.close()
        raise
    return end


def answer(message: dict[str, Any]) -> None:
    """Write one line of JSON to stdout, if anybody still reads there."""
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def main() -> None:
    """Run as `python -m crossedge.lab.delayline`, with orders on stdin."""
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    control = sys.stdin.fileno()
    text = b""
    while not text.endswith(b"\n"):  # unbuffered, as the descriptor belongs to `run` afterwards
        text += os.read(control, 65_536) or b"\n"
    if not text.strip():
        return  # who started it has ended already
    first = json.loads(text)
    Namespace(first["namespace"]).enter()
    line = DelayLine(first.get("seed", 1))
    for wire in first["wires"]:
        line.add(wire["name"], (wire["a"], wire["b"]), Treatment.of(wire["conditions"]))
    answer({"ok": True})
    with contextlib.suppress(KeyboardInterrupt):
        line.run(control)


if __name__ == "__main__":
    main()
