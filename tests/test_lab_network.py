"""The lab's namespaces: real NATs and the modelled ones behave alike, wires delay and lose, nothing stays."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network, ip_address, ip_network
from pathlib import Path

import pytest

from crossedge.cni.install import install
from crossedge.cni.node import Node, Paths, write_node
from crossedge.host.neighbours import Neighbour, delete_neighbour
from crossedge.host.netlink import Batch
from crossedge.lab.launch import ROOTS, LabError
from crossedge.lab.network import Network
from crossedge.lab.topology import Conditions, parse_topology
from tests.underlays import backbone, behind, inside, node, region, underlay

pytestmark = pytest.mark.namespaces

NATS = {
    # NAT -> (the same mapping for all peers, keeps the port, lets a stranger in)
    "kernel": (True, True, False),
    "kernel-accepting": (True, True, False),
    "kernel-random": (False, False, False),
    "kernel-fully-random": (False, False, False),
    "full-cone": (True, True, True),
    "port-restricted": (True, True, False),
    "port-restricted-random": (True, False, False),
    "symmetric-random": (False, False, False),
    "linux": (True, True, False),
    "linux-accepting": (True, True, False),
}
TOPOLOGY = underlay(
    "matrix",
    region("a"),
    region("b"),
    backbone("a", "b", delay_ms=10),
    node("observer", "a"),
    node("stranger", "a"),
    node("far", "b", ipv6=True),
)


def matrix() -> str:
    text = TOPOLOGY
    for nat in NATS:
        text += behind(f"r-{nat}", place="a", nat=nat, ipv6=True) + inside(f"r-{nat}", f"n-{nat}", ipv6=True)
    text += '[[router]]\nname = "inner"\nbehind = "r-full-cone"\nnat = "port-restricted"\n'
    return text + inside("inner", "deep")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(parse_topology(matrix(), "matrix.toml")) as network:
        yield network


@pytest.fixture
def sockets() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def udp(stack: ExitStack, network: Network, name: str, port: int = 0) -> socket.socket:
    """Return a UDP socket in a node."""
    opened = network.site(name).namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    stack.enter_context(opened)
    opened.settimeout(1.0)
    opened.bind(("", port))
    return opened


def arrives(to: socket.socket, wait: float = 1.0) -> tuple[bytes, tuple[str, int]] | None:
    to.settimeout(wait)
    try:
        data, source = to.recvfrom(2048)
    except TimeoutError:
        return None
    return data, source


def rtt(output: str) -> float:
    found = re.search(r"= [\d.]+/([\d.]+)/", output)
    assert found, output
    return float(found[1])


@pytest.mark.parametrize("nat", NATS)
def test_nat_behaves_as_its_kind_says(network: Network, sockets: ExitStack, nat: str) -> None:
    same, keeps, open_to_all = NATS[nat]
    observer, stranger = udp(sockets, network, "observer", 3478), udp(sockets, network, "stranger", 3478)
    node = udp(sockets, network, f"n-{nat}", 5000)
    seen = []
    for name, server in (("observer", observer), ("stranger", stranger)):
        node.sendto(b"who am I", (network.nodes[name].address4, 3478))
        got = arrives(server)
        assert got is not None
        seen.append(got[1])
    assert seen[0][0] == network.routers[f"r-{nat}"].outer
    assert (seen[0] == seen[1]) == same
    assert (seen[0][1] == 5000) == keeps
    observer.sendto(b"answer", seen[0])
    answer = arrives(node)
    assert answer == (b"answer", (network.nodes["observer"].address4, 3478))
    other = udp(sockets, network, "far", 3478)
    other.sendto(b"stranger", seen[0])
    assert (arrives(node, 0.3) is not None) == open_to_all


@pytest.mark.parametrize("nat", ["kernel", "kernel-accepting", "linux", "linux-accepting"])
def test_unsolicited_input_moves_the_mapping_only_where_it_is_accepted(
    network: Network, sockets: ExitStack, nat: str
) -> None:
    """The wrong conntrack entry of DESIGN section 5: the model and the kernel agree."""
    stranger = udp(sockets, network, "stranger", 4444)
    node = udp(sockets, network, f"n-{nat}", 6000)
    for _ in range(3):
        stranger.sendto(b"too early", (network.routers[f"r-{nat}"].outer, 6000))
        time.sleep(0.05)  # nothing answers it: time for it to have been at the router
    node.sendto(b"punch", (network.nodes["stranger"].address4, 4444))
    got = arrives(stranger)
    assert got is not None
    assert (got[1][1] == 6000) == (not nat.endswith("accepting"))


def test_double_nat_goes_out_and_back(network: Network) -> None:
    done = network.run("deep", ["ping", "-c", "2", "-i", "0.05", network.nodes["far"].address4])
    assert done.returncode == 0
    assert rtt(done.stdout) > 20.0


def test_tcp_goes_through_a_modelled_nat(network: Network, sockets: ExitStack) -> None:
    listener = network.site("far").namespace.call(socket.create_server, ("", 80))
    sockets.enter_context(listener)
    client = network.site("deep").namespace.call(socket.socket)
    sockets.enter_context(client)
    client.connect((network.nodes["far"].address4, 80))
    served, _ = listener.accept()
    sockets.enter_context(served)
    payload = os.urandom(1_000_000)
    client.settimeout(10)
    served.settimeout(10)
    received = bytearray()
    sent = 0
    while len(received) < len(payload):
        sent += client.send(payload[sent : sent + 65_536]) if sent < len(payload) else 0
        received += served.recv(65_536)
    assert bytes(received) == payload


def test_ipv6_is_not_translated_and_guarded_by_a_firewall(network: Network) -> None:
    far, near = network.nodes["far"].address6, network.nodes["n-kernel"].address6
    assert far is not None
    assert near is not None
    assert network.run("n-kernel", ["ping", "-c", "1", "-W", "1", far]).returncode == 0
    assert network.run("far", ["ping", "-c", "1", "-W", "1", near]).returncode != 0


def test_regions_are_as_far_apart_as_the_backbone_says(network: Network) -> None:
    done = network.run("observer", ["ping", "-c", "5", "-i", "0.05", network.nodes["far"].address4])
    assert done.returncode == 0
    assert 20.0 < rtt(done.stdout) < 30.0


def test_wires_lose_cut_and_mend(network: Network) -> None:
    address = network.nodes["far"].address4
    ping = ["ping", "-c", "20", "-i", "0.01", "-W", "0.3", address]
    try:
        network.set_wire("a-b", Conditions(delay_ms=1), cut=True)
        assert " 0 received" in network.run("observer", ping).stdout
        network.set_wire("a-b", Conditions(delay_ms=1, loss=0.4))
        received = re.search(r" (\d+) received", network.run("observer", ping).stdout)
        assert received
        assert 0 < int(received[1]) < 20
        network.set_wire("a-b", Conditions(delay_ms=1))
        assert " 20 received" in network.run("observer", ping).stdout
    finally:
        network.set_wire("a-b", Conditions(delay_ms=10))
    counts = next(wire for wire in network.status()["wires"] if wire["name"] == "a-b")["counts"]
    assert counts["a"]["dropped"]["cut"] == 20
    assert counts["a"]["dropped"]["loss"] + counts["b"]["dropped"].get("loss", 0) == 20 - int(received[1])


@pytest.mark.parametrize("told", [True, False])
def test_large_packets_are_refused_with_or_without_a_word(network: Network, told: bool) -> None:
    try:
        network.set_wire("a-b", Conditions(delay_ms=1, mtu=1300, mtu_icmp=told))
        sender = "observer" if told else "stranger"  # the kernel remembers what it was told
        ping = ["ping", "-M", "do", "-c", "1", "-W", "0.3", network.nodes["far"].address4]
        assert network.run(sender, [*ping, "-s", "1272"]).returncode == 0
        large = network.run(sender, [*ping, "-s", "1273"])
        assert large.returncode != 0
        assert ("mtu = 1300" in large.stdout) == told
    finally:
        network.set_wire("a-b", Conditions(delay_ms=10))


def test_a_rebooted_router_forgets(network: Network, sockets: ExitStack) -> None:
    observer, node = udp(sockets, network, "observer", 3479), udp(sockets, network, "n-full-cone", 7000)
    node.sendto(b"x", (network.nodes["observer"].address4, 3479))
    got = arrives(observer)
    assert got is not None
    network.reboot("r-full-cone")
    observer.sendto(b"y", got[1])
    assert arrives(node, 0.3) is None


def test_pods_are_reached_through_their_node(network: Network) -> None:
    install_plugin("n-kernel")
    pod = network.attach_pod("n-kernel", "one")
    assert IPv4Address(pod.address(4)) in IPv4Network("10.160.7.0/24")
    for address in (pod.address(4), pod.address(6)):
        assert network.run("n-kernel", ["ping", "-c", "1", "-W", "1", address]).returncode == 0
    assert pod.name in network.sites()
    assert network.run(pod.name, ["ping", "-c", "1", "-W", "1", "192.168.255.1"]).returncode != 0
    network.detach_pod("n-kernel", "one")
    assert pod.name not in network.sites()
    assert network.run("n-kernel", ["ping", "-c", "1", "-W", "0.2", pod.address(4)]).returncode != 0


def install_plugin(node: str) -> None:
    """Let a node without a mesh have pods."""
    paths = Paths(ROOTS / node)
    write_node(paths, Node((ip_network("10.160.7.0/24"), ip_network("fd00:7::/64"))))
    install(paths, portmap=False)


def test_what_a_plugin_complains_of_is_told(network: Network) -> None:
    with pytest.raises(LabError, match=r"observer: .*10-crossedge.conflist is not there"):
        network.attach_pod("observer", "none")
    install_plugin("stranger")
    network.attach_pod("stranger", "twice")
    with pytest.raises(FileExistsError):
        network.attach_pod("stranger", "twice")
    (ROOTS / "stranger/var/lib/crossedge/cni/node.json").write_text("{}")
    with pytest.raises(LabError, match=r"stranger: crossedge ADD of pod-more: .*bad prefix in"):
        network.attach_pod("stranger", "more")
    assert "pod-more" not in network.sites()
    assert not Path("/run/netns/pod-more").exists()


def test_unknown_names_are_told(network: Network) -> None:
    with pytest.raises(LookupError, match="no 'nobody' in lab matrix; there are observer,"):
        network.site("nobody")
    with pytest.raises(LookupError, match="no delayed wire 'observer'"):
        network.set_wire("observer", Conditions())


def test_nothing_stays() -> None:
    text = re.sub(r'name = "(\w+)"', r'name = "\1-2"', TOPOLOGY).replace('["a", "b"]', '["a-2", "b-2"]')
    plan = parse_topology(re.sub(r'region = "(\w)"', r'region = "\1-2"', text), "x.toml")
    with Network(plan) as small:
        processes = small.processes()
        assert Path("/run/netns/far-2").exists()
        install_plugin("far-2")
        small.attach_pod("far-2", "x")
    assert not list(Path("/run/netns").glob("*-2"))
    assert not list(Path("/run/netns").glob("pod-x"))
    assert not any(Path(f"/proc/{process}").exists() for process in processes)


def test_a_lab_that_cannot_be_built_leaves_nothing(network: Network) -> None:
    before = sorted(path.name for path in Path("/run/netns").iterdir())
    with pytest.raises(FileExistsError), Network(network.topology):
        pytest.fail("two labs with the same names cannot be in one place")
    assert sorted(path.name for path in Path("/run/netns").iterdir()) == before


def test_ipv6_neighbours_stay_known_when_nobody_talks(network: Network) -> None:
    """A router has to ask for its hosts without a packet at hand: it needs a link-local address for that."""
    router = network.site("r-kernel")
    near, far = network.nodes["n-kernel"].address6, network.nodes["far"].address6
    assert near is not None
    assert far is not None
    ping = ["ping", "-c", "1", "-W", "1", far]
    assert network.run("n-kernel", ping).returncode == 0
    batch = Batch()
    delete_neighbour(batch, Neighbour(router.ports["lan"].index, ip_address(near)))
    router.netlink.run(batch)
    assert network.run("n-kernel", ping).returncode == 0
