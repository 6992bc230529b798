"""The data path between two real TUN devices, over a real wire, with real programs.

  namespace a                                            namespace b
TUN 10.160.1.1, fd00:1::1                              TUN 10.160.2.1, fd00:2::1
       | data_node                                            | data_node
veth 10.9.0.1, fd00:9::1  ------------------------------ veth 10.9.0.2, fd00:9::2
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crossedge.host.namespaces import Namespace

pytestmark = pytest.mark.namespaces
NODE = Path(__file__).with_name("data_node.py")
WIRE = {"a": ("10.9.0.1", "fd00:9::1"), "b": ("10.9.0.2", "fd00:9::2")}
INSIDE = {"a": ("10.160.1.1", "fd00:1::1"), "b": ("10.160.2.1", "fd00:2::1")}
HARMLESS = {"outbound-multicast", "outbound-source"}  # what a kernel says by itself on a new link
PREFIXES = {"a": ("10.160.1.0/24", "fd00:1::/64"), "b": ("10.160.2.0/24", "fd00:2::/64")}


def ip(namespace: str, command: str) -> None:
    subprocess.run(["ip", "-n", namespace, *command.split()], check=True)


@pytest.fixture(scope="module")
def wire() -> Iterator[None]:
    """Two namespaces with a veth pair between them."""
    spaces = [Namespace.create(name) for name in "ab"]
    ip("a", "link add wire type veth peer name wire netns b")
    for name in "ab":
        ip(name, "link set wire up")
        ip(name, f"addr add {WIRE[name][0]}/24 dev wire")
        ip(name, f"addr add {WIRE[name][1]}/64 dev wire nodad")
    yield
    for space in spaces:
        space.delete()
        space.close()


class Nodes:
    """Both running data paths."""

    def __init__(self, **settings: Any) -> None:
        self.processes = {}
        self.report: dict[str, Any] = {}
        for name, other in (("a", "b"), ("b", "a")):
            family = int(settings.get("v6", False))
            own = {
                "namespace": name,
                "tun": "mesh0",
                "first": name == "a",
                "remote": WIRE[other][family],
                "own": PREFIXES[name],
                "peer": PREFIXES[other],
                "address": INSIDE[name][0],
                "mode": settings.get("mode", "aes-256-gcm"),
                "size": settings.get("size", 1452),
                "disable_tun": settings.get("disable_tun", {}).get(name, ()),
                "disable_udp": settings.get("disable_udp", {}).get(name, ()),
            }
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-P", str(NODE), json.dumps(own)], stdout=subprocess.PIPE, text=True
            )
        for name, process in self.processes.items():
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            other = "b" if name == "a" else "a"
            ip(name, "link set mesh0 up")
            ip(name, f"addr add {INSIDE[name][0]}/32 dev mesh0")
            ip(name, f"addr add {INSIDE[name][1]}/128 dev mesh0 nodad")
            for prefix in PREFIXES[other]:
                ip(name, f"route add {prefix} dev mesh0")

    def stop(self) -> None:
        for name, process in self.processes.items():
            process.terminate()
            out, _ = process.communicate(timeout=10)
            self.report[name] = json.loads(out)


@contextmanager
def running(**settings: Any) -> Iterator[Nodes]:
    nodes = Nodes(**settings)
    try:
        yield nodes
    finally:
        nodes.stop()


def listen(where: str, kind: int, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with Namespace.open(where):
        opened = socket.socket(family, kind)
    opened.bind((address, 0))
    opened.settimeout(20)
    return opened


def transfer(source: str, target: str, family: int, size: int) -> None:
    """Send seeded random bytes by TCP, and compare the hash of what arrives."""
    server = listen(target, socket.SOCK_STREAM, INSIDE[target][family])
    server.listen()
    client = listen(source, socket.SOCK_STREAM, INSIDE[source][family])
    data = random.Random(size).randbytes(size)

    def send() -> None:
        client.connect(server.getsockname()[:2])
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send)
    thread.start()
    accepted, _ = server.accept()
    accepted.settimeout(20)
    digest = hashlib.sha256()
    while part := accepted.recv(1 << 20):
        digest.update(part)
    thread.join()
    for opened in (server, client, accepted):
        opened.close()
    assert digest.digest() == hashlib.sha256(data).digest()


def ping(source: str, target: str, *options: str) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", source, "ping", "-i", "0.02", "-W", "2", *options, target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_everything(size: int = 20_000_000) -> None:
    for family in (0, 1):
        assert " 0% packet loss" in ping("a", INSIDE["b"][family], "-c", "5")
        assert " 0% packet loss" in ping("b", INSIDE["a"][family], "-c", "3", "-s", "3000")
        transfer("a", "b", family, size)
        transfer("b", "a", family, size // 4)


@pytest.mark.parametrize("mode", ["aes-256-gcm", "chacha20-poly1305", "transport", "stock"])
def test_pings_and_streams_pass_unchanged(wire: None, mode: str) -> None:
    with running(mode=mode) as nodes:
        check_everything()
    for report in nodes.report.values():
        assert set(report["dropped"]) <= HARMLESS, nodes.report
