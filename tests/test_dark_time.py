"""For how long a pair is dark after a fault, with real daemons, real namespaces and the kernel's NAT.

    west ---- server-west (rendezvous)          east ---- server-east (rendezvous)
      |  \\--- homeN (kernel) ---- aN              \\------ shopN (kernel) ---- bN
       \\---- spareN (kernel) ----'

The relayed pairs' routers give each destination another random port (kernel-fully-random), and have no spare.
Pods ping each other every 10 ms, both ways (one by IPv4, one by IPv6), from a steady state on. Each fault is
done 20 times, to several pairs beside each other. Dark is the longest time without an answer after it, beyond
the interval, in the worse direction; the table and build/bench/dark_time.json say what it is counted from.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from crossedge.lab.demo_mesh import CONFIG, Member
from crossedge.meshd.daemon import CLOCK_INTERVAL
from tests import jumping_meshd
from tests.daemon_fleet import Fleet, a_fleet, plug_in
from tests.dark_time import BAR, LOOK, RUNS, STEADY_WITHIN, Pair, Row, Trial, measure, server_state, write
from tests.jumping_meshd import set_offset
from tests.waiting import until

pytestmark = [pytest.mark.namespaces, pytest.mark.slow, pytest.mark.tool("conntrack")]

PAIRS = [Pair(number) for number in range(5)]
RELAYED = PAIRS[:4]
RESTARTED = PAIRS[:3]
"""As many as it takes to have one ready whenever another is back; the fewer, the less they get in the way."""
POWER_OFF = 2.0
"""Seconds for which a router that is rebooted carries nothing."""
HOUR = 3600
CLOCK_SEEN = CLOCK_INTERVAL + 2.0
"""Seconds after which a daemon has looked at its clock again and has done what follows from it."""
NICE = -10
"""Priority of all that takes part: the daemon's unit gives it this one; what measures must not wait."""
MEND = "nft delete table ip fault"
ROWS: list[Row] = []


def topology(nat: str, pairs: list[Pair], *, spare: bool) -> str:
    text = 'name = "dark"\n'
    for region in ("west", "east"):
        text += f'[[region]]\nname = "{region}"\n'
        text += f'[[node]]\nname = "server-{region}"\nrole = "server"\nregion = "{region}"\n'
    for pair in pairs:
        for router, region in (("home", "west"), ("shop", "east"), ("spare", "west")):
            if router != "spare" or spare:
                name = f"{router}{pair.number}"
                text += f'[[router]]\nname = "{name}"\nregion = "{region}"\nnat = "{nat}"\n'
        for node, router in ((pair.a, "home"), (pair.b, "shop")):
            text += f'[[node]]\nname = "{node}"\nrouter = "{router}{pair.number}"\n'
    return text + '[[backbone]]\nbetween = ["west", "east"]\nlink = { delay_ms = 10 }\n'


@contextmanager
def started(text: str, output: Path) -> Iterator[Fleet]:
    """Start a fleet; every node is registered with both rendezvous and has checked its NAT."""
    with suppress(PermissionError):  # of an ordinary user
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    with a_fleet(text, output) as made:

        def ready(member: Member) -> bool:
            return server_state(made, member.name) and made.status(member.name)["nat"]["mapping"] != "unknown"

        made.mesh.wait("every node is registered and has checked its NAT", ready, STEADY_WITHIN)
        yield made


@pytest.fixture(scope="session", autouse=True)
def report(repository: Path) -> Iterator[None]:
    """Show all rows at the end, and keep them."""
    yield
    if ROWS:
        file = repository / "build" / "bench" / "dark_time.json"
        print(f"\n{write(ROWS, file)}\n{RUNS} runs of each; {file.relative_to(repository)} has every run")


def judge(row: Row) -> None:
    """Keep a row; fail if its bar is not met."""
    ROWS.append(row)
    print(f"\n{row.line()}")
    runs = " ".join(f"{each:.2f}" for each in row.dark)
    assert len(row.dark) >= RUNS
    assert row.holds, f"{row.fault}: dark for {row.share(0.95):.2f} s at p95, {BAR} s allowed; runs: {runs}"


