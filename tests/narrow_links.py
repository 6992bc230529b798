"""What pods must be able to send where the underlay is narrow, over either version of IP."""

from __future__ import annotations

import json
import os
import socket
from typing import NamedTuple

from crossedge.lab.flows import run_flows
from crossedge.lab.topology import Conditions
from tests.daemon_fleet import Fleet
from tests.waiting import until


class Narrow(NamedTuple):
    """A pair whose second node is behind the router `narrow`, whose link is narrow."""

    wide: str
    narrow: str
    outer: int
    """Bytes of the IP and UDP headers around a datagram."""


def check_narrow(fleet: Fleet, pair: Narrow, mtu: int, told: bool) -> None:
    """Let both pods send by TCP and UDP through a link of that MTU; `told`: routers say what is too long."""
    wide, narrow, outer = pair
    if (mtu, told) != (1280, False):  # how it began
        fleet.network.set_wire("narrow", Conditions(mtu=mtu, mtu_icmp=told))
        fleet.kill(narrow)
        fleet.start(narrow)  # the other's paths begin anew with the session
    fleet.go_direct(wide, narrow)
    pods = {name: fleet.member(name) for name in (wide, narrow)}
    for each in pods.values():
        (link,) = json.loads(fleet.run(each.pod, "ip -j link show dev eth0").stdout)
        assert link["mtu"] == 1380
    wanted = [
        (pods[source].pod, address)
        for source, target in ((wide, narrow), (narrow, wide))
        for address in (pods[target].pod4, pods[target].pod6)
    ]
    errors = run_flows(fleet.network, [each.pod for each in pods.values()], wanted, 1 << 20)
    assert not any(errors), (
        errors,
        [(fleet.peer(*ends), fleet.status(ends[0])["dropped"]) for ends in ((wide, narrow), (narrow, wide))],
    )
    for source, address in wanted:
        target = next(each.pod for each in pods.values() if each.pod != source)
        # 1,332: the most that leaves a pod in one piece by IPv6, 1,352 by IPv4; 8,000 is cut by the pod.
        for size in (1332, 1352, 8000):
            assert udp_arrives(fleet, source, target, address, size), (source, address, size)
    assert fleet.path(wide, narrow) == "direct"

    def found() -> bool:
        sizes = {fleet.peer(*ends)["datagram_bytes"] for ends in ((wide, narrow), (narrow, wide))}
        return sizes == {mtu - outer}

    if mtu > 1280:
        until("both ends have found the size of the path", found, 10.0)
    else:
        assert fleet.peer(wide, narrow)["datagram_bytes"] <= mtu - outer


def udp_arrives(fleet: Fleet, source: str, target: str, address: str, size: int) -> bool:
    """Tell whether ten datagrams of that many bytes arrive whole."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        fleet.open(target, socket.socket, family, socket.SOCK_DGRAM) as receiver,
        fleet.open(source, socket.socket, family, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((address, 7001))
        receiver.settimeout(3.0)
        sent = [os.urandom(size) for _ in range(10)]
        for data in sent:
            sender.sendto(data, (address, 7001))
        try:
            return [receiver.recv(65_536) for _ in sent] == sent
        except TimeoutError:
            return False
