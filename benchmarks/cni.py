"""How long ADD and DEL take, beside the reference plugins: `make bench-cni` writes build/bench/cni.json.

The control is bridge + host-local without masquerade. Both have 200 pods on one node and are measured in
turns by the same caller, at one request at a time and at 32. Ours is served by the daemon's `CniServer`, with
IPv4 and IPv6 addresses where the control has IPv4 alone, and its store is on the disk, flushed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from crossedge.cni import install
from crossedge.cni.node import Paths
from crossedge.host.links import list_links
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Netlink

PODS = 200
ROUNDS = 2
NICE = -10
"""Priority of the daemon, as in systemd/meshd.service."""
INSIDE = "CROSSEDGE_BENCH_NAMESPACE"
REPOSITORY = Path(__file__).resolve().parent.parent
CONTROL = Path("/usr/lib/cni/bridge")
SERVER = """
import asyncio, ipaddress, sys
from pathlib import Path
from crossedge.cni.node import Node, Paths
from crossedge.cni.serve import CniServer
async def main():
    prefixes = (ipaddress.ip_network("10.160.0.0/22"), ipaddress.ip_network("fd00:0:0:1::/64"))
    server = CniServer(Paths(Path(sys.argv[1])), Node(prefixes))
    server.start(asyncio.get_running_loop())
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Plugin:
    """A binary, its configuration, and how it is called."""

    def __init__(self, name: str, binary: Path, config: dict[str, Any]) -> None:
        self.name = name
        self.binary = str(binary)
        self.stdin = json.dumps(config).encode()
        self.times: dict[str, list[float]] = {}

    def call(self, command: str, pod: str) -> float:
        """Return the seconds that one request took; raises `RuntimeError` with the plugin's words."""
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod,
            "CNI_NETNS": f"/run/netns/{pod}",
            "CNI_IFNAME": "eth0",
            "CNI_PATH": "/usr/lib/cni",
            "PATH": os.environ["PATH"],
        }
        begin = time.perf_counter()
        done = subprocess.run(
            [self.binary], input=self.stdin, env=environment, capture_output=True, check=False
        )
        taken = time.perf_counter() - begin
        if done.returncode:
            raise RuntimeError(f"{self.name} {command}: {done.stdout.decode()} {done.stderr.decode()}")
        return taken

    def measure(self, pods: list[str], concurrency: int) -> None:
        """Add all pods, then delete all, so many at a time."""
        for command in ("ADD", "DEL"):
            with ThreadPoolExecutor(concurrency) as pool:
                taken = list(pool.map(lambda pod, c=command: self.call(c, pod), pods))
            self.times.setdefault(f"{command.lower()}_c{concurrency}", []).extend(taken)
            settle(0 if command == "DEL" else len(pods))


def settle(links: int) -> None:
    """Wait until nothing is left to be done in the background."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with Netlink() as netlink:
            if sum(1 for link in list_links(netlink) if link.kind == "veth") == links:
                break
        time.sleep(0.05)
    time.sleep(0.3)


@contextmanager
def served(root: Path) -> Iterator[None]:
    """Run the server in a process of its own."""
    child = subprocess.Popen([sys.executable, "-c", SERVER, str(root)], stdout=subprocess.PIPE)
    with suppress(PermissionError):  # as its unit has it
        os.setpriority(os.PRIO_PROCESS, child.pid, NICE)
    try:
        if child.stdout is not None:
            child.stdout.readline()
        yield
    finally:
        child.terminate()
        child.wait()


def percentile(times: list[float], share: float) -> float:
    """Return a percentile in milliseconds."""
    return sorted(times)[min(len(times) - 1, int(len(times) * share))] * 1e3


def plugins(place: str) -> tuple[Plugin, Plugin]:
    """Return the control and ours, with their state in a directory on the disk."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": "10.77.0.0/16"}]],
        "dataDir": f"{place}/networks",
    }
    bridge = {"type": "bridge", "bridge": "cnib0", "isGateway": True, "ipMasq": False, "ipam": ipam}
    paths = Paths(Path(place) / "node")
    install.install(paths)
    return (
        Plugin("control", CONTROL, {"cniVersion": "1.0.0", "name": "t", **bridge}),
        Plugin("crossedge", paths.binary, {"cniVersion": "1.0.0", "name": "t", "type": "crossedge"}),
    )


def report(control: Plugin, ours: Plugin) -> dict[str, Any]:
    """Print the figures and return them."""
    figures: dict[str, Any] = {}
    for what, mine in ours.times.items():
        theirs = control.times[what]
        command, _, concurrency = what.partition("_")
        ratio = statistics.median(mine) / statistics.median(theirs)
        figures[f"{command}_p50_{concurrency}"] = round(ratio, 3)
        line = f"{command.upper()} at {concurrency[1:]:>2}:"
        for plugin, times in ((ours, mine), (control, theirs)):
            p50, p99 = statistics.median(times) * 1e3, percentile(times, 0.99)
            figures[f"{plugin.name}_{what}_ms"] = {"p50": round(p50, 2), "p99": round(p99, 2)}
            line += f" {plugin.name} p50 {p50:6.1f} ms p99 {p99:6.1f} |"
        print(f"{line} ratio {ratio:.2f}")
    return figures


def main() -> int:
    """Measure, print, and write the figures."""
    if not CONTROL.exists():
        print("the control is missing (Debian: apt-get install containernetworking-plugins)", file=sys.stderr)
        return 2
    if not os.environ.get(INSIDE):
        os.environ[INSIDE] = "1"
        enter = 'mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@"'
        command = ["unshare", "-nm", "--propagation", "private", "sh", "-c", enter, "sh"]
        os.execvp(command[0], [*command, sys.executable, *sys.argv])  # noqa: S606 - as wanted, no shell
    output = REPOSITORY / "build/bench"
    output.mkdir(parents=True, exist_ok=True)
    pods = [f"bench{number}" for number in range(PODS)]
    namespaces = [Namespace.create(name) for name in pods]
    with tempfile.TemporaryDirectory(dir=output) as place:
        control, ours = plugins(place)
        with served(Path(place) / "node"):
            for plugin in (control, ours):  # the first request makes the bridge and the store
                plugin.call("ADD", pods[0])
                plugin.call("DEL", pods[0])
                settle(0)
            for _ in range(ROUNDS):
                for concurrency in (1, 32):
                    for plugin in (control, ours):
                        plugin.measure(pods, concurrency)
    for namespace in namespaces:
        namespace.delete()
    figures = report(control, ours)
    (output / "cni.json").write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
