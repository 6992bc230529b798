"""What daemons report of latency, against the delay that the lab's router really imposed on the same packets.

    meeting --- [a] === 10 ms === [b] --- far          Every wire's process stamps frames as the kernel
                 |                                     received them and notes when it has written them.
        left --- [a] === 0.4 ms == [c] --- near

The heartbeats' frames are told by their size, so each answered probe has its truth: how long the wire had the
probe and its answer. The error is of each probe alone; a minimum over many is nearer still.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest

from crossedge.meshd.inner import REPLY_MIN
from crossedge.meshd.path import HEARTBEAT_SIZE
from tests.daemon_fleet import Fleet, a_fleet
from tests.underlays import backbone, node, region, serving, underlay
from tests.waiting import until

pytestmark = pytest.mark.namespaces

HEADERS = 14 + 20 + 8  # Ethernet, IPv4, UDP
PROBE, REPLY = HEADERS + HEARTBEAT_SIZE, HEADERS + REPLY_MIN
BAR_MS, BAR_SHARE = 0.3, 0.02
PROBES = 8
BATCHES = 3  # where the machine stalls, so many times the probes; the median is then that of all
FOLLOWS_NS = 2_000_000_000
TOPOLOGY = underlay(
    "accuracy",
    *map(region, "abc"),
    backbone("a", "b", delay_ms=10),
    backbone("a", "c", delay_ms=0.4),
    serving("meeting", "a"),
    *(node(name, place, ipv6=False) for name, place in (("left", "a"), ("far", "b"), ("near", "c"))),
)
HEARTBEATS_ONLY = "[latency]\nprobe = false\n"
WIRES = {"far": "a-b", "near": "a-c"}


@contextmanager
def busy_processors() -> Iterator[None]:
    """Keep both processors, and more, busy."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def imposed(fleet: Fleet, wire: str, since: int) -> list[float]:
    """Return what the wire imposed on each of `left`'s answered heartbeats since a Unix time, in seconds."""
    trace = fleet.network.trace(wire)
    answers = [(at, here) for at, size, here in trace["b"] if size == REPLY]
    found = []
    for at, size, here in trace["a"]:
        if size != PROBE or at < since:
            continue
        back = next(
            (held for when, held in answers if at + here <= when + 1_000_000 <= at + FOLLOWS_NS), None
        )
        if back is not None:
            found.append((here + back) / 1e9)
    return found


def latest(fleet: Fleet) -> dict[str, tuple[int, float]]:
    """Return by peer how many of `left`'s probes were answered in all, and the last RTT in milliseconds."""
    rows = fleet.member("left").ask("latency")["pairs"]
    return {row["name"]: (row["answers"], row["rtt_latest_ms"]) for row in rows}


def errors(fleet: Fleet) -> dict[str, tuple[float, float, list[float]]]:
    """Return by peer the median error, the bar for it, and each probe's error; milliseconds."""
    found: dict[str, tuple[float, float, list[float]]] = {}
    for _ in range(BATCHES):
        for name, (real, each) in batch(fleet).items():
            every = [*(found[name][2] if name in found else ()), *each]
            found[name] = median(every), max(BAR_MS, BAR_SHARE * real), every
        if all(error <= bar for error, bar, _ in found.values()):
            break
    return found


def batch(fleet: Fleet) -> dict[str, tuple[float, list[float]]]:
    """Return by peer the median of the delays imposed, and each probe's error; milliseconds."""
    since = time.time_ns()
    first = {name: answers for name, (answers, _) in latest(fleet).items()}
    seen: dict[str, dict[int, float]] = {name: {} for name in WIRES}

    def enough() -> bool:
        for name, (answers, rtt) in latest(fleet).items():
            if answers > first[name]:
                seen[name][answers] = rtt
        return min(map(len, seen.values())) >= PROBES

    until(f"{PROBES} probes to each", enough, 60.0)
    found = {}
    for name, wire in WIRES.items():
        real = [value * 1000 for value in imposed(fleet, wire, since)]
        reported = [seen[name][number] for number in sorted(seen[name])]
        count = min(len(real), len(reported))  # the last ones are the last ones of both
        assert count >= PROBES - 2
        each = [abs(a - b) for a, b in zip(reported[-count:], real[-count:], strict=True)]
        found[name] = median(real), each
    return found


def test_reported_rtt_is_the_delay_that_was_imposed_also_on_busy_processors(tmp_path: Path) -> None:
    configs = dict.fromkeys(("left", *WIRES), HEARTBEATS_ONLY)
    with a_fleet(TOPOLOGY, tmp_path, configs=configs) as fleet:
        for other in WIRES:
            fleet.go_direct("left", other)
        runs = [fleet.pinging("left", other, count=100, interval=1.0) for other in WIRES]
        found = {f"{name}, idle": error for name, error in errors(fleet).items()}
        with busy_processors():
            found |= {f"{name}, busy": error for name, error in errors(fleet).items()}
        assert all(run.running for run in runs)
        answer = fleet.command("left", "crossedge", "latency", "--json")
    for name, (error, bar, each) in found.items():
        print(f"{name}: median error {error:.3f} ms, at most {bar:.3f}; {[round(one, 3) for one in each]}")
    assert all(error <= bar for error, bar, _ in found.values()), found
    pairs = {row["name"]: row for row in json.loads(answer.stdout)["pairs"]}
    assert {row["state"] for row in pairs.values()} == {"direct"}
    # Of many probes the least is nearer still: 20 ms and 0.8 ms are what the wires have by themselves.
    assert pairs["far"]["rtt_min_ms"] == pytest.approx(20.2, abs=0.4)
    assert pairs["near"]["rtt_min_ms"] == pytest.approx(1.0, abs=0.4)
