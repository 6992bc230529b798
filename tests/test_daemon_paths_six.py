"""Narrow links under IPv6: what pods send arrives, whether or not anybody tells how narrow they are."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator

import pytest

from crossedge.lab.flows import run_flows
from crossedge.lab.topology import Conditions
from tests.daemon_fleet import Fleet, a_fleet, until

pytestmark = [pytest.mark.namespaces, pytest.mark.slow]

OUTER = 48
"""Bytes of the IPv6 and UDP headers around a datagram."""
TOPOLOGY = """
name = "paths-six"
[[region]]
name = "east"
[[region]]
name = "west"
[[backbone]]
between = ["east", "west"]
link = { delay_ms = 5 }
[[node]]
name = "meeting"
role = "server"
region = "east"
ipv6 = true
[[router]]
name = "home"
region = "east"
nat = "symmetric-random"
ipv6 = true
[[node]]
name = "attic"
router = "home"
ipv6 = true
[[router]]
name = "narrow"
region = "west"
nat = "symmetric-random"
ipv6 = true
link = { mtu = 1280, mtu_icmp = false }
[[node]]
name = "hut"
router = "narrow"
ipv6 = true
"""
"""By IPv4 this pair cannot be direct, so what is direct is IPv6."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("six")) as made:
        yield made


@pytest.mark.parametrize("told", [False, True], ids=["black-hole", "icmp"])
@pytest.mark.parametrize("mtu", [1280, 1492])
def test_what_pods_send_passes_a_narrow_ipv6_underlay(fleet: Fleet, mtu: int, told: bool) -> None:
    if (mtu, told) != (1280, False):  # how it began
        fleet.network.set_wire("narrow", Conditions(mtu=mtu, mtu_icmp=told))
        fleet.kill("hut")
        fleet.start("hut")  # the attic's paths begin anew with the session
    fleet.go_direct("attic", "hut")
    pods = {name: fleet.member(name) for name in ("attic", "hut")}
    for each in pods.values():
        (link,) = json.loads(fleet.run(each.pod, "ip -j link show dev eth0").stdout)
        assert link["mtu"] == 1380
    wanted = [
        (pods[source].pod, address)
        for source, target in (("attic", "hut"), ("hut", "attic"))
        for address in (pods[target].pod4, pods[target].pod6)
    ]
    assert run_flows(fleet.network, [each.pod for each in pods.values()], wanted, 1 << 20) == [""] * 4
    for source, address in wanted:
        target = next(each.pod for each in pods.values() if each.pod != source)
        for size in (1332, 1352, 8000):
            assert udp_arrives(fleet, source, target, address, size), (source, address, size)
    assert fleet.path("attic", "hut") == "direct"
    assert str(fleet.peer("attic", "hut")["endpoint"]).startswith("[")

    def found() -> bool:
        sizes = {fleet.peer(*ends)["datagram_bytes"] for ends in (("attic", "hut"), ("hut", "attic"))}
        return sizes == {mtu - OUTER}

    if mtu > 1280:
        until("both ends have found the size of the path", found, 10.0)
    else:
        assert fleet.peer("attic", "hut")["datagram_bytes"] <= mtu - OUTER


def udp_arrives(fleet: Fleet, source: str, target: str, address: str, size: int) -> bool:
    """Tell whether ten datagrams of that many bytes arrive whole."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        fleet.open(target, socket.socket, family, socket.SOCK_DGRAM) as receiver,
        fleet.open(source, socket.socket, family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((address, 7002))
        receiver.settimeout(3.0)
        sent = [os.urandom(size) for _ in range(10)]
        for data in sent:
            sender.sendto(data, (address, 7002))
        try:
            return [receiver.recv(65_536) for _ in sent] == sent
        except TimeoutError:
            return False
