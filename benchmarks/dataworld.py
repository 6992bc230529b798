"""Namespaces, wires and daemons for benchmarks/datapath.py.

A world is two namespaces, `left` and `right`, joined by a veth pair, or by way of a third, `middle`. In each
runs one system: crossedge (real daemons, a real rendezvous), wireguard-go, Nebula, or crossedge with a stock
wireguard-go. All worlds of one shape have the same wires.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from crossedge.host.tun import GSO_MAX_SIZE, MTU
from crossedge.host.vethpair import BIG_TCP_SIZE, INWARD_SIZE
from crossedge.lab.demo_mesh import call, each, program
from crossedge.lab.sites import FORWARDING, Port, Site, join, macs, make_site
from crossedge.lab.topology import Conditions
from crossedge.lab.workers import Worker
from crossedge.wire.bundle import Bundle

ROOT: Final = Path("/run/bench")
PATIENCE: Final = 30.0  # seconds that a daemon may take to answer, a pair to be direct
GATEWAY: Final = "169.254.0.1"  # of pods
NUMBERS: Final = macs()

ETHTOOL: Final = {
    "offloaded": "tso on gso on tx-udp-segmentation on gro off",
    "gro": "tso off gso off tx-udp-segmentation off gro on",
    "wire": "tso off gso off tx-udp-segmentation off gro off",
}
"""What is set at both ends of every wire. The first is how the kernel makes a veth pair."""


class World:
    """Two namespaces and what joins them."""

    def __init__(
        self, stack: ExitStack, name: str, number: int, *, middle: bool = False, delay: float = 0.0
    ) -> None:
        """`delay` is one-way, in milliseconds, on the left wire of a world with a middle."""
        self.stack = stack
        self.name = name
        self.number = number
        self.left = make_site(stack, f"{name}-left", NUMBERS)
        self.right = make_site(stack, f"{name}-right", NUMBERS)
        self.middle = make_site(stack, f"{name}-middle", NUMBERS) if middle else None
        self.wires: list[Port] = []
        self.logs = Path("/run/bench/logs")
        self.logs.mkdir(parents=True, exist_ok=True)
        if self.middle is None:
            a, b = self.left.port("eth0"), self.right.port("eth0")
            join(a, b)
            self.wires += [a, b]
            self.left.address(a, f"{self.address('left')}/24", connected=True)
            self.right.address(b, f"{self.address('right')}/24", connected=True)
        else:
            for side, site in (("left", self.left), ("right", self.right)):
                self._wire(side, site, self.middle, delay if side == "left" else 0.0)

    def _wire(self, side: str, site: Site, middle: Site, delay: float) -> None:
        mine, theirs = site.port("eth0"), middle.port(side)
        if delay:
            line = make_site(self.stack, f"{self.name}-line", NUMBERS)
            line.tune({f"net/ipv6/conf/{scope}/disable_ipv6": "1" for scope in ("all", "default")})
            ends = line.port("a"), line.port("b")
            join(mine, ends[0])
            join(theirs, ends[1])
            descriptor = line.namespace.fileno()
            conditions = Conditions(delay_ms=delay, queue_kib=65_536).model_dump()
            wire = {"name": "line", "a": "a", "b": "b", "conditions": conditions}
            first = {"seed": 1, "namespace": descriptor, "wires": [wire]}
            worker = Worker("crossedge.lab.delayline", first, [descriptor])
            self.stack.callback(worker.stop)
            self.wires += ends
        else:
            join(mine, theirs)
        self.wires += [mine, theirs]
        gateway = self.address(f"{side}-gateway")
        middle.address(theirs, f"{gateway}/24", connected=True)
        site.address(mine, f"{self.address(side)}/24", connected=True)
        site.route("0.0.0.0/0", mine.index, gateway)

    def address(self, side: str) -> str:
        """Return the underlay address of `left` or `right`, or of the middle towards one of them."""
        if self.middle is None:
            return f"5.1.{self.number}.{1 if side == 'left' else 2}"
        net = 1 if side.startswith("left") else 2
        return f"5.{net}.{self.number}.{254 if side.endswith('gateway') else 1}"

    def forward(self) -> None:
        """Let the middle forward."""
        if self.middle is not None:
            self.middle.tune(FORWARDING)

    def site(self, side: str) -> Site:
        """Return a namespace by its name."""
        found = {"left": self.left, "right": self.right, "middle": self.middle}[side]
        if found is None:
            raise LookupError(f"{self.name} has no {side}")
        return found

    def set_condition(self, condition: str) -> None:
        """Set the offloads of every wire."""
        for port in self.wires:
            run(port.site, "ethtool", "-K", port.name, *ETHTOOL[condition].split())

    def popen(self, site: Site, command: Sequence[str], log: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a program; it ends with the world."""
        with (self.logs / f"{self.name}-{log}.log").open("ab") as out, site.namespace:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, **options
            )

        def stop() -> None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        self.stack.callback(stop)
        return process


