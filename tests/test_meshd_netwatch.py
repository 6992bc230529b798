"""Which network events make the daemon look at the host, and which looks find something new."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

from crossedge.host.links import IFF_UP, Link
from crossedge.host.monitor import Event
from crossedge.host.routes import Route
from crossedge.meshd.netwatch import IFF_RUNNING, Change, Found, NetworkWatch

WAY = Route(ipaddress.ip_network("0.0.0.0/0"), 2, ipaddress.ip_address("192.168.1.1"))
FOUND = Found(("192.168.1.5",), (WAY,))
UPLINK = Link(2, "eth0", "", IFF_UP | IFF_RUNNING, 1500, 65536, "02:00:00:00:00:01", 0, 0)
NOTHING = Change(False, False)


def watching() -> NetworkWatch:
    watch = NetworkWatch("crossedge0")
    assert watch.concerns(Event("link", False, UPLINK))
    assert watch.look(FOUND) == Change(True, False)
    return watch


def test_routes_of_our_own_and_of_pods_are_no_reason_to_look() -> None:
    watch = watching()
    pod = Route(ipaddress.ip_network("10.160.1.7/32"), 9)
    assert not watch.concerns(Event("route", False, pod))
    assert not watch.concerns(Event("link", False, replace(UPLINK, index=3, name="crossedge0", kind="tun")))
    far = replace(UPLINK, index=4, name="crossedge0-far", kind="veth")
    assert not watch.concerns(Event("link", False, far))
    assert watch.concerns(Event("route", False, WAY))
    assert watch.concerns(Event("overrun", False, None))


def test_a_default_route_that_is_set_again_is_no_news() -> None:
    watch = watching()
    assert watch.concerns(Event("route", False, WAY))
    assert watch.look(FOUND) == NOTHING


def test_another_way_out_with_the_same_addresses_is_a_move() -> None:
    watch = watching()
    other = WAY._replace(gateway=ipaddress.ip_address("192.168.1.2"))
    assert watch.look(Found(FOUND.addresses, (other,))) == Change(True, True)
    assert watch.look(Found(("192.168.1.6",), (other,))) == Change(True, False)


def test_a_way_out_that_lost_its_carrier_for_a_moment_is_a_move() -> None:
    watch = watching()
    assert watch.concerns(Event("link", False, replace(UPLINK, flags=IFF_UP)))
    assert watch.concerns(Event("link", False, UPLINK))
    assert watch.look(FOUND) == Change(True, True)
    assert watch.look(FOUND) == NOTHING


def test_what_drivers_report_of_a_link_that_stays_is_no_reason_to_look() -> None:
    watch = watching()
    assert not watch.concerns(Event("link", False, UPLINK))
    pod = replace(UPLINK, index=9, name="veth9", kind="veth")
    assert watch.concerns(Event("link", False, pod))
    assert watch.concerns(Event("link", True, pod))
    assert watch.look(FOUND) == NOTHING
