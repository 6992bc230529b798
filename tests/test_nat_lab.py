"""Every pair of NAT kinds in namespaces with real sockets, the kernel's own masquerade among them.

    west ---- server-west (rendezvous)           a router of each kind in each region, a node behind each
      |  \\--- w-KIND-router ---- w-KIND
    east ---- server-east (rendezvous)
         \\--- e-KIND-router ---- e-KIND

Each pair meets once, no node in two pairs at a time. What came of it is written to build/nat-lab.json and
build/nat-lab.md.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from crossedge.lab.demo_mesh import Member
from crossedge.lab.natkinds import Allocation, Conntrack, NatKind, kind
from crossedge.lab.topology import KERNEL_NATS
from crossedge.meshd.peerservices import SPRAY_SPACING
from tests.daemon_fleet import Fleet, a_fleet
from tests.natmatrix import NAMES, pairs, punchable
from tests.underlays import EAST, WEST, backbone, behind, region, serving, underlay
from tests.waiting import eventually

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

KERNEL = ("kernel", "kernel-random", "kernel-fully-random")
KINDS = (*NAMES, *KERNEL)
AT_ONCE = 3  # pairs that meet at the same time: the NATs are one process
DIRECT_WITHIN = 100.0  # seconds: a spray waits for the one before, and may need a second try
READY_WITHIN = 180.0
LOOK = 0.2


@dataclass(frozen=True)
class Meeting:
    """What became of a pair."""

    a: str
    b: str
    theory: bool
    path: str
    seconds: float
    why: str


def topology() -> str:
    parts = []
    for place in (WEST, EAST):
        parts += [region(place), serving(f"server-{place}", place)]
        for nat in KINDS:
            name = f"{place[0]}-{nat}"
            parts += [behind(f"{name}-r", name, place=place, nat=nat)]
    return underlay("nats", *parts, backbone(WEST, EAST, delay_ms=10))


def modelled(name: str) -> NatKind:
    """Return the model of a kind, of the kernel's too."""
    if name not in KERNEL_NATS:
        return kind(name)
    allocation = Allocation.PRESERVING if name == "kernel" else Allocation.RANDOM
    return NatKind(name=name, about="", conntrack=Conntrack.DROP, allocation=allocation)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(topology(), tmp_path_factory.mktemp("nats"), start=False) as made:
        made.mesh.start(made.configs, ())

        def ready(member: Member) -> bool:
            status = made.status(member.name)
            if not status or status["peers"]["known"] < 2 * len(KINDS) - 1:
                return False
            registered = [server["state"] == "registered" for server in status["rendezvous"]]
            return registered == [True, True] and status["nat"]["mapping"] != "unknown"

        made.mesh.wait("every node is registered and has checked its NAT", ready, READY_WITHIN)
        yield made


def meet(fleet: Fleet, a: str, b: str) -> Meeting:
    """Let two nodes exchange data until both send it direct, or both say that they have given up."""
    one, two = nodes(a, b)
    count = int(DIRECT_WITHIN / LOOK)
    pings = fleet.pinging(one, two, count=count, interval=LOOK)
    path, why = "", ""

    def is_over() -> bool:
        nonlocal path, why
        if not pings.running:
            return True
        rows = fleet.peer(one, two), fleet.peer(two, one)
        path, why = str(rows[0].get("path")), str(rows[0].get("why_not_direct"))
        direct = all(row.get("path") == "direct" and row.get("time_to_direct_ms") for row in rows)
        return direct or all("when a network changes" in str(row.get("why_not_direct")) for row in rows)

    eventually(is_over, DIRECT_WITHIN, LOOK)
    took = [fleet.peer(*ends).get("time_to_direct_ms") for ends in ((one, two), (two, one))]
    seconds = max((float(each) / 1000 for each in took if each), default=0.0)
    pings.stop(after=1)
    return Meeting(a, b, punchable(modelled(a), modelled(b)), path, seconds, "" if path == "direct" else why)


def opener(a: str, b: str) -> int | None:
    """Return which of two nodes makes a birthday spray, 0 or 1; None where there is none."""
    kinds = modelled(a), modelled(b)
    if punchable(*kinds) or kinds[0].hard is kinds[1].hard:
        return None
    hard = 0 if kinds[0].hard else 1
    return hard if kinds[hard].allocation is Allocation.RANDOM else None


