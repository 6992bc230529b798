"""Raw netlink messages do what iproute2 says they did, in batches, with errors that say what failed."""

import errno
import ipaddress
import json
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from crossedge.host.addresses import add_address, delete_address, list_addresses
from crossedge.host.links import (
    VethEnd,
    add_link,
    add_veth,
    delete_link,
    get_link,
    list_links,
    rouse_veth,
    set_link,
)
from crossedge.host.namespaces import Namespace
from crossedge.host.neighbours import Neighbour, delete_neighbour, list_neighbours, set_neighbour
from crossedge.host.netlink import Batch, Netlink, NetlinkError, attribute, parse_attributes, parse_messages
from crossedge.host.routes import THROW, UNREACHABLE, Route, add_route, delete_route, list_routes, set_route
from crossedge.host.rules import Rule, add_rule, delete_rule, list_rules

pytestmark = pytest.mark.namespaces
TABLE, PROTOCOL = 41820, 206


@pytest.fixture
def netlink(inside: Namespace) -> Iterator[Netlink]:
    with Netlink() as opened:
        yield opened


def run(netlink: Netlink, *steps: Any) -> None:
    """Apply builders, each given as (function, *arguments), in one batch."""
    batch = Batch()
    for function, *arguments in steps:
        function(batch, *arguments)
    netlink.run(batch)


def ip(*arguments: str) -> Any:
    shown = subprocess.run(["ip", "-j", *arguments], capture_output=True, check=True).stdout
    return json.loads(shown or b"[]")


def make_link(netlink: Netlink, name: str = "test0") -> int:
    run(netlink, (add_link, name, "bridge"))
    batch = Batch()
    set_link(batch, name, up=True, link_local=False)
    netlink.run(batch)
    link = get_link(netlink, name)
    assert link is not None
    return link.index


def test_a_pod_is_wired_by_two_sends(netlink: Netlink) -> None:
    pod = Namespace.anonymous()
    mac = bytes.fromhex("020000000001")
    batch = Batch()
    eth0 = VethEnd("eth0", namespace=pod.fileno(), mac=mac, index=77, mtu=1380)
    add_veth(batch, VethEnd("ce0", index=1077, mtu=1380), eth0, up=True)
    netlink.run(batch)
    with pod, Netlink() as inside:
        batch = Batch()
        set_link(batch, 77, up=True)
        inside.run(batch)
        run(
            inside,
            (add_address, 77, ipaddress.ip_interface("10.160.3.2/32")),
            (add_address, 77, ipaddress.ip_interface("fd00::2/128")),
            (
                set_neighbour,
                Neighbour(77, ipaddress.ip_address("169.254.1.1"), bytes.fromhex("020000000002")),
            ),
            (set_route, Route(ipaddress.ip_network("169.254.1.1/32"), 77)),
            (
                set_route,
                Route(ipaddress.ip_network("0.0.0.0/0"), 77, gateway=ipaddress.ip_address("169.254.1.1")),
            ),
        )
        shown = ip("addr", "show", "dev", "eth0")[0]
        assert (shown["ifindex"], shown["mtu"], shown["address"]) == (77, 1380, "02:00:00:00:00:01")
        assert "UP" in shown["flags"]
        addresses = {each["local"]: each for each in shown["addr_info"]}
        assert addresses["10.160.3.2"]["prefixlen"] == 32
        assert addresses["fd00::2"]["nodad"]
        assert "tentative" not in addresses["fd00::2"]
        assert ip("route", "show", "default")[0]["gateway"] == "169.254.1.1"
        link = get_link(inside, "eth0")
    host = get_link(netlink, "ce0")
    assert link is not None
    assert host is not None
    assert (host.kind, host.index, host.up, host.mtu, host.peer) == ("veth", 1077, True, 1380, 77)
    assert link.mac == "02:00:00:00:00:01"
    pod.close()