def run(site: Site, *command: str, timeout: float = 60.0) -> str:
    """Run a program in a namespace and return its output; it must succeed."""
    with site.namespace:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{site.name}: {' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def wait(what: str, condition: Callable[[], Any], timeout: float = PATIENCE) -> None:
    """Wait until a condition holds; `RuntimeError` says which did not."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {timeout:.0f} s: {what}")
        time.sleep(0.05)


@dataclass(slots=True)
class System:
    """A running system: where its ends are, and which processes are its daemons."""

    world: World
    left: Site
    """Where the client runs."""
    right: Site
    target: str
    """Address of the right end inside the tunnel."""
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    server: subprocess.Popen[bytes] | None = None

    def cpu(self) -> float:
        """Return the seconds of user and system time that the daemons have used."""
        total = 0
        for daemon in self.daemons:
            text = Path(f"/proc/{daemon.pid}/stat").read_text()
            words = text.rpartition(")")[2].split()
            total += int(words[11]) + int(words[12])
        return total / os.sysconf("SC_CLK_TCK")

    def memory(self, what: str = "VmRSS") -> float:
        """Return the MiB of the largest daemon: now (VmRSS), or at its peak (VmHWM)."""
        sizes = []
        for daemon in self.daemons:
            found = re.search(
                rf"^{what}:\s+(\d+)", Path(f"/proc/{daemon.pid}/status").read_text(), re.MULTILINE
            )
            sizes.append(int(found[1]) / 1024 if found else 0.0)
        return max(sizes)

    def serve(self) -> System:
        """See that the tunnel is up."""
        wait(f"{self.world.name}: {self.target} answers pings", self._answers)
        return self

    def listen(self) -> None:
        """Start an iperf3 server for one test at the right end: between two tests it would not listen."""
        if self.server is not None:
            self.server.kill()
            self.server.wait()
        with self.right.namespace:
            words, quiet = ["iperf3", "-s", "-1"], subprocess.DEVNULL
            self.server = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)
        wait("iperf3 listens", lambda: run(self.right, "ss", "-Hltn", "sport", "=", ":5201").strip())

    def _answers(self) -> bool:
        with self.left.namespace:
            words = ["ping", "-n", "-c", "2", "-i", "0.05", "-W", "1", self.target]
            return subprocess.run(words, capture_output=True, check=False).returncode == 0


# --- crossedge ---------------------------------------------------------------------------------------------


class Authority:
    """The certificate authority of all crossedge worlds of one run."""

    def __init__(self) -> None:
        self._root = str(ROOT / "authority")
        made = call("crossedge", "--root", self._root, "ca", "init")
        found = re.search(r"^ca key\s+(\S+)", made, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"`crossedge ca init` named no key: {made}")
        self.key = found[1]

    def enrol(self, root: Path, name: str, rendezvous: Sequence[str]) -> Bundle:
        """Make a node's keys and its signed bundle."""
        request, bundle = root / "request", root / "bundle"
        call("crossedge", "--root", str(root), "node", "init", "--name", name, "-o", str(request))
        words = [word for server in rendezvous for word in ("--rendezvous", server)]
        call("crossedge", "--root", self._root, "ca", "sign", str(request), *words, "-o", str(bundle))
        call("crossedge", "--root", str(root), "node", "join", str(bundle))
        return Bundle.from_text(bundle.read_bytes())


def pod_address(bundle: Bundle) -> str:
    """Return the second address of a node's IPv4 pod prefix."""
    return str(next(prefix for prefix in bundle.certificate.prefixes if prefix.version == 4)[2])


def attach_pod(stack: ExitStack, node: Site, name: str, address: str, big_tcp: bool) -> Site:
    """Make a pod as the plugin does: a routed veth pair whose super-packets fit the daemon's device."""
    pod = make_site(stack, name, NUMBERS)
    inside, outside = pod.port("eth0"), node.port("pod")
    sizes = (BIG_TCP_SIZE, INWARD_SIZE) if big_tcp else (0, 0)
    join(inside, outside, mtu=MTU, gso_max_size=GSO_MAX_SIZE, gso_ipv4_max_sizes=sizes)
    pod.address(inside, f"{address}/32")
    pod.neighbour(inside, GATEWAY, outside.mac)
    pod.route("0.0.0.0/0", inside.index, GATEWAY)
    node.neighbour(outside, address, inside.mac)
    node.route(f"{address}/32", outside.index)
    return pod


class Crossedge:
    """Daemons of crossedge in a world, and its rendezvous: in the middle, else beside the right one."""

    def __init__(
        self,
        world: World,
        authority: Authority,
        sides: Sequence[str],
        config: str = "",
        *,
        host: str = "right",
    ) -> None:
        self.world = world
        self.roots = {side: ROOT / f"{world.name}-{side}" for side in sides}
        place = "right-gateway" if world.middle is not None else host
        server = ROOT / f"{world.name}-rendezvous"
        made = call(
            *("crossedge-rendezvous", "init", "--root", str(server)),
            *("--address", world.address(place), "--network", authority.key),
        )
        with (server / "etc/crossedge/rendezvous.toml").open("a") as file:
            file.write("\n[relay]\nnode_rate = 0\nnetwork_rate = 0\n")
        address = made.split()[-1]
        self.bundles = dict(
            each(
                lambda side: (side, authority.enrol(self.roots[side], f"{world.name}-{side}", [address])),
                sides,
            )
        )
        self.rendezvous = world.popen(
            world.site("middle" if world.middle is not None else host),
            [*program("crossedge-rendezvous"), "run", "--root", str(server)],
            "rendezvous",
        )
        self.daemons = {}
        for side, root in self.roots.items():
            file = root / "etc/crossedge/meshd.toml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(config)
            words = [*program("meshd"), "run", "--config", str(file), "--root", str(root)]
            self.daemons[side] = world.popen(world.site(side), words, side)
        for side in sides:
            wait(f"{world.name}: the {side} daemon is registered", lambda side=side: self._registered(side))

    def ask(self, side: str, command: str) -> dict[str, Any]:
        """Ask a daemon; {} where it does not answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(5)
            try:
                connection.connect(str(self.roots[side] / "run/crossedge/meshd.sock"))
                connection.sendall(json.dumps({"command": command}).encode() + b"\n")
                with connection.makefile("rb") as lines:
                    answer: dict[str, Any] = json.loads(lines.readline() or b"{}")
            except OSError:
                return {}
        return answer

    def _is_big_tcp(self, side: str) -> bool:
        return "big_tcp" in self.ask(side, "status")["offloads"]["tun"]

    def _registered(self, side: str) -> bool:
        return any(s["state"] == "registered" for s in self.ask(side, "status").get("rendezvous", ()))

    def system(self, *, path: str = "direct", pods: bool = False) -> System:
        """Return the system between the two daemons, or between a pod on each; its path is as said."""
        world = self.world
        sites, target = [world.left, world.right], str(self.bundles["right"].certificate.overlay4)
        if pods:
            found = {side: pod_address(bundle) for side, bundle in self.bundles.items()}
            sites = [
                attach_pod(world.stack, world.site(s), f"pod-{world.name}-{s}", found[s], self._is_big_tcp(s))
                for s in ("left", "right")
            ]
            target = found["right"]
        system = System(world, sites[0], sites[1], target, list(self.daemons.values()))
        if path == "relay":
            system.daemons.append(self.rendezvous)
        system.serve()
        wait(f"{world.name}: the path is {path}", lambda: self._is(path))
        return system

    def _is(self, path: str) -> bool:
        rows = [row for side in self.roots for row in self.ask(side, "peers").get("peers", ())]
        alike = [r for r in rows if r["kind"] == "member" and r["name"].startswith(f"{self.world.name}-")]
        return len(alike) == 2 and all(r["path"] == path and r["superframes"] for r in alike)
