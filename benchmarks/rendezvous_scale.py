"""What a node costs its rendezvous, and what a flood costs the nodes: `make bench-rendezvous`.

A real server process on loopback in namespaces of its own, 1,000 nodes with real keys, certificates, clients
and sockets: they register, pull and call; memory and processor time of the server are divided by the nodes.
Then one node restarts, with and without what it knew. The same in memory, for the processor time of the core
alone. At last a flood of control messages with fresh sender keys meets 50 nodes' keepalives. Into
build/bench/rendezvous.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: our `sched` must not hide the standard library's

from crossedge.wire.endpoint import UdpEndpoint
from tests.rendezvous_client import UNIX, Node, World
from tests.rendezvous_fleet import CoreRun, Fleet, Run, SocketRun
from tests.rendezvous_flood import Flooder, Keepalives, Registered
from tests.rendezvous_process import RendezvousProcess, lost_in_kernel

SERVER = UdpEndpoint("127.0.0.1", 3478)
INSIDE = "CROSSEDGE_BENCH_NAMESPACE"
CALLS = 4
STEADY = 30.0  # seconds of nothing but keepalives
FLOOD = 50_000
FLOODS = {
    "one source, in trains": (1, 0.0, ()),
    "200 sources, half with wrong cookies, in trains": (200, 0.5, ()),
    "200 sources, half with wrong cookies, single datagrams": (200, 0.5, ('disable_offloads = ["gro"]',)),
}
Figures = dict[str, float]


def restart_pulls(run: Run, figures: Figures) -> None:
    """Restart one node twice: with what it knew, and without."""
    node = run.fleet.nodes[0]
    run.start(node)
    figures["restarted node's pull, bytes"] = run.settle_one(node)
    run.settle(60.0)
    run.start(node, forget=True)
    figures["first pull, bytes"] = run.settle_one(node)
    run.settle(60.0)


def sockets(count: int) -> Figures:
    """Return the figures of a real server and real sockets."""
    figures: Figures = {}
    fleet = Fleet(count, seed=1, began=time.clock_gettime(time.CLOCK_BOOTTIME), unix=int(time.time()))
    with tempfile.TemporaryDirectory() as root:
        server = RendezvousProcess(Path(root), fleet.ca.public)
        fleet.server_key = server.public_key
        run = SocketRun(fleet)
        try:
            empty = server.status()
            run.start_all(5.0)
            figures["seconds until all know all"] = 5.0 + run.settle(300.0)
            joined = server.status()
            made = run.call_some(CALLS)
            called = server.status()
            run.run_until(run.now + STEADY)
            steady = server.status()
            restart_pulls(run, figures)
            end = server.status()
        finally:
            run.close()
            server.stop()
    figures["records missing"] = fleet.missing
    figures["calls made"] = len(made)
    figures["calls lost"] = fleet.calls_lost(made)
    figures["nodes that lost the server"] = sum(node.states["lost"] for node in fleet.nodes)
    figures["datagrams dropped"] = (
        sum(end["dropped"].values()) + sum(end["failed_sends"].values()) + lost_in_kernel(SERVER)
    )
    figures["resident memory without nodes, bytes"] = empty["memory_bytes"]
    figures["memory per node, bytes"] = (steady["memory_bytes"] - empty["memory_bytes"]) / count
    figures["CPU per node to register and pull, ms"] = (
        (joined["cpu_seconds"] - empty["cpu_seconds"]) / count * 1e3
    )
    figures["CPU per call, ms"] = (called["cpu_seconds"] - joined["cpu_seconds"]) / len(made) * 1e3
    figures["CPU per node and hour of keepalives, s"] = (
        (steady["cpu_seconds"] - called["cpu_seconds"]) / count / STEADY * 3600
    )
    return figures


def core(count: int) -> Figures:
    """Return the figures of the core alone, on a virtual clock."""
    run = CoreRun(Fleet(count, seed=1, began=1000.0))
    run.start_all(5.0)
    run.settle(300.0)
    joined = run.cpu
    run.run_until(run.now + 60.0)
    return {
        "core: CPU per node to register and pull, ms": joined / count * 1e3,
        "core: CPU per node and hour of keepalives, s": (run.cpu - joined) / count * 60,
    }


def flood(name: str, sources: int, cookies: float, lines: tuple[str, ...], seconds: float = 5.0) -> Figures:
    """Return what a flood costs, and what registered nodes notice of it."""
    world = World()
    world.now = time.time() - UNIX
    with tempfile.TemporaryDirectory() as root:
        server = RendezvousProcess(Path(root), world.ca.public, *lines)
        nodes = []
        try:
            world.key = type("Public", (), {"public": server.public_key})()
            for number in range(50):
                nodes.append(Registered(Node(world, f"n{number}"), f"127.0.{number + 1}.7"))
                nodes[-1].register(SERVER)
            flooder = Flooder(SERVER, server.public_key, FLOOD, seconds + 1, sources, cookies)
            before = server.status()
            flooder.begin()
            keepalives = Keepalives(nodes, SERVER)
            keepalives.run(seconds, 0.005)
            sent, took = flooder.end()
            after = server.status()
            kernel = lost_in_kernel(SERVER)
        finally:
            for node in nodes:
                node.close()
            server.stop()
    return {
        f"{name}: offered, messages/s": sent / took,
        f"{name}: key agreements": after["key_agreements"] - before["key_agreements"],
        f"{name}: CPU of the server, share of one core": (after["cpu_seconds"] - before["cpu_seconds"])
        / took,
        f"{name}: lost in the kernel, share": kernel / sent,
        f"{name}: keepalives sent": keepalives.sent,
        f"{name}: keepalives lost": keepalives.lost,
        f"{name}: keepalive answered, p50 ms": keepalives.quantile(0.5) * 1e3,
        f"{name}: keepalive answered, p99 ms": keepalives.quantile(0.99) * 1e3,
    }


def main() -> None:
    """Measure, print a table, write JSON; fails where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1000, help="simulated nodes (1000)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="directory of the JSON")
    options = parser.parse_args()
    if not os.environ.get(INSIDE):
        user = [] if os.geteuid() == 0 else ["-Ur"]
        inside = ["unshare", *user, "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        command = [*inside, sys.executable, "-P", __file__, *sys.argv[1:]]
        sys.exit(subprocess.run(command, env={**os.environ, INSIDE: "1"}, check=False).returncode)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, options.nodes + 200)), hard))
    figures = sockets(options.nodes) | core(options.nodes)
    for name, (sources, cookies, lines) in FLOODS.items():
        figures |= flood(name, sources, cookies, lines)
    wide = max(map(len, figures))
    for key, value in figures.items():
        print(f"{key:<{wide}}  {value:,.3f}".rstrip("0").rstrip("."))
    ratio = figures["restarted node's pull, bytes"] / figures["first pull, bytes"]
    print(f"{'restarted pull to first pull':<{wide}}  {ratio:.3f}")
    options.output.mkdir(parents=True, exist_ok=True)
    content = {
        "figures": {key: round(value, 6) for key, value in figures.items()},
        "ratios": {"restarted pull to first pull": round(ratio, 4)},
        "peers": {},
    }
    (options.output / "rendezvous.json").write_text(json.dumps(content, indent=2) + "\n")
    lost = ("records missing", "calls lost", "nodes that lost the server", "datagrams dropped")
    agreed = [key for key in figures if key.endswith(": key agreements")]
    missed = [key for key in (*lost, *agreed) if figures[key]]
    sys.exit(f"not zero: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
