"""Containers of podman on two nodes behind NATs: they reach each other through the mesh, and leave nothing.

east ---- meeting                        the rendezvous
  '------ home (kernel NAT) ---- attic   containers "web" and "shell"
west ---- farm (port-restricted) ---- barn   containers "web" and "shell"
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from crossedge.cni.device import GROUP, LEAVING
from crossedge.cni.node import Paths
from crossedge.host.links import list_links
from crossedge.host.namespaces import mount, unmount
from crossedge.lab.launch import ROOTS
from tests.cni_podman import SERVE, Podman, a_podman
from tests.cni_runtime import SYSTEM_PLUGINS
from tests.daemon_fleet import Fleet, a_fleet, overlay_addresses, run_here
from tests.underlays import FARM, HOME, two_regions
from tests.waiting import until

pytestmark = [
    pytest.mark.namespaces,
    *(
        pytest.mark.tool(name)
        for name in (str(SYSTEM_PLUGINS / "portmap"), "podman", "runc", "busybox", "iptables-save")
    ),
]
NODES = ("attic", "barn")
TOPOLOGY = two_regions("podman", HOME, FARM)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    Path("/var/lib/cni").mkdir(parents=True, exist_ok=True)
    mount("tmpfs", "/var/lib/cni", "tmpfs", 0)  # where libcni keeps results
    try:
        with a_fleet(TOPOLOGY, tmp_path) as made:
            yield made
    finally:
        unmount("/var/lib/cni")


@pytest.fixture
def podmen(fleet: Fleet, tmp_path: Path) -> Iterator[dict[str, Podman]]:
    with ExitStack() as stack:
        found = {}
        for name in NODES:
            run_here("crossedge-cni", "--root", str(ROOTS / name), "install", "--now")  # with portmap
            place, node = tmp_path / f"podman-{name}", fleet.network.nodes[name].site.namespace
            found[name] = stack.enter_context(a_podman(Paths(ROOTS / name), place, node))
        yield found


def traces(fleet: Fleet, node: str) -> dict[str, Any]:
    """Return what there is of pods on a node: addresses in use, links, routes, rules of portmap."""
    rows = json.loads(run_here("crossedge-cni", "--root", str(ROOTS / node), "ips", "--json"))
    found = list_links(fleet.network.nodes[node].site.netlink)
    rules = fleet.run(node, "iptables-save -t nat").stdout
    return {
        "addresses": sorted(row["container"] for row in rows if row["state"] == "in use"),
        "links": sorted(link.name for link in found if link.group in (GROUP, LEAVING)),
        "routes": sorted(fleet.run(node, "ip route show proto 206 type unicast").stdout.splitlines()),
        "rules": [line for line in rules.splitlines() if "10.160." in line],
    }


def fetch(fleet: Fleet, place: str, address: str, port: int) -> str:
    script = f"exec 3<>/dev/tcp/{address}/{port}; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3"
    return fleet.run(place, ["timeout", "3", "bash", "-c", script], check=False).stdout


def test_containers_on_two_nodes_behind_nats_reach_each_other_and_publish_a_port(
    fleet: Fleet, podmen: dict[str, Podman]
) -> None:
    before = {name: traces(fleet, name) for name in NODES}
    for podman in podmen.values():
        podman.run("web", "-p", "8080:80", *SERVE)
        podman.run("shell", "box", "/bin/sleep", "1000")
    for here, there in (NODES, NODES[::-1]):
        four, six = podmen[there].addresses("web")
        for address in (four, six):
            pinged = podmen[here]("exec", "shell", "/bin/ping", "-c3", "-W2", address)
            assert "3 packets received" in pinged
        for shown in (four, f"[{six}]"):
            got = podmen[here]("exec", "shell", "/bin/wget", "-q", "-O-", f"http://{shown}/index.html")
            assert got == "it works\n"
    until("the pair is direct", lambda: fleet.path(*NODES) == "direct", 10.0)
    # The published port: from the LAN of the node, and through the mesh from a container of the other one.
    attic = fleet.network.nodes["attic"].address4
    until("the port answers", lambda: "it works" in fetch(fleet, "home", attic, 8080), 5.0)
    overlay = overlay_addresses(fleet.member("attic"))[0]
    published = f"http://{overlay}:8080/index.html"
    assert podmen["barn"]("exec", "shell", "/bin/wget", "-q", "-O-", published) == "it works\n"
    for podman in podmen.values():
        podman("stop", "-t", "0", "web")
    assert "it works" not in fetch(fleet, "home", attic, 8080)
    for podman in podmen.values():
        podman("rm", "-f", "-t", "0", "-a")
    until("nothing is left", lambda: {name: traces(fleet, name) for name in NODES} == before, 2.0)
