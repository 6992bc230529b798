"""The underlay changes and has narrow places; what pods send arrives all the same."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator

import pytest

from crossedge.lab.demo import registered
from crossedge.lab.flows import run_flows
from crossedge.lab.sites import join
from crossedge.lab.topology import Conditions
from tests.daemon_fleet import Fleet, a_fleet, longest_gap
from tests.underlays import FARM, HOME, WEST, behind, two_regions
from tests.waiting import until

pytestmark = pytest.mark.namespaces

INTERVAL = 0.02
DIRECT_WITHIN = 5.0
"""Seconds after a change of the network within which a pair is direct again."""
DARK_AT_MOST = 2.0
"""Seconds without an answer after a change; how short it is, is measured elsewhere."""
TOPOLOGY = two_regions(
    "paths",
    HOME,
    behind("shop"),
    FARM,
    behind("narrow", "hut", place=WEST, link={"mtu": 1280, "mtu_icmp": False}),
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("paths")) as made:
        yield made


# Roaming


def plug_in(fleet: Fleet, node: str, router: str) -> None:
    """Give a node a second interface, eth1, in a router's LAN."""
    placed, site = fleet.network.routers[router], fleet.network.nodes[node].site
    inside, outside = placed.site.port("guest"), site.port("eth1")
    join(inside, outside)
    placed.site.enslave(inside, placed.bridge)
    site.address(outside, f"{placed.lan[100]}/{placed.lan.prefixlen}", connected=True)


def go_on_across(fleet: Fleet, *commands: str) -> float:
    """Change the attic's network while it and the barn ping each other; return the longest silence."""
    pings = [
        fleet.pinging("attic", "barn", count=125, interval=INTERVAL),
        fleet.pinging("barn", "attic", count=125, interval=INTERVAL, six=True),
    ]
    for command in commands:
        fleet.run("attic", command)
    results = [ping.result() for ping in pings]
    assert all(seen.sent in seen.times for seen in results), "the last ping is answered"
    dark = max(longest_gap(seen) for seen in results) * INTERVAL
    assert dark < DARK_AT_MOST
    print("dark", dark)
    return dark


def seen_at(fleet: Fleet) -> str:
    """Return the address at which the rendezvous sees the attic."""
    return str(fleet.status("attic")["rendezvous"][0]["observed"]).rpartition(":")[0]


def reached_at(fleet: Fleet) -> str:
    """Return the address to which the barn sends what is for the attic."""
    return str(fleet.peer("barn", "attic")["endpoint"]).rpartition(":")[0]


def test_a_pair_stays_direct_when_the_default_route_moves(fleet: Fleet) -> None:
    home, shop = (fleet.network.routers[name] for name in ("home", "shop"))
    fleet.go_direct("attic", "barn")
    assert seen_at(fleet) == home.outer
    plug_in(fleet, "attic", "shop")
    go_on_across(fleet, f"ip route replace default via {shop.gateway} dev eth1 onlink")
    until("the rendezvous sees the other router", lambda: seen_at(fleet) == shop.outer, DIRECT_WITHIN)
    until("the pair is direct", lambda: fleet.path("attic", "barn") == "direct", DIRECT_WITHIN)


def test_a_pair_is_direct_again_when_the_old_uplink_goes(fleet: Fleet) -> None:
    shop = fleet.network.routers["shop"]
    fleet.go_direct("attic", "barn")
    go_on_across(fleet, "ip link set eth0 down")
    until("the pair is direct", lambda: fleet.path("attic", "barn") == "direct", DIRECT_WITHIN)
    assert reached_at(fleet) == shop.outer


def test_a_pair_is_direct_again_when_the_way_out_and_the_address_change_at_once(fleet: Fleet) -> None:
    home = fleet.network.routers["home"]
    old, new = fleet.network.nodes["attic"].address4, str(home.lan[77])
    fleet.go_direct("attic", "barn")
    go_on_across(
        fleet,
        "ip link set eth1 down",
        f"ip address del {old}/{home.lan.prefixlen} dev eth0",
        f"ip address add {new}/{home.lan.prefixlen} dev eth0",
        "ip link set eth0 up",
        f"ip route replace default via {home.gateway} dev eth0 onlink",
    )
    until("the pair is direct", lambda: fleet.path("attic", "barn") == "direct", DIRECT_WITHIN)
    assert reached_at(fleet) == seen_at(fleet) == home.outer
    candidates = {each["endpoint"] for each in fleet.status("attic")["candidates"]}
    assert f"{new}:41820" in candidates
    assert f"{old}:41820" not in candidates


def test_a_daemon_that_starts_without_a_network_is_there_as_soon_as_one_comes(fleet: Fleet) -> None:
    narrow = fleet.network.routers["narrow"]
    fleet.mesh.end("hut")
    fleet.run("hut", "ip link set eth0 down")
    fleet.start("hut")
    until("the daemon answers", lambda: fleet.status("hut"), 5.0)
    assert fleet.status("hut")["candidates"] == []
    assert not registered(fleet.member("hut"))
    fleet.run("hut", "ip link set eth0 up")
    fleet.run("hut", f"ip route replace default via {narrow.gateway} dev eth0 onlink")
    print("there", until("it is registered", lambda: registered(fleet.member("hut")), 3.0))
    print("reached", until("its pod answers", lambda: fleet.answers("barn", "hut"), 3.0))


# Narrow links


@pytest.mark.parametrize("told", [False, True], ids=["black-hole", "icmp"])
@pytest.mark.parametrize("mtu", [1280, 1492])
def test_what_pods_send_passes_a_narrow_access_link_and_pods_see_one_mtu(
    fleet: Fleet, mtu: int, told: bool
) -> None:
    if (mtu, told) != (1280, False):  # how it began
        fleet.network.set_wire("narrow", Conditions(mtu=mtu, mtu_icmp=told))
        fleet.kill("hut")
        fleet.start("hut")  # the barn's paths begin anew with the session
    fleet.go_direct("barn", "hut")
    pods = {name: fleet.member(name) for name in ("barn", "hut")}
    for each in pods.values():
        (link,) = json.loads(fleet.run(each.pod, "ip -j link show dev eth0").stdout)
        assert link["mtu"] == 1380
    wanted = [
        (pods[source].pod, address)
        for source, target in (("barn", "hut"), ("hut", "barn"))
        for address in (pods[target].pod4, pods[target].pod6)
    ]
    assert run_flows(fleet.network, [each.pod for each in pods.values()], wanted, 1 << 20) == [""] * 4
    for source, address in wanted:
        target = next(each.pod for each in pods.values() if each.pod != source)
        # 1,332: the most that leaves a pod in one piece by IPv6, 1,352 by IPv4; 8,000 is cut by the pod.
        for size in (1332, 1352, 8000):
            assert udp_arrives(fleet, source, target, address, size), (source, address, size)
    assert fleet.path("barn", "hut") == "direct"

    def found() -> bool:
        return {fleet.peer(*ends)["datagram_bytes"] for ends in (("barn", "hut"), ("hut", "barn"))} == {
            mtu - 28
        }

    if mtu > 1280:
        until("both ends have found the size of the path", found, 10.0)
    else:
        assert fleet.peer("barn", "hut")["datagram_bytes"] <= mtu - 28


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
