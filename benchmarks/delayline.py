"""How much the lab's delay line carries: TCP and UDP between two nodes, 20 ms apart each way.

    python benchmarks/delayline.py [SECONDS]

Needs iperf3, and root or unprivileged user namespaces. Both ends and the delay line share the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from crossedge.host.namespaces import mount
from crossedge.lab.network import Network
from crossedge.lab.topology import Conditions, parse_topology

INSIDE = "CROSSEDGE_BENCHMARK_INSIDE"
TOPOLOGY = """
name = "line"
[[region]]
name = "east"
[[region]]
name = "west"
[[backbone]]
between = ["east", "west"]
link = { delay_ms = 20 }
[[node]]
name = "left"
region = "east"
[[node]]
name = "right"
region = "west"
"""
RUNS = {
    "TCP, 4 flows": (["-P", "4"], Conditions(delay_ms=20)),
    "TCP, 1 flow, 0.1 % loss": ([], Conditions(delay_ms=20, loss=0.001)),
    "TCP, 1 flow, 1 % loss": ([], Conditions(delay_ms=20, loss=0.01)),
    "UDP, 1,400 bytes, 600 Mbit/s offered": (["-u", "-b", "600M", "-l", "1400"], Conditions(delay_ms=20)),
}


def main(seconds: str) -> None:
    """Run each case and print one line for it."""
    with Network(parse_topology(TOPOLOGY, "delayline.py")) as network:
        server = network.popen("right", ["iperf3", "-s"], stdout=subprocess.DEVNULL)
        time.sleep(0.5)
        target = network.nodes["right"].address4
        for name, (flags, conditions) in RUNS.items():
            network.set_wire("east-west", conditions)
            done = network.run("left", ["iperf3", "-J", "-c", target, "-t", seconds, *flags], timeout=120)
            end = json.loads(done.stdout)["end"]
            rate = end["sum_received"]["bits_per_second"] / 1e9
            counts = next(w for w in network.status()["wires"] if w["name"] == "east-west")["counts"]
            late = counts["a"]["late_us"]
            print(f"{name}: {rate:.2f} Gbit/s, frames late by {late['p50']} us (p50), {late['p99']} us (p99)")
        server.kill()
        server.wait()


if __name__ == "__main__":
    if not os.environ.get(INSIDE):
        user = [] if os.geteuid() == 0 else ["-Ur"]
        words = ["unshare", *user, "-nm", "--propagation", "private", sys.executable, *sys.argv]
        os.execvpe("unshare", words, {**os.environ, INSIDE: "1"})  # noqa: S606 - our own words
    mount("tmpfs", "/run", "tmpfs", 0)
    main(sys.argv[1] if len(sys.argv) > 1 else "5")
