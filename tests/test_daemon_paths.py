"""The underlay changes and has narrow places; what pods send arrives all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crossedge.lab.demo import registered
from tests.daemon_fleet import DEVICES, Fleet, a_fleet, longest_gap, plug_in
from tests.narrow_links import Narrow, check_narrow
from tests.underlays import FARM, HOME, WEST, behind, two_regions
from tests.waiting import until

pytestmark = pytest.mark.namespaces

INTERVAL = 0.02
OUTER = 28
"""Bytes of the IPv4 and UDP headers around a datagram."""
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
    configs = {"hut": DEVICES["tun"]}  # what is narrow is told through either kind of device
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("paths"), configs=configs) as made:
        yield made


# Roaming


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
    check_narrow(fleet, Narrow("barn", "hut", OUTER), mtu, told)
