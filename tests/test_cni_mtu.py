"""Pods see 1,380 bytes whatever the path, and what is larger is cut by the pod."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossedge.host.tun import GSO_MAX_SIZE
from tests.cni_runtime import Node_, Pod, pods

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
