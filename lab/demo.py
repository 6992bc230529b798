"""`make demo`: a rendezvous, six nodes in two regions behind five NATs, and every pod pings every pod.

Then latencies are measured and reported, groups appear, and a service goes to its users and follows them.

It runs the real commands in the namespaces of the topology `demo`, and the real daemons on the kernel's own
NAT, TUN devices and sockets. What it measured is in OUTPUT/demo.json, what was printed by ping and by the
daemons under OUTPUT/demo/. Each line of the summary is a promise; one that is broken makes the exit status 1.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click

from crossedge.cni import device
from crossedge.host.links import list_links
from crossedge.host.nft import NftError
from crossedge.lab import capture, evidence, flows, launch, pings
from crossedge.lab.demo_mesh import AUTHORITY, Member, Mesh, each, rounds
from crossedge.lab.demo_schedule import Schedule, Scheduling, possible
from crossedge.lab.launch import LabError
from crossedge.lab.network import Network
from crossedge.lab.pings import PingResult, PingRun, run_together
from crossedge.lab.topology import Topology
from crossedge.lab.workers import Worker
from crossedge.wire.bundle import Bundle

TIME_LIMIT = 60.0  # seconds for everything
REGISTERED_WITHIN = 40.0
DIRECT_WITHIN = 10.0
COLD_COUNT, COLD_INTERVAL = 100, 0.01
COLD_APART = 0.25  # seconds between the starts of a round's pairs: six daemons share few processors
WARM_COUNT, WARM_INTERVAL = 3, 0.05
FLOW_SIZE = 256 * 1024
DIRECT_ALLOWANCE_MS = 100.0  # time to direct: at most 2 RTT and this, in the median
SLICE = 16  # bytes of a certificate that give it away
COLD = 'log_level = "info"\n[latency]\nprobe = false\n'  # no pair is measured before it is pinged
REASONS_SHOWN = 12  # lines at the end that say why a promise is broken; demo.json has all


@dataclass(slots=True)
class Pair:
    """What is known of two nodes' pods."""

    a: str
    b: str
    cold: PingResult | None = None
    ipv4: bool = False
    ipv6: bool = False
    path: str = "none"
    time_to_direct_ms: float | None = None
    tcp: bool = False
    underlay: str | None = None
    """IP version that carries it."""

    @property
    def rtt_ms(self) -> float | None:
        """Round-trip time once the path is found."""
        return None if self.cold is None else self.cold.settled_ms

    @property
    def lost(self) -> int:
        """How many of the cold pair's pings were not answered."""
        return self.cold.lost if self.cold is not None and self.cold.sent else COLD_COUNT

    @property
    def at_once(self) -> bool:
        """Tell whether every ping of the cold pair was answered while ping waited for it."""
        return self.cold is not None and self.cold.all and not self.cold.late

    def row(self) -> dict[str, Any]:
        """Return what demo.json says of it."""

        def rounded(value: float | None) -> float | None:
            return None if value is None else round(value, 2)

        return {
            "a": self.a,
            "b": self.b,
            "path": self.path,
            "rtt_ms": rounded(self.rtt_ms),
            "time_to_direct_ms": rounded(self.time_to_direct_ms),
            "lost": self.lost,
            "ipv4": self.ipv4,
            "ipv6": self.ipv6,
            "first_ms": rounded(self.cold.first_ms if self.cold else None),
            "tcp": self.tcp,
            "underlay": self.underlay,
        }


