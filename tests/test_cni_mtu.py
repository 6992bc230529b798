"""Pods see 1,380 bytes whatever the path, and what is larger is cut by the pod."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossedge.cni.node import Node, Paths, read_node, write_node
from crossedge.host.links import get_link
from crossedge.host.netlink import Netlink
from crossedge.host.tun import GSO_MAX_SIZE
from crossedge.host.vethpair import BIG_TCP_SIZE, INWARD_SIZE
from tests.cni_runtime import Node_, Pod, pods
from tests.waiting import until

pytestmark = pytest.mark.namespaces
SERVER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
stream = socket.create_server((sys.argv[1], 7), family=family)
packets = socket.socket(family, socket.SOCK_DGRAM)
packets.bind((sys.argv[1], 7))
print("ready", flush=True)
for _ in range(2):
    print(len(packets.recv(65536)), flush=True)
connection, _ = stream.accept()
total = 0
while part := connection.recv(65536):
    total += len(part)
print(total, flush=True)
"""
CLIENT = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
packets = socket.socket(family, socket.SOCK_DGRAM)
for size in (1352, 8000):
    packets.sendto(bytes(size), (sys.argv[1], 7))
with socket.create_connection((sys.argv[1], 7)) as stream:
    stream.sendall(bytes(1 << 20))
"""


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[tuple[list[Pod], list[str]]]:
    node = Node_(tmp_path)
    with pods(2) as made:
        results = [node.plugin.add(pod).ok().json for pod in made]
        yield made, [each["address"].split("/")[0] for each in results[0]["ips"]]
        for pod in made:
            node.plugin.delete(pod).ok()


def test_pods_see_1380_at_both_ends(attached: tuple[list[Pod], list[str]]) -> None:
    made, _ = attached
    assert {pod.ip("link", "show", "eth0")[0]["mtu"] for pod in made} == {1380}
    shown = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    assert {link["mtu"] for link in shown if link["ifname"].startswith("ce")} == {1380}


def test_a_pods_super_packets_fit_the_tunnels_device(attached: tuple[list[Pod], list[str]]) -> None:
    made, _ = attached
    assert {pod.ip("-d", "link", "show", "eth0")[0]["gso_max_size"] for pod in made} == {GSO_MAX_SIZE}


def sizes(pod: Pod, host: str) -> list[tuple[int, int]]:
    """Return what the pod's end, and the host's, send as one packet at most, and as one of IPv4."""
    with pod.namespace, Netlink() as inside:
        links = [get_link(inside, "eth0")]
    with Netlink() as outside:
        links.append(get_link(outside, host))
    return [(link.gso_max_size, link.gso_ipv4_max_size) for link in links if link is not None]


@pytest.mark.parametrize("served", [False, True], ids=["local", "daemon"])
def test_where_the_device_takes_longer_super_packets_pods_do_in_both_directions(
    tmp_path: Path, served: bool
) -> None:
    node = Node_(tmp_path, big_tcp=True)
    if served:
        node.start()
    with pods(1) as (pod,):
        host = node.plugin.add(pod).ok().json["interfaces"][0]["name"]
        assert sizes(pod, host) == [(GSO_MAX_SIZE, BIG_TCP_SIZE), (65536, INWARD_SIZE)]
        node.plugin.delete(pod).ok()
    node.stop()


def test_pods_of_another_device_are_adapted_when_the_daemon_starts(tmp_path: Path) -> None:
    """Those that an earlier version made, and those of a device that is a TUN again."""
    node = Node_(tmp_path)
    with pods(2) as (pod, own):
        host, other = (node.plugin.add(each).ok().json["interfaces"][0]["name"] for each in (pod, own))
        own.ip("link", "set", "eth0", "gso_max_size", "50000")
        assert sizes(pod, host) == [(GSO_MAX_SIZE, GSO_MAX_SIZE), (65536, 65536)]
        for big_tcp in (True, False):
            node.takes_big_tcp(big_tcp)
            node.start()
            size = BIG_TCP_SIZE if big_tcp else GSO_MAX_SIZE
            wanted = [(GSO_MAX_SIZE, size), (65536, INWARD_SIZE)]
            until("the pod is adapted", lambda wanted=wanted: sizes(pod, host) == wanted, 5.0)
            # What a pod has set itself is left alone.
            assert sizes(own, other) == [(50000, 50000), (65536, INWARD_SIZE)]
            node.stop()
        for each in (pod, own):
            node.plugin.delete(each).ok()


def test_what_earlier_versions_wrote_knows_of_no_longer_packets(
    tmp_path: Path,
) -> None:
    paths = Paths(tmp_path)
    write_node(paths, Node((), 1300, big_tcp=True))
    assert read_node(paths) == Node((), 1300, big_tcp=True)
    paths.node.write_text('{"prefixes": []}')  # of an earlier version
    assert read_node(paths) == Node(())


@pytest.mark.parametrize("version", [0, 1], ids=["ipv4", "ipv6"])
def test_all_sizes_arrive_between_pods(attached: tuple[list[Pod], list[str]], version: int) -> None:
    (server, client), addresses = attached
    address = addresses[version]
    with server.namespace:
        child = subprocess.Popen(
            ["/usr/bin/python3", "-c", SERVER, address], stdout=subprocess.PIPE, text=True
        )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    done = client.run("/usr/bin/python3", "-c", CLIENT, address, timeout=20)
    assert done.returncode == 0, done.stderr
    assert child.communicate(timeout=20)[0].split() == ["1352", "8000", str(1 << 20)]
