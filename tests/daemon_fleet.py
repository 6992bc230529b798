"""Real daemons for tests: a lab's network from a text, a rendezvous and meshds in it, a pod on each node.

Everything runs by the commands that an operator types; what the tests then do to it (kill, delete, move) is
theirs. Nothing here sleeps for a fixed time: `until` waits for a condition, within a bound.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from crossedge.cli.main import crossedge
from crossedge.cni.main import cni as crossedge_cni
from crossedge.lab.demo import bundle_of, registered
from crossedge.lab.demo_mesh import AUTHORITY, Member, Mesh, each, program
from crossedge.lab.launch import ROOTS
from crossedge.lab.network import Network
from crossedge.lab.pings import PATIENCE, PingResult, PingRun, Running
from crossedge.lab.sites import join
from crossedge.lab.topology import parse_topology
from crossedge.meshd.desired import METRIC_PEER, TABLE
from crossedge.rendezvous.control import ask as ask_rendezvous
from crossedge.rendezvous.main import cli as crossedge_rendezvous
from tests.waiting import answered, until

REGISTERED_WITHIN = 60.0
DEVICES = {"veth": "", "tun": 'disable_offloads = ["big_tcp"]\n'}
"""Kinds of a daemon's device, and what its configuration says for them."""
EACH_DEVICE = [pytest.param("veth", marks=pytest.mark.pair), "tun"]
"""Parameters of a fixture."""
COMMANDS: dict[str, click.Command] = {
    "crossedge": crossedge,
    "crossedge-cni": crossedge_cni,
    "crossedge-rendezvous": crossedge_rendezvous,
}
_one_at_a_time = threading.Lock()


def run_here(*words: str) -> str:
    """Run one of our commands in this process, which saves the start of a Python; return its output."""
    with _one_at_a_time:
        done = CliRunner().invoke(COMMANDS[words[0]], words[1:])
    assert done.exit_code == 0, f"{' '.join(words)}: {done.stderr or done.exception!r}"
    return done.stdout


class Pinging:
    """A ping that goes on while the test does something; `result` waits for its end."""

    def __init__(self, fleet: Fleet, run: PingRun) -> None:
        self._run = run
        self._running = run.start(fleet.network)
        self._process = self._running.process
        fleet.started.append(self._running)
        until("the ping is answered", lambda: self.answered, 5.0)

    @property
    def answered(self) -> int:
        """How many have been answered until now."""
        return answered(self._run)

    @property
    def running(self) -> bool:
        """Whether it still goes on."""
        return self._process.poll() is None

    def stop(self, *, after: int = 10) -> PingResult:
        """End it after so many further answers, if it goes on; return what it saw until the last answer."""
        wanted = self.answered + after
        until("the ping is answered again", lambda: self.answered >= wanted or not self.running, 10.0)
        if self.running:
            self._process.send_signal(signal.SIGINT)
        seen = self.result(0.0)
        return replace(seen, sent=max(seen.times), received=len(seen.times))

    def result(self, patience: float = PATIENCE) -> PingResult:
        """Return what it saw, once it is over and what comes late has been waited for."""
        return self._running.wait(self._run.count * self._run.interval + 10.0, patience)


def longest_gap(result: PingResult) -> int:
    """Return the most pings in a row that were not answered."""
    worst = run = 0
    for number in range(1, result.sent + 1):
        run = 0 if number in result.times else run + 1
        worst = max(worst, run)
    return worst