class TestDirect:
    """What befalls pairs that are direct."""

    @pytest.fixture(scope="class")
    @classmethod
    def fleet(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
        with started(topology("kernel", PAIRS, spare=True), tmp_path_factory.mktemp("dark")) as made:
            for pair in PAIRS:
                plug_in(made, pair.a, f"spare{pair.number}")
            yield made

    def test_nat_mapping_is_flushed(self, fleet: Fleet) -> None:
        def flush(fleet: Fleet, pair: Pair, run: int) -> float:
            at = time.time()
            fleet.run(f"home{pair.number}" if run % 2 else f"shop{pair.number}", "conntrack -F")
            return at

        row = Row("NAT mappings flushed", "the flush")
        measure(fleet, PAIRS, row, flush)
        judge(row)

    def test_nat_is_rebooted(self, fleet: Fleet) -> None:
        def reboot(fleet: Fleet, pair: Pair, run: int) -> float:
            router = f"home{pair.number}" if run % 2 else f"shop{pair.number}"
            block(fleet, router, "drop")
            time.sleep(POWER_OFF)
            fleet.run(router, "conntrack -F")
            fleet.run(router, MEND)
            return time.time()

        row = Row("NAT rebooted", f"its return, {POWER_OFF:.0f} s after it went")
        measure(fleet, PAIRS, row, reboot)
        judge(row)

    def test_nat_gets_another_address(self, fleet: Fleet) -> None:
        def readdress(fleet: Fleet, pair: Pair, run: int) -> float:
            router = fleet.network.routers[f"home{pair.number}"]
            old, new = router.outer, further_address(fleet, pair, run)
            at = time.time()
            fleet.run(router.router.name, f"ip address add {new}/32 dev wan")
            fleet.run(router.router.name, f"ip address del {old}/32 dev wan")
            router.outer = new
            return at

        row = Row("NAT gets another address", "the change")
        measure(fleet, PAIRS, row, readdress)
        judge(row)

    def test_address_of_a_node_changes(self, fleet: Fleet) -> None:
        def readdress(fleet: Fleet, pair: Pair, run: int) -> float:
            placed, home = fleet.network.nodes[pair.a], fleet.network.routers[f"home{pair.number}"]
            old, new, bits = placed.address4, str(home.lan[70 + run]), home.lan.prefixlen
            at = time.time()
            fleet.run(pair.a, f"ip address del {old}/{bits} dev eth0")
            fleet.run(pair.a, f"ip address add {new}/{bits} dev eth0")
            fleet.run(pair.a, f"ip route replace default via {home.gateway} dev eth0 onlink")
            placed.address4 = new
            return at

        row = Row("node's address changes", "the change")
        measure(fleet, PAIRS, row, readdress)
        judge(row)

    def test_default_route_moves_to_another_interface(self, fleet: Fleet) -> None:
        def move(fleet: Fleet, pair: Pair, run: int) -> float:
            name, interface = (f"home{pair.number}", "eth0") if run % 2 else (f"spare{pair.number}", "eth1")
            gateway = fleet.network.routers[name].gateway
            at = time.time()
            fleet.run(pair.a, f"ip route replace default via {gateway} dev {interface} onlink")
            return at

        row = Row("default route moves to another interface", "the change")
        measure(fleet, PAIRS, row, move)
        for pair in PAIRS:  # what was mapped there would lead peers to the way that is not used any more
            fleet.run(f"spare{pair.number}", "conntrack -F")
        judge(row)

    def test_direct_path_is_blocked_one_way(self, fleet: Fleet) -> None:
        def one_way(fleet: Fleet, pair: Pair, run: int) -> float:
            at = time.time()
            block_pair(fleet, pair, ("home", "shop")[run % 2])
            return at

        def mend(fleet: Fleet, pair: Pair, run: int) -> None:
            fleet.run(f"{('home', 'shop')[run % 2]}{pair.number}", MEND)

        row = Row("direct path blocked one way", "the block")
        measure(fleet, PAIRS, row, one_way, mend)
        judge(row)

    def test_direct_path_is_blocked_both_ways(self, fleet: Fleet) -> None:
        def both(fleet: Fleet, pair: Pair, run: int) -> float:
            at = time.time()
            block_pair(fleet, pair, "home", "shop")
            return at

        def mend(fleet: Fleet, pair: Pair, run: int) -> None:
            for router in ("home", "shop"):
                fleet.run(f"{router}{pair.number}", MEND)

        row = Row("direct path blocked both ways", "the block")
        measure(fleet, PAIRS, row, both, mend)
        judge(row)

    @pytest.mark.parametrize("side", ["a", "b"])
    def test_a_daemon_is_killed_and_started_again(
        self, fleet: Fleet, side: str, one_start_at_a_time: threading.Lock, restart_seconds: float
    ) -> None:
        def kill(fleet: Fleet, pair: Pair, run: int) -> float:
            with one_start_at_a_time:
                at = time.time()
                restart(fleet, [getattr(pair, side)], restart_seconds)
                until("it is back", lambda: fleet.status(getattr(pair, side)), STEADY_WITHIN)
                row.waits[pair.number, run] = waited(fleet, [getattr(pair, side)])
            return at

        which = {"a": "one side", "b": "the other side"}[side]
        row = Row(f"meshd killed and restarted, {which}", f"the kill; {restart_seconds:g} s of it RestartSec")
        measure(fleet, RESTARTED, row, kill)
        judge(row)

    def test_both_daemons_are_killed_and_started_again(
        self, fleet: Fleet, one_start_at_a_time: threading.Lock, restart_seconds: float
    ) -> None:
        def kill(fleet: Fleet, pair: Pair, run: int) -> float:
            with one_start_at_a_time:
                at = time.time()
                restart(fleet, [pair.a, pair.b], restart_seconds)
                until("both are back", lambda: all(map(fleet.status, (pair.a, pair.b))), STEADY_WITHIN)
                row.waits[pair.number, run] = waited(fleet, [pair.a, pair.b])
            return at

        row = Row(
            "meshd killed and restarted, both at once", f"the kill; {restart_seconds:g} s of it RestartSec"
        )
        measure(fleet, RESTARTED, row, kill)
        judge(row)

    @pytest.mark.parametrize("seconds", [HOUR, -HOUR], ids=["ahead", "back"])
    def test_the_clock_jumps(self, fleet: Fleet, seconds: int, jumping_clocks: None) -> None:
        def jump(fleet: Fleet, pair: Pair, run: int) -> float:
            at = time.time()
            set_offset(clock_file(fleet, pair.a), 0 if run % 2 else seconds)
            return at

        # Every other run is the jump back to the right time, so both directions are in both rows.
        row = Row(f"clock jumps {seconds // HOUR:+d} h, and back", "the jump")
        measure(fleet, PAIRS, row, jump, window=CLOCK_SEEN)
        judge(row)

    @pytest.fixture(scope="class")
    @classmethod
    def jumping_clocks(cls, fleet: Fleet) -> None:
        """Start one side of each pair again with a clock that a file sets."""
        for pair in PAIRS:
            member, clock = fleet.member(pair.a), clock_file(fleet, pair.a)
            set_offset(clock, 0)
            fleet.kill(pair.a)
            words = ["run", "--config", str(member.root / CONFIG), "--root", str(member.root)]
            with (fleet.output / f"{pair.a}.log").open("ab") as log:
                fleet.mesh.processes[pair.a] = fleet.network.popen(
                    pair.a,
                    [sys.executable, jumping_meshd.__file__, str(clock), *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )


class TestRelayed:
    """What befalls pairs that cannot be direct."""

    @pytest.fixture(scope="class")
    @classmethod
    def fleet(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
        text = topology("kernel-fully-random", RELAYED, spare=False)
        with started(text, tmp_path_factory.mktemp("dark-relay")) as made:
            yield made

    def test_relay_is_killed(self, fleet: Fleet) -> None:
        row = Row("relay killed, another rendezvous takes over", "the kill")
        for turn in range(RUNS):
            if len(row.dark) >= RUNS:
                break
            trials = [Trial(fleet, pair, f"relay-{turn}") for pair in RELAYED]
            for trial in trials:
                trial.steady("relay")
            by_server = {
                server: [trial for trial in trials if uses(fleet, trial.pair, server)]
                for server in fleet.mesh.servers
            }
            server, hit = max(by_server.items(), key=lambda item: len(item[1]))
            assert hit, "pairs use a relay that is none of ours"
            time.sleep(turn % 7 * LOOK)
            at = time.time()
            fleet.kill(server)
            for dark, lost in [trial.watch(at) for trial in hit]:
                row.add(dark, lost)
            fleet.start(server)
            for trial in trials:
                trial.stop()
        judge(row)


@pytest.fixture(scope="session")
def one_start_at_a_time() -> threading.Lock:
    """Starting is work for a processor, and every host has its own: so it is done to one pair at a time."""
    return threading.Lock()


@pytest.fixture(scope="session")
def restart_seconds(repository: Path) -> float:
    """For how long the service manager waits before it starts the daemon again."""
    unit = (repository / "systemd" / "meshd.service").read_text()
    found = re.search(r"^RestartSec=(\d+)(ms)?$", unit, re.MULTILINE)
    assert found
    return int(found[1]) / (1000 if found[2] else 1)


def further_address(fleet: Fleet, pair: Pair, run: int) -> str:
    """Route one more address of the region to a pair's router; return it."""
    router = fleet.network.routers[f"home{pair.number}"]
    new = f"5.1.{100 + run}.{pair.number}"
    route = fleet.run("region-west", f"ip -4 route show {router.outer}/32").stdout.split()
    device = route[route.index("dev") + 1]
    mac = router.site.ports["wan"].mac.hex(":")
    fleet.run("region-west", f"ip route replace {new}/32 dev {device}")
    fleet.run("region-west", f"ip neighbour replace {new} lladdr {mac} dev {device} nud permanent")
    return new


def block(fleet: Fleet, router: str, rule: str) -> None:
    """Let a router drop what a rule says, before it is tracked or translated."""
    chain = "chain first { type filter hook prerouting priority raw;\n" + rule + "\n}"
    fleet.run(router, ["nft", "table ip fault {\n" + chain + "\n}"])


def block_pair(fleet: Fleet, pair: Pair, *routers: str) -> None:
    """Let routers of a pair drop what comes from the other one."""
    for name in routers:
        other = {"home": "shop", "shop": "home"}[name]
        block(
            fleet,
            f"{name}{pair.number}",
            f"ip saddr {fleet.network.routers[f'{other}{pair.number}'].outer} drop",
        )


def restart(fleet: Fleet, names: list[str], wait: float) -> None:
    """Kill daemons and start them again as their service manager would, so many seconds later."""
    for name in names:
        fleet.kill(name)
    time.sleep(wait)
    for name in names:
        fleet.start(name)


def waited(fleet: Fleet, names: list[str]) -> float:
    """Return for how many seconds since its start a daemon was ready and got no processor, the longest."""
    files = [Path(f"/proc/{fleet.mesh.processes[name].pid}/schedstat") for name in names]
    return max(int(file.read_text().split()[1]) / 1e9 for file in files)


def clock_file(fleet: Fleet, name: str) -> Path:
    """Return the file that says how wrong a node's clock is."""
    return fleet.output / f"{name}.clock"


def uses(fleet: Fleet, pair: Pair, server: str) -> bool:
    """Tell whether a pair sends anything through a rendezvous."""
    address = fleet.network.nodes[server].address4
    ends = ((pair.a, pair.b), (pair.b, pair.a))
    return any(address in str(fleet.peer(*each).get("endpoint")) for each in ends)
