"""A network namespace as a host, a `HostState` in it, and what iproute2 and nft show of it."""

import asyncio
import ipaddress
import json
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from crossedge.host import nft
from crossedge.host.links import list_links
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Netlink
from crossedge.host.routes import Route, list_routes
from crossedge.host.tun import BIG_TCP
from crossedge.host.vethpair import leaves_offloads
from crossedge.meshd.desired import TABLE
from crossedge.meshd.hoststate import Desired, HostState, PeerRoute
from tests.fair_clock import FairClock

network = ipaddress.ip_network

DESIRED = Desired(
    overlay=(ipaddress.ip_address("10.159.0.1"), ipaddress.ip_address("fd00::1")),
    pods=(network("10.160.1.0/24"), network("fd00:0:0:1::/64")),
    mesh=(network("10.159.0.0/16"), network("10.160.0.0/12"), network("fd00::/48")),
    peers=frozenset(
        PeerRoute(network(prefix))
        for prefix in ("10.159.0.2/32", "10.160.2.0/24", "fd00::2/128", "fd00:0:0:2::/64")
    ),
)


PAIR: frozenset[str] = frozenset()
"""Offloads to disable for a veth pair."""
TUN = frozenset({BIG_TCP})
"""Those for a TUN."""
both_devices = pytest.mark.parametrize(
    "disable", [pytest.param(PAIR, id="veth", marks=pytest.mark.pair), pytest.param(TUN, id="tun")]
)


async def host_state(
    namespace: Namespace, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[HostState]:
    """Yield what keeps the host as DESIRED, started; a fixture of tests, which heeds `both_devices`."""
    disable = request.getfixturevalue("disable") if "disable" in request.fixturenames else PAIR
    made = namespace.call(HostState, DESIRED, record=tmp_path / "host.json", disable=disable)
    made.start(asyncio.get_running_loop())
    await made.settled()
    yield made
    made.close()


def sh(namespace: Namespace, *commands: str) -> None:
    with namespace:
        for command in commands:
            subprocess.run(command.split(), check=True)


def picture(namespace: Namespace) -> dict[str, Any]:
    """Return all of the namespace that is ours, as iproute2 and nft show it."""

    def ip(*arguments: str) -> Any:
        shown = subprocess.run(["ip", "-j", *arguments], capture_output=True, check=True).stdout
        return json.loads(shown or b"[]")

    with namespace:
        links = [link for link in ip("addr", "show") if link["ifname"].startswith("crossedge0")]
        with Netlink() as netlink:
            shown = [link for link in list_links(netlink) if link.name.startswith("crossedge0")]
        found: dict[str, Any] = {
            "link": sorted((each.name, each.kind, each.mtu, each.up, each.running) for each in shown),
            "sizes": sorted((each.name, each.gso_max_size, each.gso_ipv4_max_size) for each in shown),
            "macs": sorted((each.name, each.mac, each.arp) for each in shown),
            "features": [leaves_offloads(each.name) for each in shown if each.name == "crossedge0"],
            "addresses": sorted(
                (each["local"], each["prefixlen"]) for link in links for each in link["addr_info"]
            ),
            "rules": [rule for v in "46" for rule in ip(f"-{v}", "rule") if rule["priority"] == 5206],
        }
        with Netlink() as netlink:
            listed = list_routes(netlink, table=TABLE) + list_routes(netlink, table=254, protocol=206)
        found["routes"] = sorted((route._replace(device=bool(route.device)) for route in listed), key=str)
        table = nft.list_table("inet", "crossedge")
        found["nft"] = table and [
            (kind, {key: value for key, value in entry.items() if key not in ("handle", "expr")})
            for kind, entry in table
        ]
    return found


async def until(condition: Callable[[], bool], seconds: float = 1.0) -> None:
    clock = FairClock()
    while not condition():
        assert not clock.over(seconds), f"not within {seconds} s"
        await asyncio.sleep(0.01)


def ours(namespace: Namespace) -> dict[str, Route]:
    with namespace, Netlink() as netlink:
        return {f"{route.destination} {route.metric}": route for route in list_routes(netlink, table=TABLE)}