class Fleet:
    """A network, a mesh in it, and short words for what tests do."""

    def __init__(self, network: Network, mesh: Mesh, output: Path) -> None:
        self.network = network
        self.mesh = mesh
        self.output = output
        self.started: list[Running] = []
        self.configs: Mapping[str, str] = {}
        self._runs = 0

    # Programs

    def attach(self, member: Member) -> None:
        """Give a node its pod; before its daemon runs, the plugin does that alone."""
        pod = self.network.attach_pod(member.name, member.name)
        member.pod, member.pod4, member.pod6 = pod.name, pod.address(4), pod.address(6)

    def begin(self, later: Collection[str] = ()) -> None:
        """Start everything, but those nodes that are started `later`, and wait until all are registered."""
        self.mesh.start(self.configs, later)
        ready = "registered with the rendezvous"
        self.mesh.wait(ready, lambda each: each.name in later or registered(each), REGISTERED_WITHIN)

    def member(self, name: str) -> Member:
        """Return a node."""
        return self.mesh.members[name]

    def kill(self, name: str) -> None:
        """SIGKILL the program on a node."""
        self.mesh.end(name, signal.SIGKILL)

    def start(self, name: str) -> None:
        """Start the program on a node again."""
        if name in self.mesh.servers:
            self.mesh.run_server(name)
        else:
            self.mesh.run_daemon(self.member(name))

    def sign(self, name: str, *words: str) -> None:
        """Sign a node's request again, with further words for `crossedge ca sign`, and let it join."""
        member = self.member(name)
        request, bundle = str(member.root / "request"), str(member.root / "bundle")
        servers = [word for each in bundle_of(member).rendezvous for word in ("--rendezvous", str(each))]
        authority = ("crossedge", "--root", str(ROOTS / AUTHORITY))
        run_here(*authority, "ca", "sign", request, *servers, *words, "-o", bundle)
        run_here("crossedge", "--root", str(member.root), "node", "join", bundle)

    def command(self, node: str, *words: str, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
        """Run one of our commands for a node, in its namespace."""
        place = ["--root", str(ROOTS / node)]
        before, after = (place, []) if words[0] == "crossedge" else ([], place)
        return self.network.run(node, [*program(words[0]), *before, *words[1:], *after], timeout)

    def status(self, name: str) -> dict[str, Any]:
        """Return what a daemon says of itself; {} while it does not answer."""
        return self.member(name).ask("status")

    def peer(self, name: str, other: str) -> dict[str, Any]:
        """Return what a daemon says of a peer; {} where it knows none of that name."""
        rows = self.member(name).ask("peers").get("peers", [])
        return next((row for row in rows if row["name"] == other), {})

    def path(self, a: str, b: str) -> str:
        """Return the path of a pair as both ends see it, "mixed" if they differ."""
        ends = {self.peer(a, b).get("path"), self.peer(b, a).get("path")}
        return str(ends.pop()) if len(ends) == 1 else "mixed"

    def leases(self, server: str) -> int:
        """Return how many nodes a rendezvous has; -1 while it does not answer."""
        try:
            answer = ask_rendezvous(ROOTS / server / "run/crossedge-rendezvous/control.sock", "status")
        except (OSError, ValueError):
            return -1
        return int(answer["leases"])

    def state(self, name: str) -> Path:
        """Return a daemon's state directory."""
        return self.member(name).root / "var/lib/crossedge/meshd"

    def log(self, name: str) -> str:
        """Return what the program on a node has logged."""
        return (self.output / f"{name}.log").read_text()

    # Traffic

    def pinging(
        self, a: str, b: str, *, count: int, interval: float = 0.01, six: bool = False, address: str = ""
    ) -> Pinging:
        """Ping b's pod (or another address) from a's, in the background; returns at the first answer."""
        self._runs += 1
        target = address or (self.member(b).pod6 if six else self.member(b).pod4)
        file = self.output / f"ping-{self._runs}-{a}-{b}.txt"
        return Pinging(self, PingRun(self.member(a).pod, target, file, count, interval))

    def ping(
        self, a: str, b: str, *, count: int = 3, interval: float = 0.05, six: bool = False
    ) -> PingResult:
        """Ping b's pod from a's; return what came of it."""
        return self.pinging(a, b, count=count, interval=interval, six=six).result()

    def answers(self, a: str, b: str, *, six: bool = False) -> bool:
        """Tell whether b's pod answers one ping of a's within a fifth of a second."""
        target = self.member(b).pod6 if six else self.member(b).pod4
        return self.run(self.member(a).pod, f"ping -n -c 1 -W 0.2 {target}", check=False).returncode == 0

    def go_direct(self, a: str, b: str, seconds: float = 10.0) -> None:
        """Have a pair exchange data until both ends send it direct."""

        def direct() -> bool:
            return self.answers(a, b) and self.path(a, b) == "direct"

        until(f"{a} and {b} are direct", direct, seconds)

    # The kernel

    def run(
        self, place: str, command: str | Sequence[str], *, check: bool = True, timeout: float = 20.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command (words, or a line without quotes) in a namespace to its end."""
        words = command.split() if isinstance(command, str) else command
        done = self.network.run(place, words, timeout)
        assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stderr or done.stdout}"
        return done

    def open(self, place: str, function: Callable[..., socket.socket], *args: Any) -> socket.socket:
        """Return a socket made inside a namespace, which stays there."""
        return self.network.site(place).namespace.call(function, *args)

    def picture(self, place: str) -> dict[str, Any]:
        """Return a namespace's links, addresses, routes, rules and nftables, without what only counts."""

        def ip(*words: str) -> list[dict[str, Any]]:
            found = json.loads(self.run(place, ["ip", "-j", *words]).stdout or "[]")
            return [{key: value for key, value in row.items() if key not in VOLATILE} for row in found]

        def addresses(link: dict[str, Any]) -> list[str]:
            return sorted(f"{each['local']}/{each['prefixlen']}" for each in link.pop("addr_info"))

        shown = json.loads(self.run(place, "nft -j list ruleset").stdout)["nftables"]
        links = [(addresses(link), link) for link in ip("address", "show")]
        return {
            "links": {link["ifname"]: link for _, link in links},
            "addresses": {link["ifname"]: found for found, link in links},
            "routes": _sorted(row for v in ("-4", "-6") for row in ip(v, "route", "show", "table", "all")),
            "rules": _sorted(row for v in ("-4", "-6") for row in ip(v, "rule")),
            "nft": _sorted(_without_counts(entry) for entry in shown if "metainfo" not in entry),
        }

    def mesh_routes(self, place: str) -> set[str]:
        """Return the destinations of all routes of ours, except those of whole supernets and to nowhere."""
        found = set()
        for version in ("-4", "-6"):
            words = ["ip", "-j", version, "route", "show", "table", str(TABLE), "proto", "206"]
            for row in json.loads(self.run(place, words).stdout or "[]"):
                if row.get("type", "unicast") == "unicast" and row.get("metric") == METRIC_PEER:
                    found.add(row["dst"])
        return found

    def sysctls(self, place: str) -> dict[str, str]:
        """Return the settings of a namespace's interfaces and of forwarding."""
        with self.network.site(place).namespace:
            found = {}
            for family in ("ipv4", "ipv6"):
                for path in Path(f"/proc/sys/net/{family}").rglob("*"):
                    if path.is_file() and path.parts[5] in ("conf", "ip_forward"):
                        with suppress(OSError):
                            found[str(path)] = path.read_text()
        return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what is in one picture and not in the other, one line each; nothing if they are the same."""

    def lines(picture: Mapping[str, Any]) -> Counter[str]:
        found: Counter[str] = Counter()
        for kind, rows in picture.items():
            named = rows.items() if isinstance(rows, Mapping) else (("", row) for row in rows)
            found.update(f"{kind} {name} {json.dumps(row, sort_keys=True)}" for name, row in named)
        return found

    old, new = lines(before), lines(after)
    return [f"- {line}" for line in (old - new).elements()] + [f"+ {line}" for line in (new - old).elements()]


VOLATILE = frozenset(
    {"operstate", "ifindex", "expires", "stats64", "link_index", "cache", "used", "metrics_age"}
)


def _sorted(rows: Any) -> list[Any]:
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def _without_counts(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_counts(each)
            for key, each in value.items()
            if key not in ("handle", "packets", "bytes", "index")
        }
    if isinstance(value, list):
        return [_without_counts(each) for each in value]
    return value


@contextmanager
def a_fleet(
    topology: str,
    output: Path,
    *,
    sign: Mapping[str, Sequence[str]] | None = None,
    configs: Mapping[str, str] | None = None,
    start: bool = True,
    later: Collection[str] = (),
) -> Iterator[Fleet]:
    """Build a network, make identities, start all but what is started `later`, attach a pod to each node."""
    with ExitStack() as stack:
        network = stack.enter_context(Network(parse_topology(topology, "test.toml")))
        stack.callback(shutil.rmtree, ROOTS, ignore_errors=True)
        for name in (*network.nodes, AUTHORITY):
            (ROOTS / name).mkdir(parents=True)
        mesh = Mesh(network, stack, output, run_here)
        mesh.make_identities(sign, ["--now"])
        fleet = Fleet(network, mesh, output)
        each(fleet.attach, mesh.members.values())
        fleet.configs = configs or {}
        if start:
            fleet.begin(later)
        try:
            yield fleet
        finally:
            for running in fleet.started:
                running.close()


def overlay_addresses(member: Member) -> tuple[str, str]:
    """Return a node's overlay addresses, IPv4 and IPv6."""
    certificate = bundle_of(member).certificate
    return str(certificate.overlay4), str(certificate.overlay6)


def pod_prefixes(member: Member) -> dict[int, ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Return a node's pod prefixes by IP version."""
    return {prefix.version: prefix for prefix in bundle_of(member).certificate.prefixes}


def plug_in(fleet: Fleet, node: str, router: str) -> None:
    """Give a node a second interface, eth1, in a router's LAN."""
    placed, site = fleet.network.routers[router], fleet.network.nodes[node].site
    inside, outside = placed.site.port("guest"), site.port("eth1")
    join(inside, outside)
    placed.site.enslave(inside, placed.bridge)
    site.address(outside, f"{placed.lan[100]}/{placed.lan.prefixlen}", connected=True)