@dataclass(slots=True)
class Demo:
    """One run."""

    topology: Topology
    output: Path
    started: float = field(default_factory=time.monotonic)
    pairs: dict[tuple[str, str], Pair] = field(default_factory=dict)
    checks: list[tuple[bool, str]] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    """What was seen of each broken promise."""
    counted: evidence.Counts = field(default_factory=dict)
    """Every drop counter when something was lost last; they begin at 0."""
    machine: str = ""
    """How busy it is."""
    schedule: Schedule | None = None

    @property
    def folder(self) -> Path:
        """Where everything but demo.json goes."""
        return self.output / "demo"

    def say(self, text: str) -> None:
        """Print a line of progress."""
        click.echo(f"[{time.monotonic() - self.started:5.1f} s] {text}")

    def check(self, kept: bool, promise: str) -> None:
        """Note whether a promise is kept."""
        self.checks.append((kept, promise))

    def run(self) -> bool:
        """Do everything; return whether every promise is kept."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            with ExitStack() as stack:
                self._run(stack)
            self._promises()
        except (LabError, NftError, OSError) as error:
            self.check(False, str(error))
        seconds = time.monotonic() - self.started
        self.check(seconds <= TIME_LIMIT, f"it took {seconds:.1f} s (at most {TIME_LIMIT:.0f})")
        self._write(seconds)
        self._summary()
        return all(kept for kept, _ in self.checks)

    def _run(self, stack: ExitStack) -> None:
        network = stack.enter_context(Network(self.topology))
        self.say(f"network: {self._describe()}")
        wire = self.folder / "wan.pcap"
        regions = [site for name, site in network.sites().items() if name.startswith("region-")]
        descriptors = [site.namespace.fileno() for site in regions]
        tap = Worker(
            "crossedge.lab.capture", {"namespaces": descriptors, "file": str(wire.resolve())}, descriptors
        )
        stack.callback(tap.stop)
        mesh = Mesh(network, stack, self.folder)
        mesh.make_identities()
        self.say(f"identities: a network, {len(mesh.members)} nodes with signed bundles")
        mesh.start(dict.fromkeys(mesh.members, COLD))
        mesh.wait("registered with the rendezvous", registered, REGISTERED_WITHIN)
        self._attach_pods(network, mesh)
        self.say(f"daemons: {len(mesh.members)} registered, a pod on each")
        self._ping_cold(network, mesh)
        self.machine = evidence.of_machine(network)
        self._ping_warm(network, mesh)
        self._flow(network, mesh)
        self._ask_paths(mesh)
        mesh.check_alive()
        self._schedule(mesh)
        counts = tap.ask({"stop": True})["counts"]
        self.say(f"WAN capture: {counts['frames']} frames, {counts['bytes'] / 1e6:.1f} MB; searching it")
        self._search(mesh, wire, counts)
        self._detach_pods(network, mesh)
        mesh.stop()
        stubborn = f": not {', '.join(mesh.stubborn)}" if mesh.stubborn else ""
        self.check(not mesh.stubborn, f"every program ends when it is asked to{stubborn}")

    def _describe(self) -> str:
        nodes = [node for node in self.topology.node if node.role == "node"]
        chains = {tuple(r.name for r in self.topology.routers_above(node)) for node in nodes}
        double = sum(len(chain) > 1 for chain in chains)
        return (
            f"{len(nodes)} nodes in {len(self.topology.region)} regions behind {len(chains)} NATs, "
            f"{double} of them double"
        )

    def _attach_pods(self, network: Network, mesh: Mesh) -> None:
        for member in mesh.members.values():
            pod = network.attach_pod(member.name, member.name)
            member.pod, member.pod4, member.pod6 = pod.name, pod.address(4), pod.address(6)

    def _detach_pods(self, network: Network, mesh: Mesh) -> None:
        left = []
        for member in mesh.members.values():
            network.detach_pod(member.name, member.name)
            left += [f"{link} on {member.name}" for link in pod_links(network, member.name)]
        self.check(
            not left, f"the CNI plugin attached and detached all pods ({', '.join(left) or 'no trace'})"
        )

    def _ping_cold(self, network: Network, mesh: Mesh) -> None:
        """Wake every pair by 100 pings, in rounds in which each node has one partner."""
        turns = rounds(list(mesh.members))
        for number, turn in enumerate(turns, 1):
            runs = []
            for a, b in turn:
                self.pairs[a, b] = Pair(a, b)
                runs.append(self._ping(mesh, a, b, "cold", mesh.members[b].pod4, COLD_COUNT, COLD_INTERVAL))
            for (a, b), result in zip(turn, run_together(network, runs, apart=COLD_APART), strict=True):
                self.pairs[a, b].cold = result
            mesh.check_alive()
            lost = sum(self.pairs[pair].lost for pair in turn)
            self.say(f"cold pairs: round {number} of {len(turns)}, {COLD_COUNT} pings each, {lost} lost")
            if losers := [self.pairs[pair] for pair in turn if not self.pairs[pair].at_once]:
                self._explain_losses(mesh, losers)

    def _explain_losses(self, mesh: Mesh, losers: list[Pair]) -> None:
        """Note which pings of cold pairs were lost, and what dropped anything meanwhile."""
        for pair in losers:
            seen = "ping says nothing" if pair.cold is None else evidence.of_ping(pair.cold)
            self.reasons.append(f"{pair.a} - {pair.b}: {seen}")
        counted = evidence.counters(mesh, {name: None for pair in losers for name in (pair.a, pair.b)})
        self.reasons += [f"dropped by {line}" for line in evidence.grown(self.counted, counted)]
        self.counted |= counted

    def _ping_warm(self, network: Network, mesh: Mesh) -> None:
        """Ping every pod from every pod by both protocols."""
        runs, keys = [], []
        for a, b in self.pairs:
            for source, target in ((a, b), (b, a)):
                for family, address in (
                    ("ipv4", mesh.members[target].pod4),
                    ("ipv6", mesh.members[target].pod6),
                ):
                    runs.append(self._ping(mesh, source, target, family, address, WARM_COUNT, WARM_INTERVAL))
                    keys.append(((a, b), family))
        size = max(1, len(runs) // 4)
        results = [
            result
            for start in range(0, len(runs), size)
            for result in run_together(network, runs[start : start + size])
        ]
        for pair in self.pairs.values():
            pair.ipv4 = pair.ipv6 = True
        for (key, family), run, result in zip(keys, runs, results, strict=True):
            if not result.all:
                setattr(self.pairs[key], family, False)
                self.reasons.append(f"{run.file.stem}: {evidence.of_ping(result)}")
        good = sum(result.all for result in results)
        self.say(f"every pod to every pod, IPv4 and IPv6: {good} of {len(results)} runs of ping complete")

    def _ping(
        self, mesh: Mesh, a: str, b: str, what: str, address: str, count: int, interval: float
    ) -> PingRun:
        file = self.folder / "ping" / f"{a}--{b}--{what}.txt"
        return PingRun(mesh.members[a].pod, address, file, count, interval)

    def _flow(self, network: Network, mesh: Mesh) -> None:
        wanted, keys = [], []
        for a, b in self.pairs:
            for source, address in ((a, mesh.members[b].pod4), (b, mesh.members[a].pod6)):
                wanted.append((mesh.members[source].pod, address))
                keys.append((a, b))
        results = flows.run_flows(network, [m.pod for m in mesh.members.values()], wanted, FLOW_SIZE)
        for pair in self.pairs.values():
            pair.tcp = True
        for key, wrong in zip(keys, results, strict=True):
            if wrong:
                self.pairs[key].tcp = False
                self.reasons.append(f"TCP between {' and '.join(key)}: {wrong}")
        whole = sum(not wrong for wrong in results)
        self.say(f"TCP: {whole} of {len(results)} flows of {FLOW_SIZE // 1024} KiB arrived whole")

    def _ask_paths(self, mesh: Mesh) -> None:
        """Ask the daemons which way each pair goes, and how long it took to get there."""
        end = time.monotonic() + DIRECT_WITHIN
        while True:
            seen = dict(zip(mesh.members, each(mesh.peers, mesh.members.values()), strict=True))
            for (a, b), pair in self.pairs.items():
                at_a = seen[a].get(b, {})
                pair.path, pair.time_to_direct_ms = both_ends(at_a, seen[b].get(a, {}))
                endpoint = at_a.get("endpoint")
                pair.underlay = None if endpoint is None else "ipv6" if endpoint.startswith("[") else "ipv4"
            if all(pair.path == "direct" for pair in self.pairs.values()) or time.monotonic() > end:
                break
        (self.folder / "peers.json").write_text(json.dumps(seen, indent=1))
        for (a, b), pair in self.pairs.items():
            if pair.path != "direct":
                why = [str(seen[one].get(other, {}).get("why_not_direct")) for one, other in ((a, b), (b, a))]
                self.reasons.append(f"{a} - {b} is {pair.path}: {a} says {why[0]}, {b} says {why[1]}")
        direct = sum(pair.path == "direct" for pair in self.pairs.values())
        self.say(f"paths: {direct} of {len(self.pairs)} pairs are direct")

    def _schedule(self, mesh: Mesh) -> None:
        """Let a scheduler on one node group all nodes, and place a service for users who then move."""
        if not possible():
            self.say("groups and placement: not shown, the scheduler is not installed (crossedge[sched])")
            return
        regions: dict[str, list[str]] = {}
        for name in mesh.members:
            region = self.topology.region_of(mesh.network.nodes[name].node)
            regions.setdefault(region, []).append(name)
        scheduling = Scheduling(mesh, min(regions[min(regions)]), regions)
        self.schedule = scheduling.result
        scheduling.start()
        self.say("scheduler: started; the daemons started again, to measure and to report to it")
        result = scheduling.run(self.say)
        nodes = len(mesh.members)
        self.check(
            result.measured == nodes * (nodes - 1) // 2,
            f"every pair's latency is measured and reported ({result.measured} pairs)",
        )
        wanted = sorted(sorted(members) for members in regions.values())
        self.check(result.groups == wanted, f"the groups are the regions ({len(result.groups)} groups)")
        moved = [nodes for nodes, _ in result.placed]
        near = [
            bool(nodes) and set(nodes) <= set(regions[region])
            for nodes, region in zip(moved, reversed(list(regions)), strict=False)
        ]
        self.check(near[:1] == [True], f"a service is placed near its users ({', '.join(*moved[:1])})")
        self.check(near[1:] == [True], f"it moves when they move (to {', '.join(*moved[1:2])})")

    def _search(self, mesh: Mesh, wire: Path, counts: dict[str, int]) -> None:
        kinds, found = capture.search(wire, needles(mesh))
        self.kinds = dict(kinds.most_common())
        self.check(not found, f"nothing on the WAN in the clear ({'; '.join(found) or 'all frames sealed'})")
        whole = not counts.get("not kept") and kinds["sealed control"] > 0 and kinds["relayed"] > 0
        self.check(
            whole, f"the WAN capture is whole: {', '.join(f'{n} {kind}' for kind, n in self.kinds.items())}"
        )

    def _promises(self) -> None:
        pairs = list(self.pairs.values())
        nodes = sum(node.role == "node" for node in self.topology.node)
        wanted = nodes * (nodes - 1) // 2

        def promise(text: str, kept: Callable[[Pair], bool]) -> None:
            failing = [f"{pair.a} - {pair.b}" for pair in pairs if not kept(pair)]
            shown = f": not {', '.join(failing[:4])}" if failing else ""
            self.check(not failing and len(pairs) == wanted, f"{text} ({wanted} pairs){shown}")

        promise("every pod pings every pod, IPv4", lambda pair: pair.ipv4)
        promise("every pod pings every pod, IPv6", lambda pair: pair.ipv6)
        promise("every pair is direct", lambda pair: pair.path == "direct")
        promise("TCP flows both ways", lambda pair: pair.tcp)
        promise(
            f"the first packet and all {COLD_COUNT} pings of a cold pair arrive",
            lambda pair: pair.cold is not None and pair.cold.all,
        )
        excess = [
            pair.time_to_direct_ms - 2 * pair.rtt_ms
            for pair in pairs
            if pair.time_to_direct_ms is not None and pair.rtt_ms is not None
        ]
        known = len(excess) == wanted
        for pair in pairs:
            if pair.time_to_direct_ms is None:
                self.reasons.append(f"{pair.a} - {pair.b}: neither end says when it sent data direct first")
        middle = f"{median(excess):.0f} ms" if excess else "unknown"
        self.check(
            known and median(excess) <= DIRECT_ALLOWANCE_MS,
            f"time to direct beyond 2 RTT: {middle} in the median (at most {DIRECT_ALLOWANCE_MS:.0f} ms)",
        )

    def _write(self, seconds: float) -> None:
        nodes = [node for node in self.topology.node if node.role == "node"]
        result = {
            "seconds": round(seconds, 1),
            "nodes": [
                {"name": n.name, "region": self.topology.region_of(n), "nat": self.topology.nat_of(n)}
                for n in nodes
            ],
            "pairs": [pair.row() for pair in self.pairs.values()],
            "schedule": None if self.schedule is None else self.schedule.as_dict(),
            "wan": self.kinds,
            "checks": [{"kept": kept, "promise": promise} for kept, promise in self.checks],
            "reasons": self.reasons,
        }
        (self.output / "demo.json").write_text(json.dumps(result, indent=1) + "\n")

    def _summary(self) -> None:
        click.echo()
        head = (
            f"{'pair':31}{'path':9}{'RTT ms':>7}{'to direct ms':>14}{'first ms':>10}{'lost':>6}  v4  v6  TCP"
        )
        click.echo(head)
        for pair in self.pairs.values():
            row = pair.row()

            def number(key: str, row: dict[str, Any] = row) -> str:
                return "-" if row[key] is None else f"{row[key]:.1f}"

            marks = "  ".join(f"{'yes' if kept else 'NO':3}" for kept in (pair.ipv4, pair.ipv6, pair.tcp))
            click.echo(
                f"{pair.a + ' - ' + pair.b:31}{pair.path:9}{number('rtt_ms'):>7}"
                f"{number('time_to_direct_ms'):>14}{number('first_ms'):>10}{row['lost']:>6}  {marks}"
            )
        click.echo()
        for kept, promise in sorted(self.checks, key=lambda check: not check[0]):
            click.echo(f"{'ok    ' if kept else 'FAILED'}  {promise}")
        if not all(kept for kept, _ in self.checks):
            for reason in self.reasons[:REASONS_SHOWN]:
                click.echo(f"        {reason}")
            click.echo(f"        this machine: {self.machine}")
        click.echo(f"\n{self.output / 'demo.json'} has the figures, {self.folder} what the programs printed")


def registered(member: Member) -> bool:
    """Tell whether a daemon has a rendezvous that knows it; `LabError` where it refuses to answer."""
    status = member.ask("status")
    if "error" in status:
        raise LabError(f"the daemon on {member.name} does not answer `status`: {status['error']}")
    return any(server.get("state") == "registered" for server in status.get("rendezvous", ()))


def both_ends(at_a: dict[str, Any], at_b: dict[str, Any]) -> tuple[str, float | None]:
    """Return the path of a pair, direct only where both ends say so, and the slower end's time in ms."""
    paths = {end.get("path", "none") for end in (at_a, at_b)}
    path = paths.pop() if len(paths) == 1 else "mixed"
    times = [end.get("time_to_direct_ms") for end in (at_a, at_b)]
    known = [time for time in times if time is not None]
    return path, max(known) if known else None