def test_links_are_changed_listed_and_deleted(netlink: Netlink) -> None:
    index = make_link(netlink)
    batch = Batch()
    set_link(batch, index, up=False, mtu=1400, gso_max_size=62000, rename="test1", mac=b"\x02\0\0\0\0\x09")
    netlink.run(batch)
    link = get_link(netlink, "test1")
    assert link is not None
    assert (link.index, link.mtu, link.gso_max_size, link.up) == (index, 1400, 62000, False)
    assert link.mac == "02:00:00:00:00:09"
    assert [each.name for each in list_links(netlink)] == ["lo", "test1"]
    run(netlink, (delete_link, "test1"), (delete_link, "test1"), (delete_link, index))
    assert get_link(netlink, "test1") is None
    assert get_link(netlink, index) is None


def test_ipv4_may_have_longer_super_packets_than_the_rest(netlink: Netlink) -> None:
    batch = Batch()
    big = VethEnd("test0", gso_max_size=62_000, gso_ipv4_max_size=180_000)
    add_veth(batch, big, VethEnd("test1", gso_max_size=100_000, gso_ipv4_max_size=90_000))
    set_link(batch, "test0", arp=False)
    netlink.run(batch)
    link, peer = get_link(netlink, "test0"), get_link(netlink, "test1")
    assert link is not None
    assert peer is not None
    assert (link.arp, link.gso_max_size, link.gso_ipv4_max_size, link.up) == (False, 62_000, 180_000, False)
    assert (peer.arp, peer.gso_max_size, peer.gso_ipv4_max_size) == (True, 100_000, 90_000)
    for sizes in ((61_000, 170_000), (60_000, 0)):
        batch = Batch()
        set_link(batch, "test0", gso_max_size=sizes[0], gso_ipv4_max_size=sizes[1])
        netlink.run(batch)
        link = get_link(netlink, "test0")
        assert link is not None
        assert (link.arp, link.gso_max_size) == (False, sizes[0])
        assert link.gso_ipv4_max_size == (sizes[1] or sizes[0])


def test_a_veth_that_is_roused_takes_packets_at_once(netlink: Netlink) -> None:
    """Even on kernels where asking for the link does not do it."""
    ours, theirs = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"
    for _ in range(20):
        namespace = Namespace.anonymous()
        with namespace.call(Netlink) as inside:
            batch = Batch()
            add_veth(batch, VethEnd("v-out", mac=ours), VethEnd("v-in", namespace.fileno(), mac=theirs))
            netlink.run(batch)
            link, other = get_link(inside, "v-in"), get_link(netlink, "v-out")
            assert link is not None
            assert other is not None
            batch = Batch()
            set_link(batch, link.index, up=True, link_local=False)
            add_address(batch, link.index, ipaddress.ip_interface("192.0.2.2/24"), prefix_route=True)
            set_neighbour(batch, Neighbour(link.index, ipaddress.ip_address("192.0.2.1"), ours))
            inside.run(batch)
            batch = Batch()
            add_address(batch, other.index, ipaddress.ip_interface("192.0.2.1/24"), prefix_route=True)
            set_link(batch, other.index, up=True, link_local=False)
            netlink.run(batch)
            with (
                socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
                namespace.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as sender,
            ):
                receiver.bind(("192.0.2.1", 9))
                receiver.setblocking(False)
                batch = Batch()
                rouse_veth(batch, link.index)
                inside.run(batch)
                sender.sendto(b"first", ("192.0.2.1", 9))
                assert receiver.recv(10) == b"first"
            found = get_link(inside, "v-in")
            assert found is not None
            assert found.running
        namespace.close()
        batch = Batch()
        delete_link(batch, "v-out")
        netlink.run(batch)


def test_a_link_without_link_local_address_stays_so(netlink: Netlink) -> None:
    index = make_link(netlink)
    assert list_addresses(netlink, index) == []