class Schedule:
    """Hands out every pair once: no node twice at a time, and no node's sprays closer than it makes them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting = [pair if n % 2 else pair[::-1] for n, pair in enumerate(pairs(KINDS))]
        self._waiting.sort(key=lambda pair: opener(*pair) is None)  # those that may have to wait come first
        self._busy: set[str] = set()
        self._sprayed: dict[str, float] = {}

    def take(self) -> tuple[str, str] | None:
        """Return the next pair, once one may begin; None where all have been handed out."""
        while True:
            with self._changed:
                if not self._waiting:
                    return None
                for pair in self._waiting:
                    names = nodes(*pair)
                    sprays = opener(*pair)
                    now = time.monotonic()
                    if self._busy.isdisjoint(names) and (
                        sprays is None or now >= self._sprayed.get(names[sprays], now)
                    ):
                        self._waiting.remove(pair)
                        self._busy.update(names)
                        return pair
                self._changed.wait(LOOK)

    def done(self, pair: tuple[str, str]) -> None:
        """Take note that a pair has met."""
        with self._changed:
            self._changed.notify_all()
            self._busy.difference_update(nodes(*pair))
            sprays = opener(*pair)
            if sprays is not None:
                self._sprayed[nodes(*pair)[sprays]] = time.monotonic() + SPRAY_SPACING


def nodes(a: str, b: str) -> tuple[str, str]:
    return f"w-{a}", f"e-{b}"


def work(fleet: Fleet, schedule: Schedule) -> list[Meeting]:
    """Let pairs meet, one after the other, until all have."""
    rows = []
    while (pair := schedule.take()) is not None:
        try:
            rows.append(meet(fleet, *pair))
        finally:
            schedule.done(pair)  # else who waits for these nodes would wait for ever
    return rows


def table(rows: list[Meeting]) -> str:
    """Return what each kind comes to with each other one: seconds to direct, or R for relay."""
    found = {(row.a, row.b): f"{row.seconds:.2f}" if row.path == "direct" else "R" for row in rows}
    lines = [f"| | {' | '.join(KINDS)} |", f"|---|{'---|' * len(KINDS)}"]
    for a in KINDS:
        cells = [found.get((a, b), found.get((b, a), "")) for b in KINDS]
        lines.append(f"| {a} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_every_pair_is_direct_where_theory_says_so_and_else_says_why_not(
    fleet: Fleet, repository: Path
) -> None:
    start = time.monotonic()
    schedule = Schedule()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = [row for part in pool.map(lambda _: work(fleet, schedule), range(AT_ONCE)) for row in part]
    rows.sort(key=lambda row: (KINDS.index(row.a), KINDS.index(row.b)))
    assert len(rows) == len(KINDS) * (len(KINDS) + 1) // 2
    took = time.monotonic() - start
    build = repository / "build"
    build.mkdir(exist_ok=True)
    (build / "nat-lab.md").write_text(table(rows))
    (build / "nat-lab.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    direct = [row for row in rows if row.path == "direct"]
    guessed = [row for row in direct if not row.theory]
    print(f"\n{len(rows)} pairs in {took:.0f} s: {len(direct)} direct, {len(guessed)} of them by a guess")
    for row in rows:
        if row.path != "direct":
            print(f"{row.a} - {row.b}: {row.path}: {row.why}")
    assert [row for row in rows if row.theory and row.path != "direct"] == []
    assert [row for row in rows if row.path != "direct" and (row.path != "relay" or not row.why)] == []
    hopeless = [row for row in rows if not row.theory and "when a network changes" in row.why]
    rest = [row for row in rows if not row.theory and row not in hopeless]
    assert len(guessed) >= 0.9 * len(rest), [row for row in rest if row.path != "direct"]


def test_no_router_was_flooded_and_no_socket_was_left(fleet: Fleet) -> None:
    for name, member in fleet.mesh.members.items():
        dropped = fleet.status(name).get("dropped", {})
        assert not dropped.get("send-emfile"), name
        process = member.process
        assert process is not None
        assert len(os.listdir(f"/proc/{process.pid}/fd")) < 100, name
