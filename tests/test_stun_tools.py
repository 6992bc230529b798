"""coturn's clients, behind every NAT of the lab, get right answers from the rendezvous on its two addresses.

region ---- server (rendezvous, two addresses)
       \\--- a router of each kind ---- a node
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from crossedge.lab.demo_mesh import program
from crossedge.lab.natkinds import Behaviour
from crossedge.lab.network import Network
from crossedge.lab.topology import parse_topology
from tests.natmatrix import NAMES
from tests.test_nat_lab import KERNEL, modelled
from tests.underlays import WEST, behind, region, serving, underlay

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.slow,
    pytest.mark.tool("turnutils_natdiscovery"),
    pytest.mark.tool("turnutils_stunclient"),
]

KINDS = (*NAMES, "carrier-grade", "hairpinning", *KERNEL)
SECOND = "5.1.0.200"
REFLEXIVE = re.compile(r"UDP reflexive addr: ([\d.]+):(\d+)")
FOUND = {
    Behaviour.ENDPOINT_INDEPENDENT: "Endpoint Independent",
    Behaviour.ADDRESS_DEPENDENT: "Address Dependent",
    Behaviour.ADDRESS_AND_PORT_DEPENDENT: "Address and Port Dependent",
}
STUNCLIENT_TIME = 4  # seconds: it waits for ever for an answer to another port, which no NAT lets in


def topology() -> str:
    routers = [behind(f"{nat}-r", nat, place=WEST, nat=nat) for nat in KINDS]
    return underlay("stun", region(WEST), serving("server", WEST), *routers)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, str, str]]]:
    """Return what natdiscovery and stunclient say behind each kind, and the router's outer address."""
    root = tmp_path_factory.mktemp("server")
    with Network(parse_topology(topology(), "stun.toml")) as network:
        first = network.nodes["server"].address4
        assert network.run("server", ["ip", "addr", "add", f"{SECOND}/32", "dev", "eth0"]).returncode == 0
        way = network.run("region-west", ["ip", "-o", "route", "get", first]).stdout
        found = re.search(r"dev (\S+)", way)
        assert found is not None
        network.run("region-west", ["ip", "route", "add", f"{SECOND}/32", "dev", found[1]])
        server = start(network, root, first)
        try:
            with ThreadPoolExecutor(len(KINDS)) as pool:
                answers = pool.map(lambda nat: ask(network, nat, first), KINDS)
                yield dict(zip(KINDS, answers, strict=True))
        finally:
            server.kill()
            server.communicate()


def start(network: Network, root: Path, first: str) -> subprocess.Popen[bytes]:
    network.run("server", [*program("crossedge-rendezvous"), "init", "--root", str(root), "--network", KEY])
    file = root / "etc/crossedge/rendezvous.toml"
    lines = [f'listen = ["{first}:3478"]', f'alternate = ["{SECOND}"]']
    file.write_text("\n".join([*lines, file.read_text(), "[limits]", "stun_rate = 1000"]))
    words = [*program("crossedge-rendezvous"), "run", "--root", str(root)]
    server = network.popen("server", words, stderr=subprocess.PIPE)
    assert server.stderr is not None
    for line in server.stderr:
        if b"listening" in line:
            return server
    raise AssertionError("the rendezvous did not start")


KEY = "A" * 43 + "="


def ask(network: Network, nat: str, server: str) -> tuple[str, str, str]:
    own = network.nodes[nat].address4
    lines = ["stdbuf", "-oL"]
    discovery = network.run(nat, [*lines, "turnutils_natdiscovery", "-m", "-f", "-L", own, server], 60.0)
    assert discovery.returncode == 0, (nat, discovery)
    client = network.run(nat, ["timeout", str(STUNCLIENT_TIME), *lines, "turnutils_stunclient", server])
    outer = network.routers[f"{nat}-r"].outer
    return discovery.stdout + discovery.stderr, client.stdout + client.stderr, outer


@pytest.mark.parametrize("nat", KINDS)
def test_nat_discovery_is_right(shown: dict[str, tuple[str, str, str]], nat: str) -> None:
    text, _, outer = shown[nat]
    kind = modelled(nat)
    mapping_part, _, filtering_part = text.partition("Filtering Behavior Discovery")
    seen = REFLEXIVE.findall(mapping_part)
    assert {host for host, _ in seen} == {outer}, text
    ports = [port for _, port in seen]
    if not kind.hard:
        assert len(set(ports)) == 1
        assert "NAT with Endpoint Independent Mapping!" in mapping_part
    else:  # asked at: first address and port, second address, first address and other port
        assert ports[0] != ports[1]
        # This client calls every NAT that is not independent one that minds ports, whatever it was told.
        assert "NAT with Address and Port Dependent Mapping!" in mapping_part
        assert (ports[0] == ports[2]) is (
            kind.conntrack is None and kind.mapping is Behaviour.ADDRESS_DEPENDENT
        )
    filtering = Behaviour.ADDRESS_AND_PORT_DEPENDENT if kind.conntrack else kind.filtering
    assert f"NAT with {FOUND[filtering]} Filtering!" in filtering_part, text


@pytest.mark.parametrize("nat", KINDS)
def test_stun_client_is_shown_the_outer_address(shown: dict[str, tuple[str, str, str]], nat: str) -> None:
    _, text, outer = shown[nat]
    seen = REFLEXIVE.findall(text)
    assert seen, text
    assert {host for host, _ in seen} == {outer}