def test_addresses_come_and_go(netlink: Netlink) -> None:
    index = make_link(netlink)
    four, six = ipaddress.ip_interface("10.159.0.7/16"), ipaddress.ip_interface("fd00::7/64")
    run(netlink, (add_address, index, four), (add_address, index, six), (add_address, index, six))
    listed = list_addresses(netlink, index)
    assert {address.interface for address in listed} == {four, six}
    assert {str(address.network) for address in listed} == {"10.159.0.0/16", "fd00::/64"}
    assert all(address.usable for address in listed)
    assert list_routes(netlink, protocol=2, table=254) == []  # no route of the prefix
    run(netlink, (delete_address, index, four), (delete_address, index, six), (delete_address, index, six))
    assert list_addresses(netlink, index) == []
    assert {str(address.interface) for address in list_addresses(netlink)} == {"127.0.0.1/8", "::1/128"}


def test_a_point_to_point_address_shows_both_sides(netlink: Netlink) -> None:
    index = make_link(netlink)
    subprocess.run(["ip", "addr", "add", "10.9.0.1", "peer", "10.9.8.0/24", "dev", "test0"], check=True)
    (address,) = list_addresses(netlink, index)
    assert (str(address.interface), str(address.network)) == ("10.9.0.1/32", "10.9.8.0/24")


@pytest.mark.parametrize(("prefix", "source"), [("10.160.5.0/24", "10.159.0.1"), ("fd00:5::/64", "fd00::1")])
def test_what_is_set_is_what_is_listed(netlink: Netlink, prefix: str, source: str) -> None:
    index = make_link(netlink)
    run(netlink, (add_address, index, ipaddress.ip_interface(source)))
    route = Route(
        ipaddress.ip_network(prefix),
        index,
        source=ipaddress.ip_address(source),
        table=TABLE,
        protocol=PROTOCOL,
        metric=1024,
        mtu=1300,
    )
    run(netlink, (set_route, route))
    assert list_routes(netlink, table=TABLE) == [route]
    (shown,) = ip(f"-{route.destination.version}", "route", "show", "table", str(TABLE))
    assert shown["protocol"] == str(PROTOCOL)
    assert shown["prefsrc"] == source
    changed = route._replace(mtu=0)
    run(netlink, (set_route, changed))
    assert list_routes(netlink, table=TABLE) == [changed]
    with pytest.raises(NetlinkError, match=f"cannot add the route to {prefix}: File exists") as caught:
        run(netlink, (add_route, changed))
    assert caught.value.errno == errno.EEXIST
    run(netlink, (delete_route, changed), (delete_route, changed))
    assert list_routes(netlink, table=TABLE) == []


@pytest.mark.parametrize("kind", [UNREACHABLE, THROW])
def test_routes_that_lead_nowhere(netlink: Netlink, kind: int) -> None:
    routes = [
        Route(ipaddress.ip_network(prefix), table=TABLE, protocol=PROTOCOL, metric=4000, kind=kind)
        for prefix in ("10.160.0.0/12", "fd00::/48", "0.0.0.0/0", "::/0")
    ]
    run(netlink, *((set_route, route) for route in routes))
    assert sorted(list_routes(netlink, table=TABLE), key=str) == sorted(routes, key=str)
    run(netlink, *((delete_route, route) for route in routes))
    assert list_routes(netlink, table=TABLE) == []


def test_thousands_of_routes_go_in_one_batch_and_are_filtered_by_table_and_protocol(netlink: Netlink) -> None:
    index = make_link(netlink)
    fours = [ipaddress.IPv4Network((0x0AA00000 + (i << 8), 24)) for i in range(2000)]
    sixes = [ipaddress.IPv6Network((0xFD << 120 | i << 64, 64)) for i in range(2000)]
    wanted = [
        Route(prefix, index, table=TABLE, protocol=PROTOCOL, metric=1024) for prefix in [*fours, *sixes]
    ]
    foreign = [route._replace(table=254) for route in wanted[:10]] + [
        wanted[0]._replace(protocol=4, metric=9)
    ]
    run(netlink, *((set_route, route) for route in wanted + foreign))
    assert set(list_routes(netlink, table=TABLE, protocol=PROTOCOL)) == set(wanted)
    assert len(list_routes(netlink, table=TABLE)) == len(wanted) + 1
    assert set(list_routes(netlink, protocol=PROTOCOL)) == set(wanted) | set(foreign[:10])
    run(netlink, *((delete_route, route) for route in wanted))
    assert list_routes(netlink, table=TABLE, protocol=PROTOCOL) == []