def bundle_of(member: Member) -> Bundle:
    """Return a node's signed bundle."""
    return Bundle.from_text((member.root / "bundle").read_bytes())


def pod_links(network: Network, node: str) -> list[str]:
    """Return the links of pods that a node has, or still has after a second: they are deleted together."""
    end = time.monotonic() + 1.0
    while True:
        links = list_links(network.nodes[node].site.netlink)
        left = [link.name for link in links if link.group in (device.GROUP, device.LEAVING)]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.02)  # between two looks: they go in the background, and only a dump says so


def needles(mesh: Mesh) -> dict[str, list[bytes]]:
    """Return what must not be seen on the WAN: pods' packets, node names, certificates."""
    wanted: dict[str, list[bytes]] = {
        "the text of a ping": [pings.MARK],
        "the text of a TCP flow": [flows.MARK],
    }
    members = list(mesh.members.values())
    heads = []
    for a in members:
        for b in members:
            if a is not b:
                for source, target in ((a.pod4, b.pod4), (a.pod6, b.pod6)):
                    heads.append(ipaddress.ip_address(source).packed + ipaddress.ip_address(target).packed)
    wanted["a pod's IP header"] = heads
    for member in members:
        certificate = bundle_of(member).certificate
        encoded = certificate.encode()
        wanted[f"the name {member.name}"] = [member.name.encode()]
        wanted[f"the certificate of {member.name}"] = [
            encoded[start : start + SLICE] for start in range(0, len(encoded) - SLICE, SLICE)
        ]
    return wanted


def main(topology: Topology, output: Path) -> int:
    """Run the demo inside the lab's namespaces; return the exit status."""
    names = [node.name for node in topology.node]
    launch.settle([*names, AUTHORITY])
    return 0 if Demo(topology, output).run() else 1
