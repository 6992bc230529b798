"""What the host is connected to, as iproute2 set it up."""

import ipaddress
import socket
import subprocess

import pytest

from crossedge.host.interfaces import connected_networks, default_route_mtu, default_routes, host_addresses
from crossedge.host.namespaces import Namespace

pytestmark = [pytest.mark.namespaces, pytest.mark.usefixtures("inside")]
SETUP = """
link add lan0 mtu 1500 type veth peer name lan1
link add wan0 mtu 1492 type veth peer name wan1
link add crossedge0 type bridge
link add off0 type bridge
link set lan0 up
link set lan1 up
link set wan0 up
link set wan1 up
link set crossedge0 up
addr add 192.168.1.7/24 dev lan0
addr add 203.0.113.7/28 dev wan0
addr add 10.159.0.1/32 dev crossedge0
addr add 192.0.2.1/24 dev off0
addr add 10.160.9.9/32 dev lo
addr add 2001:db8::7/64 dev wan0 nodad
addr add 2001:db8:1::7/64 dev lan0 nodad
addr add 2001:db8:2::7/64 dev lan0 nodad preferred_lft 0
route add default via 192.168.1.1 dev lan0 metric 600
route add default via 203.0.113.1 dev wan0 metric 100
route add default via 2001:db8:1::1 dev lan0
"""


@pytest.fixture
def host(inside: Namespace) -> None:
    subprocess.run(["ip", "-batch", "-"], input=SETUP, text=True, check=True)


@pytest.mark.usefixtures("host")
def test_candidates_are_usable_addresses_with_the_way_out_first() -> None:
    found = [(each.interface, str(each.address), each.way_out) for each in host_addresses({"crossedge0"})]
    assert found[:2] == [("wan0", "203.0.113.7", True), ("lan0", "2001:db8:1::7", True)]
    assert set(found[2:]) == {
        ("lan0", "192.168.1.7", False),
        ("wan0", "2001:db8::7", False),
        ("lo", "10.160.9.9", False),
    }


@pytest.mark.usefixtures("host")
def test_connected_networks_are_named_by_their_interface() -> None:
    found = {(name, str(network)) for name, network in connected_networks({"crossedge0"})}
    assert found == {
        ("lan0", "192.168.1.0/24"),
        ("lan0", "2001:db8:1::/64"),
        ("lan0", "2001:db8:2::/64"),
        ("wan0", "203.0.113.0/28"),
        ("wan0", "2001:db8::/64"),
        ("off0", "192.0.2.0/24"),
        ("lo", "10.160.9.9/32"),
    }
    assert ("crossedge0", ipaddress.ip_network("10.159.0.1/32")) in connected_networks()


@pytest.mark.usefixtures("host")
def test_the_mtu_of_the_way_out_is_that_of_the_preferred_default_route() -> None:
    assert default_route_mtu() == 1492
    assert default_route_mtu(socket.AF_INET6) == 1500
    change = "route change default via 203.0.113.1 dev wan0 metric 100 mtu 1400"
    subprocess.run(["ip", *change.split()], check=True)
    assert default_route_mtu() == 1400


def test_a_host_without_networks_has_none() -> None:
    assert connected_networks() == []
    assert host_addresses() == []
    assert default_route_mtu() is None


@pytest.mark.usefixtures("host")
def test_the_ways_out_are_the_preferred_default_routes() -> None:
    assert [route.destination.version for route in default_routes()] == [4, 6]
    assert default_routes()[0].gateway == ipaddress.ip_address("203.0.113.1")