def test_failures_in_a_batch_are_told_in_order_and_stop_nothing(netlink: Netlink) -> None:
    index = make_link(netlink)
    batch = Batch()
    for i in range(1000):
        # Each third names a link that is not there.
        prefix = ipaddress.IPv4Network((0x0AA00000 + (i << 8), 24))
        set_route(batch, Route(prefix, 9999 if i % 3 == 0 else index, table=TABLE))
    errors = netlink.execute(batch)
    assert [error.what for error in errors[:2]] == [
        "set the route to 10.160.0.0/24",
        "set the route to 10.160.3.0/24",
    ]
    assert len(errors) == 334
    assert {error.errno for error in errors} == {errno.ENODEV}
    assert len(list_routes(netlink, table=TABLE)) == 666
    with pytest.raises(NetlinkError):
        netlink.run(batch)
    assert netlink.execute(Batch()) == []


def test_the_kernels_own_words_are_in_the_error(netlink: Netlink) -> None:
    index = make_link(netlink)
    route = Route(ipaddress.ip_network("10.0.0.0/8"), index, gateway=ipaddress.ip_address("192.0.2.1"))
    with pytest.raises(NetlinkError, match=r"route to 10\.0\.0\.0/8: .*\(Nexthop has invalid gateway\)"):
        run(netlink, (set_route, route))


def test_rules_are_made_once_and_deleted(netlink: Netlink) -> None:
    before = list_rules(netlink)
    ours = [
        Rule(family, 5206, TABLE, mark=0xCE5E, invert=True, protocol=PROTOCOL)
        for family in (socket.AF_INET, socket.AF_INET6)
    ]
    run(netlink, *((add_rule, rule) for rule in [*ours, *ours]))
    assert [rule for rule in list_rules(netlink) if rule.table == TABLE] == ours
    (shown,) = ip("rule", "show", "table", str(TABLE))
    assert (shown["priority"], shown["not"], shown["fwmark"]) == (5206, None, "0xce5e")
    run(netlink, *((delete_rule, rule) for rule in [*ours, *ours]))
    assert list_rules(netlink) == before


def test_a_rule_of_another_form_is_not_plain(netlink: Netlink) -> None:
    subprocess.run(
        ["ip", "rule", "add", "from", "10.0.0.0/8", "lookup", str(TABLE), "priority", "5206"], check=True
    )
    subprocess.run(["ip", "rule", "add", "blackhole", "priority", "5207"], check=True)
    plain = {rule.priority: rule.plain for rule in list_rules(netlink) if rule.family == socket.AF_INET}
    assert plain == {0: True, 5206: False, 5207: False, 32766: True, 32767: True}


def test_neighbours_are_set_and_deleted(netlink: Netlink) -> None:
    index = make_link(netlink)
    entries = [
        Neighbour(index, ipaddress.ip_address(address), bytes.fromhex("020000000003"))
        for address in ("10.0.0.1", "fd00::1")
    ]
    run(netlink, *((set_neighbour, entry) for entry in entries))

    def listed() -> list[Neighbour]:
        """Return what is not for groups: the kernel reports its own when it has time."""
        found = list_neighbours(netlink, index)
        return sorted((each for each in found if not each.address.is_multicast), key=str)

    assert listed() == sorted(entries, key=str)
    run(netlink, *((delete_neighbour, entry) for entry in [*entries, *entries]))
    assert listed() == []


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "sixteen-letters!"])
def test_a_bad_link_name_is_refused_before_the_kernel_sees_it(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a link"):
        delete_link(Batch(), name)


def test_short_or_broken_messages_end_the_parse() -> None:
    assert list(parse_messages(b"\x03\0\0\0" + bytes(20))) == []
    assert list(parse_messages(b"\xff\0\0\0" + bytes(20))) == []
    assert parse_attributes(attribute(3, b"ok") + b"\xff\0\x01\0") == {3: b"ok"}
    assert parse_attributes(b"\0\0\x01\0") == {}
