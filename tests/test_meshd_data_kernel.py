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
from crossedge.host.nft import apply

pytestmark = pytest.mark.namespaces
NODE = Path(__file__).with_name("data_node.py")
WIRE = {"a": ("10.9.0.1", "fd00:9::1"), "b": ("10.9.0.2", "fd00:9::2")}
INSIDE = {"a": ("10.160.1.1", "fd00:1::1"), "b": ("10.160.2.1", "fd00:2::1")}
HARMLESS = {"outbound-multicast", "outbound-source", "outbound-ack-superseded", "inbound-ack-superseded"}
"""What a kernel says by itself on a new link, and acknowledgements for which later ones stand."""
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
            ip(name, "link set mesh0 up")
        for name in self.processes:  # only now, or late segments of an earlier test meet a link that is down
            other = "b" if name == "a" else "a"
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


TRIES = 5  # ping leaves after two round trips, which a busy machine may exceed


def ping(source: str, target: str, *options: str) -> str:
    """Ping with success; return what it says. Again where only the last answer was not waited for."""
    last = f"icmp_seq={options[options.index('-c') + 1]} "
    for _ in range(TRIES):
        done = subprocess.run(
            ["ip", "netns", "exec", source, "ping", "-i", "0.02", "-W", "2", *options, target],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        if last in done.stdout:
            break
    return done.stdout


def ping_refused(source: str, target: str, *options: str) -> str:
    """Ping without success; return what it says."""
    done = subprocess.run(
        ["ip", "netns", "exec", source, "ping", "-c", "3", "-i", "0.1", "-W", "1", *options, target],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    return done.stdout + done.stderr


def check_everything(size: int = 20_000_000) -> None:
    for family in (0, 1):
        assert " 0% packet loss" in ping("a", INSIDE["b"][family], "-c", "5")
        assert " 0% packet loss" in ping("b", INSIDE["a"][family], "-c", "3", "-s", "3000")
        transfer("a", "b", family, size)
        transfer("b", "a", family, size // 4)


def ethtool(namespace: str, **features: bool) -> None:
    words = [
        word for name, on in features.items() for word in (name.replace("_", "-"), "on" if on else "off")
    ]
    command = ["ip", "netns", "exec", namespace, "ethtool", "-K", "wire", *words]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(params=["offloaded", "gro", "wire-like"])
def condition(request: pytest.FixtureRequest, wire: None) -> Iterator[str]:
    """What the devices do: all that veth can, nothing but GRO at the receiver, nothing."""
    on = request.param == "offloaded"
    for name in "ab":
        ethtool(name, tso=on, gso=on, tx_udp_segmentation=on, gro=request.param == "gro")
    yield request.param
    for name in "ab":
        ethtool(name, tso=True, gso=True, tx_udp_segmentation=True, gro=False)


@pytest.mark.parametrize("mode", ["aes-256-gcm", "grown", "chacha20-poly1305", "transport", "stock"])
def test_pings_and_streams_pass_unchanged(wire: None, mode: str) -> None:
    with running(mode=mode) as nodes:
        check_everything()
    for report in nodes.report.values():
        assert set(report["dropped"]) <= HARMLESS, nodes.report


@pytest.mark.tool("ethtool")
@pytest.mark.parametrize("mode", ["aes-256-gcm", "grown", "stock"])
def test_streams_pass_with_and_without_the_devices_offloads(condition: str, mode: str) -> None:
    with running(mode=mode) as nodes:
        check_everything(5_000_000)
    for report in nodes.report.values():
        assert set(report["dropped"]) <= HARMLESS, nodes.report


LACKING: dict[str, dict[str, Any]] = {
    "no USO at a": {"disable_tun": {"a": ["uso4", "uso6"]}},
    "no TSO at b": {"disable_tun": {"b": ["tso4", "tso6", "uso4", "uso6"]}},
    "no checksums at b": {"disable_tun": {"b": ["csum", "tso4", "tso6", "uso4", "uso6"]}},
    "no GSO at a": {"disable_udp": {"a": ["gso", "stamps"]}},
    "no GRO at b": {"disable_udp": {"b": ["gro"]}},
    "nothing anywhere": {
        "disable_tun": dict.fromkeys("ab", ("csum", "tso4", "tso6", "uso4", "uso6")),
        "disable_udp": dict.fromkeys("ab", ("gso", "gro", "stamps")),
    },
}


@pytest.mark.parametrize(
    ("lacking", "mode"),
    [
        *((lacking, mode) for lacking in LACKING for mode in ("aes-256-gcm", "stock")),
        ("no GRO at b", "grown"),
        ("nothing anywhere", "grown"),
    ],
)
def test_streams_pass_where_the_kernel_lacks_offloads(wire: None, lacking: str, mode: str) -> None:
    with running(mode=mode, **LACKING[lacking]) as nodes:
        check_everything(3_000_000)
    for report in nodes.report.values():
        assert set(report["dropped"]) <= HARMLESS, nodes.report


@contextmanager
def loss(namespace: str, one_in: int) -> Iterator[None]:
    """Drop every so-many-th datagram that arrives, single datagrams, no trains."""
    for name in "ab":
        ethtool(name, tso=False, gso=False, tx_udp_segmentation=False, gro=False)
    rules = f"""table inet lossy {{ chain input {{ type filter hook input priority 0;
        udp dport 41820 numgen inc mod {one_in} == 0 drop; }}; }}"""
    with Namespace.open(namespace):
        apply(rules)
    try:
        yield
    finally:
        with Namespace.open(namespace):
            apply("delete table inet lossy")
        for name in "ab":
            ethtool(name, tso=True, gso=True, tx_udp_segmentation=True)


@pytest.mark.tool("ethtool")
@pytest.mark.parametrize("mode", ["aes-256-gcm", "stock"])
@pytest.mark.parametrize("size", [1232, 1452])
def test_streams_pass_unchanged_where_datagrams_are_lost(wire: None, mode: str, size: int) -> None:
    with loss("b", 60), running(mode=mode, size=size) as nodes:
        transfer("a", "b", 0, 5_000_000)
        transfer("a", "b", 1, 5_000_000)
        transfer("b", "a", 0, 2_000_000)
    assert nodes.report["b"]["received"] < nodes.report["a"]["sent"]
    for report in nodes.report.values():
        assert set(report["dropped"]) <= HARMLESS | {"outbound-too-big"}, nodes.report


@contextmanager
def wire_mtu(mtu: int) -> Iterator[None]:
    """Let the wire pass packets of so many bytes only."""
    for name in "ab":
        ip(name, f"link set wire mtu {mtu}")
    try:
        yield
    finally:
        for name in "ab":
            ip(name, "link set wire mtu 1500")
            ip(name, f"addr replace {WIRE[name][1]}/64 dev wire nodad")


@pytest.mark.parametrize("v6", [False, True])
def test_inner_packets_of_1380_bytes_pass_a_path_of_1280(wire: None, v6: bool) -> None:
    with wire_mtu(1280), running(size=1232, v6=v6) as nodes:
        for family, size in ((0, 1352), (1, 1332)):
            assert " 0% packet loss" in ping("a", INSIDE["b"][family], "-c", "3", "-M", "do", "-s", str(size))
        check_everything(3_000_000)
    for report in nodes.report.values():
        assert set(report["dropped"]) <= HARMLESS, nodes.report


def test_a_stock_peers_small_path_is_told_to_the_kernel(wire: None) -> None:
    with wire_mtu(1280), running(mode="stock", size=1252) as nodes:
        done = ping_refused("a", INSIDE["b"][0], "-M", "do", "-s", "1300")
        assert "mtu=1220" in done or "mtu = 1220" in done
        done = ping_refused("a", INSIDE["b"][1], "-M", "do", "-s", "1300")
        assert "mtu=1280" in done or "mtu = 1280" in done
        assert " 0% packet loss" in ping("b", INSIDE["a"][0], "-c", "3", "-M", "dont", "-s", "1300")
        transfer("a", "b", 0, 3_000_000)
        transfer("b", "a", 0, 3_000_000)
    assert nodes.report["a"]["dropped"]["outbound-too-big"] >= 1


def test_a_datagram_that_the_device_refuses_is_told(wire: None) -> None:
    with wire_mtu(1280), running(size=1452) as nodes:
        ping_refused("a", INSIDE["b"][0], "-s", "1300")
    assert nodes.report["a"]["too_big"] >= 1
    assert nodes.report["a"]["dropped"]["send-emsgsize"] >= 1


@pytest.mark.tool("iperf3")
def test_a_look_at_the_throughput(wire: None, capsys: pytest.CaptureFixture[str]) -> None:
    """One second each, printed; how fast it must be is another matter."""
    figures = {}
    with running() as nodes:
        for name, options in (("TCP", []), ("UDP 1300", ["-u", "-b", "2G", "-l", "1300"])):
            server = subprocess.Popen(
                ["ip", "netns", "exec", "b", "iperf3", "-s", "-1", "--forceflush", "-B", INSIDE["b"][0]],
                stdout=subprocess.PIPE,
                text=True,
            )
            assert server.stdout is not None
            while "listening" not in server.stdout.readline():
                pass
            done = subprocess.run(
                ["ip", "netns", "exec", "a", "iperf3", "-c", INSIDE["b"][0], "-t", "1", "-J", *options],
                capture_output=True,
                text=True,
                check=True,
            )
            server.communicate(timeout=10)
            end = json.loads(done.stdout)["end"]
            figures[name] = end["sum_received"]["bits_per_second"]
    with capsys.disabled():
        print(" ", ", ".join(f"{name} {rate / 1e9:.2f} Gbit/s" for name, rate in figures.items()), end=" ")
    assert all(figures.values())
    assert set(nodes.report["b"]["dropped"]) <= HARMLESS
