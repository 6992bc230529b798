"""How long a pair is dark after a fault: pings 10 ms apart both ways, their silences, a table of them."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

from crossedge.lab.pings import PingRun, Running
from tests.daemon_fleet import Fleet
from tests.waiting import eventually

INTERVAL = 0.01
RUNS = 20
BAR = 3.0
"""Seconds that the 95th percentile of a fault's dark times may be."""
QUIET = 1.0
"""Seconds for which all pings must have been answered before a fault."""
PHASE = 0.7
"""Most that a fault waits beyond that, at random, as faults come at any time between two heartbeats."""
WINDOW = 4.0
"""Seconds for which a pair is watched after a fault, at least: it must not go dark again."""
AT_MOST = 20.0
"""Seconds after which nobody waits any longer for a dark pair."""
STEADY_WITHIN = 90.0
LOOK = 0.1
COUNT = 20_000  # pings, more than any run takes
ANSWER = re.compile(rb"^\[(\d+\.\d+)\] .*icmp_seq=(\d+) .*time=", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two nodes, each behind a router of its own; the first has a second router beside."""

    number: int

    @property
    def a(self) -> str:
        """The one end."""
        return f"a{self.number}"

    @property
    def b(self) -> str:
        """The other end."""
        return f"b{self.number}"


class Watch:
    """A ping from one pod to another that goes on, and what it has heard."""

    def __init__(self, fleet: Fleet, source: str, address: str, file: Path) -> None:
        run = PingRun(fleet.member(source).pod, address, file, COUNT, INTERVAL, ("-D",))
        self._file = file
        self._running: Running = run.start(fleet.network)
        fleet.started.append(self._running)

    def answers(self) -> list[tuple[float, int]]:
        """Return when each answer came, in Unix time, and its number."""
        return [(float(at), int(number)) for at, number in ANSWER.findall(self._file.read_bytes())]

    def quiet_since(self, since: float) -> bool:
        """Tell whether answers have come without a gap worth the name from then until now."""
        times = [since, *(at for at, _ in self.answers() if at >= since), time.time()]
        return all(later - earlier < 0.2 for earlier, later in pairwise(times))

    def stop(self) -> None:
        """End it."""
        self._running.process.send_signal(signal.SIGINT)
        self._running.process.wait(5.0)
        self._running.close()

    def silence(self, since: float, until: float) -> tuple[float, int]:
        """Return the longest silence between two times, in seconds beyond the interval, and pings lost."""
        answers = self.answers()
        heard = [at for at, _ in answers if since <= at <= until]
        times = [since, *heard, *([until] if not heard or until - heard[-1] > 0.5 else [])]
        longest = max((later - earlier for earlier, later in pairwise(times)), default=0.0)
        numbers = {number for _, number in answers}
        before = max((number for at, number in answers if at < since), default=0)
        lost = sum(number not in numbers for number in range(before + 1, max(numbers, default=0)))
        return max(0.0, longest - INTERVAL), lost


Fault = Callable[[Fleet, Pair, int], float]
"""Does it to a pair, `int` times before; returns the Unix time from which on the pair could be answered."""


@dataclass(slots=True)
class Row:
    """A fault and what each of its runs cost."""

    fault: str
    counted_from: str
    dark: list[float] = field(default_factory=list)
    """Seconds without an answer, the longer of the two directions."""
    lost: list[int] = field(default_factory=list)
    """Pings without an answer, of both directions."""

    waits: dict[tuple[int, int], float] = field(default_factory=dict)
    """Seconds for which what was started was ready and got no processor, by pair and run; else 0."""
    fair: list[float] = field(default_factory=list)
    """The dark times less those: every host has processors of its own, and starts one daemon."""

    def share(self, part: float) -> float:
        """Return the smallest dark time that so large a part of the runs did not exceed."""
        return sorted(self.dark)[max(0, ceil(part * len(self.dark)) - 1)]

    def add(self, dark: float, lost: int, waited: float = 0.0) -> None:
        """Put down a run."""
        self.dark.append(dark)
        self.lost.append(lost)
        self.fair.append(dark - waited)

    @property
    def holds(self) -> bool:
        """Whether the bar is met."""
        worst = sorted(self.fair)[ceil(0.95 * len(self.fair)) - 1]
        return len(self.dark) >= RUNS and worst <= BAR

    def line(self) -> str:
        """Return the row of a table in Markdown."""
        lost = sorted(self.lost)[len(self.lost) // 2]
        times = " | ".join(f"{self.share(part):.2f}" for part in (0.5, 0.95, 1.0))
        return f"| {self.fault} | {self.counted_from} | {times} | {lost} | {max(self.lost)} |"

    def as_json(self) -> dict[str, Any]:
        """Return everything."""
        shares = {
            name: round(self.share(part), 3) for name, part in (("p50", 0.5), ("p95", 0.95), ("worst", 1))
        }
        return {
            "counted_from": self.counted_from,
            **shares,
            "holds": self.holds,
            "dark_less_waits_seconds": [round(each, 3) for each in self.fair],
            "dark_seconds": [round(each, 3) for each in self.dark],
            "pings_lost": self.lost,
        }


HEAD = """\
| fault | counted from | p50 s | p95 s | worst s | pings lost, median | worst |
|---|---|---|---|---|---|---|"""


def write(rows: Sequence[Row], file: Path) -> str:
    """Write all rows as JSON; return them as a table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figures = {"interval_s": INTERVAL, "bar_p95_s": BAR, "runs": RUNS}
    found = {
        "figures": {**figures, **{row.fault: row.as_json() for row in rows}},
        "ratios": {},
        "peers": {},
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    return "\n".join([HEAD, *(row.line() for row in rows)])


class Trial:
    """One run on one pair: pings both ways, a steady state, the fault, and how long it was dark."""

    def __init__(self, fleet: Fleet, pair: Pair, name: str) -> None:
        self.fleet = fleet
        self.pair = pair
        self.name = name
        self.watches = [
            Watch(fleet, pair.a, fleet.member(pair.b).pod4, fleet.output / f"{name}-{pair.a}.txt"),
            Watch(fleet, pair.b, fleet.member(pair.a).pod6, fleet.output / f"{name}-{pair.b}.txt"),
        ]

    def steady(self, path: str) -> None:
        """Wait until both use that path, both rendezvous know both, and no ping is missed for a while."""
        since: float | None = None
        fleet, (a, b) = self.fleet, (self.pair.a, self.pair.b)

        def settled() -> bool:
            nonlocal since
            now = time.time()
            ready = (
                fleet.path(a, b) == path
                and all(server_state(fleet, name) for name in (a, b))
                and all(watch.quiet_since(now - 2 * LOOK) for watch in self.watches)
            )
            since = (since or now) if ready else None
            return since is not None and now - since >= QUIET

        assert eventually(settled, STEADY_WITHIN, LOOK), (
            f"{self.name}: not steady within {STEADY_WITHIN} s: {fleet.path(a, b)}, "
            f"{fleet.peer(a, b)}, {fleet.peer(b, a)}"
        )

    def watch(self, since: float, window: float = WINDOW) -> tuple[float, int]:
        """Watch what the fault does, `window` seconds at least; return seconds of dark and pings lost."""

        def over() -> bool:
            now = time.time()
            return now >= since + window and all(watch.quiet_since(now - QUIET) for watch in self.watches)

        eventually(over, since + AT_MOST - time.time(), LOOK)
        end = time.time()
        found = [watch.silence(since, end) for watch in self.watches]
        return max(dark for dark, _ in found), sum(lost for _, lost in found)

    def stop(self) -> None:
        """End the pings."""
        for watch in self.watches:
            watch.stop()


def server_state(fleet: Fleet, name: str) -> bool:
    """Tell whether a node is registered with every rendezvous."""
    servers = fleet.status(name).get("rendezvous", ())
    return bool(servers) and all(server.get("state") == "registered" for server in servers)


def measure(
    fleet: Fleet,
    pairs: Sequence[Pair],
    row: Row,
    fault: Fault,
    heal: Callable[[Fleet, Pair, int], None] | None = None,
    window: float = WINDOW,
) -> None:
    """Do a fault to each pair, several times, the pairs beside each other; add what it cost to the row."""
    slug = re.sub(r"\W+", "-", row.fault)

    def one_pair(pair: Pair) -> list[tuple[float, int, float]]:
        found = []
        chance = random.Random(f"{slug} {pair.number}")
        for run in range(ceil(RUNS / len(pairs))):
            trial = Trial(fleet, pair, f"{slug}-{run}")
            try:
                trial.steady("direct")
                time.sleep(
                    chance.random() * PHASE
                )  # no condition: a fault comes at any time between heartbeats
                dark, lost = trial.watch(fault(fleet, pair, run), window)
            finally:
                trial.stop()
            found.append((dark, lost, row.waits.get((pair.number, run), 0.0)))
            if heal is not None:
                heal(fleet, pair, run)
        return found

    with ThreadPoolExecutor(len(pairs)) as pool:
        for each in pool.map(one_pair, pairs):
            for dark, lost, waited in each:
                row.add(dark, lost, waited)
