"""The host becomes what is desired, stays so whatever others do, and is given back as it was."""

import asyncio
import contextlib
import ipaddress
import json
import os
import socket
import subprocess
from dataclasses import replace
from functools import partial

import pytest
import pytest_asyncio

from crossedge.host import sysctl
from crossedge.host.links import list_links, set_link
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Batch, Netlink
from crossedge.host.rules import list_rules
from crossedge.host.tun import Tun
from crossedge.meshd.desired import METRIC_NOWHERE, METRIC_PEER, TABLE
from crossedge.meshd.hoststate import HostConflictError, HostState, PeerRoute
from tests.host_world import DESIRED, both_devices, host_state, network, ours, picture, sh, until

pytestmark = [pytest.mark.namespaces, pytest.mark.asyncio]
state = pytest_asyncio.fixture(host_state)


@both_devices
async def test_start_sets_up_everything_that_is_desired(
    namespace: Namespace, state: HostState, disable: frozenset[str]
) -> None:
    found = picture(namespace)
    near, *far = found["link"]
    assert near == ("crossedge0", "tun" if disable else "veth", 1380, True, True)
    assert far == ([] if disable else [("crossedge0-far", "veth", 65535, True, True)])
    assert found["addresses"] == [("10.159.0.1", 32), ("fd00::1", 128)]
    assert [(rule["fwmark"], "not" in rule, rule["table"]) for rule in found["rules"]] == [
        ("0xce5e", True, "41820")
    ] * 2
    routes = ours(namespace)
    assert len(routes) == 4 + 2 * 3 + 2
    peer = routes[f"10.160.2.0/24 {METRIC_PEER}"]
    assert (peer.device, str(peer.source)) == (state.report()["tun"]["index"], "10.159.0.1")
    assert str(routes[f"fd00:0:0:2::/64 {METRIC_PEER}"].source) == "fd00::1"
    with namespace:
        for name in (
            "net/ipv4/ip_forward",
            "net/ipv6/conf/all/forwarding",
            "net/ipv4/conf/crossedge0/rp_filter",
        ):
            assert sysctl.read(name) == "1"
    report = state.report()
    json.dumps(report)
    assert report["tun"]["kind"] == near[1]
    assert ("big_tcp" in report["tun"]["offloads"]) == (not disable)
    assert report["nftables"]["current"]
    assert report["repaired"] == {}
    assert report["problems"] == []
    assert {each["name"]: each["before"] for each in report["sysctls"]}["net/ipv4/ip_forward"] == "0"


@pytest.mark.parametrize(
    ("kind", "commands"),
    [
        ("route", ["ip route del 10.160.2.0/24 table 41820"]),
        ("route", ["ip -6 route del fd00:0:0:2::/64 table 41820"]),
        ("route", ["ip route flush table 41820"]),
        ("route", ["ip -6 route flush table 41820"]),
        ("route", ["ip route replace 10.160.2.0/24 dev lo metric 1024 table 41820"]),
        ("route", ["ip route del unreachable 10.160.1.0/24 proto 206"]),
        ("route", ["ip -6 route del throw fd00:0:0:1::/64 table 41820"]),
        ("rule", ["ip rule del priority 5206"]),
        ("rule", ["ip -6 rule del priority 5206"]),
        ("address", ["ip addr del 10.159.0.1/32 dev crossedge0"]),
        ("address", ["ip addr del fd00::1/128 dev crossedge0"]),
        ("address", ["ip addr flush dev crossedge0"]),
        ("nftables", ["nft delete table inet crossedge"]),
        ("nftables", ["nft flush ruleset"]),
        ("nftables", ["nft flush chain inet crossedge forward"]),
        ("nftables", ["nft delete element inet crossedge mesh4 {10.160.0.0/12}"]),
        ("nftables", ["nft insert rule inet crossedge inbound_pods accept"]),
        ("nftables", ["nft add chain inet crossedge forward { policy drop; }"]),
        ("settings", ["sysctl -qw net.ipv4.ip_forward=0"]),
        ("settings", ["sysctl -qw net.ipv6.conf.all.forwarding=0"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
async def test_what_others_delete_or_change_is_back_within_a_second(
    namespace: Namespace, state: HostState, kind: str, commands: list[str]
) -> None:
    before = picture(namespace)
    sh(namespace, *commands)
    await until(lambda: state.repaired[kind] > 0)
    await until(lambda: picture(namespace) == before, 5)
    await state.settled()
    assert state.report()["problems"] == []
    for name in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
        assert namespace.call(sysctl.read, name) == "1"


@both_devices
@pytest.mark.parametrize(
    "commands",
    [
        ["ip link set crossedge0 down"],
        ["ip link set crossedge0 mtu 1280"],
        ["ip link set crossedge0 down", "ip link set crossedge0 name other0"],
        # The kernel tells nobody of a size: it is set right with whatever else is.
        ["ip link set crossedge0 gso_max_size 30000", "ip link set crossedge0 mtu 1280"],
        ["ip link set crossedge0 netns OTHER"],
        ["ip link del crossedge0"],
    ],
    ids=lambda value: value[-1],
)
async def test_the_device_is_back_within_a_second_whatever_its_kind(
    namespace: Namespace, state: HostState, disable: frozenset[str], commands: list[str]
) -> None:
    await sees_it_repaired(namespace, state, commands)
    assert state.report()["tun"]["kind"] == ("tun" if disable else "veth")


@pytest.mark.pair
@pytest.mark.parametrize(
    "commands",
    [
        ["ip link set crossedge0 name other0"],
        ["ip link set crossedge0 address 02:00:00:00:00:09"],
        ["ip link set crossedge0 arp on"],
        pytest.param(["ethtool -K crossedge0 tx-tcp-ecn-segmentation on"], marks=pytest.mark.tool("ethtool")),
        ["ip link set crossedge0-far down"],
        ["ip link set crossedge0-far name other0"],
        ["ip link set crossedge0-far address 02:00:00:00:00:09"],
        ["ip link set crossedge0-far arp on"],
        ["ip link set crossedge0-far mtu 1500"],
        ["ip link set crossedge0-far gso_max_size 65536", "ip link set crossedge0-far mtu 1500"],
        ["ip link set crossedge0-far netns OTHER"],
        ["ip link set crossedge0 netns OTHER", "ip link del crossedge0-far"],
        ["ip link del crossedge0-far"],
        ["ip link del crossedge0", "ip tuntap add crossedge0 mode tun"],
    ],
    ids=lambda value: value[-1],
)
async def test_what_only_a_pair_has_is_back_within_a_second(
    namespace: Namespace, state: HostState, commands: list[str]
) -> None:
    await sees_it_repaired(namespace, state, commands)


@pytest.mark.pair
async def test_sockets_of_a_far_end_that_was_down_are_made_anew(namespace: Namespace) -> None:
    """They have an error to tell, at which an event loop may take them for dead."""
    opened: list[Tun] = []
    state = namespace.call(HostState, DESIRED, on_tun=opened.append)
    first = state.start(asyncio.get_running_loop())
    await state.settled()
    sh(namespace, "ip link set crossedge0-far down", "ip link set crossedge0-far up")
    await until(lambda: len(opened) == 1)
    assert state.tun is opened[0]
    assert state.tun.holder == first.holder
    with pytest.raises(OSError):
        os.fstat(first.descriptor)
    with namespace, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inner:
        inner.sendto(b"passes", ("10.160.2.7", 9))
    assert os.read(state.tun.descriptor, 500_000).endswith(b"passes")
    other = namespace.call(HostState, DESIRED)
    with pytest.raises(OSError, match="another process holds it"):
        other.start(asyncio.get_running_loop())
    other.close()
    state.close()


@pytest.mark.pair
async def test_an_end_that_left_and_came_back_is_made_anew(namespace: Namespace, state: HostState) -> None:
    """The sockets let go of a link that leaves the namespace."""
    before = picture(namespace)
    index = state.report()["tun"]["index"]
    with namespace, Namespace.anonymous() as other, Netlink() as inside:
        pass
    move, back = Batch(), Batch()
    set_link(move, "crossedge0-far", namespace=other.fileno())
    set_link(back, "crossedge0-far", namespace=namespace.fileno())
    with namespace, Netlink() as outside:
        outside.run(move)
    with other, Netlink() as inside:
        inside.run(back)
    other.close()
    await until(lambda: state.report()["tun"]["index"] != index)
    await until(lambda: picture(namespace) == before, 5)


async def sees_it_repaired(namespace: Namespace, state: HostState, commands: list[str]) -> None:
    """Have others do something to the device; see that all is as before soon, and that packets pass."""
    before = picture(namespace)
    other = Namespace.anonymous()
    path = f"/proc/{os.getpid()}/fd/{other.fileno()}"
    sh(namespace, *(command.replace("OTHER", path) for command in commands))
    await until(lambda: state.repaired["link"] > 0)
    await until(lambda: picture(namespace) == before, 5)
    await state.settled()
    assert state.report()["problems"] == []
    with other, Netlink() as netlink:
        assert [link.name for link in list_links(netlink) if link.kind == "veth"] == []
    other.close()
    with contextlib.suppress(BlockingIOError):
        while True:
            os.read(state.tun.descriptor, 500_000)
    with namespace, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inner:
        inner.sendto(b"passes", ("10.160.2.7", 9))
    assert os.read(state.tun.descriptor, 500_000).endswith(b"passes")


async def test_our_own_changes_are_not_taken_for_those_of_others(
    namespace: Namespace, state: HostState
) -> None:
    peers = [PeerRoute(network(f"10.161.{i}.0/24")) for i in range(200)]
    for i in range(0, 200, 20):
        state.apply(replace(DESIRED, peers=frozenset(peers[i : i + 40]), mtu=1380 - i % 3))
        await asyncio.sleep(0.01)
    await state.settled()
    assert state.repaired == {}
    assert sum(route.metric == METRIC_PEER for route in ours(namespace).values()) == 20


@both_devices
async def test_a_deleted_device_is_opened_again_and_handed_over(
    namespace: Namespace, disable: frozenset[str]
) -> None:
    opened: list[Tun] = []
    state = namespace.call(HostState, DESIRED, on_tun=opened.append, disable=disable)
    first = state.start(asyncio.get_running_loop())
    descriptor = first.descriptor
    sh(namespace, "ip link del crossedge0")
    await until(lambda: len(opened) == 1)
    assert state.tun is opened[0]
    assert state.tun.descriptor != descriptor
    assert state.tun.offloads == first.offloads
    with pytest.raises(OSError):
        os.fstat(descriptor)
    await state.settled()
    assert len(ours(namespace)) == 12
    state.close()


async def test_a_thousand_peers_come_and_go_in_batches(namespace: Namespace, state: HostState) -> None:
    peers = [
        PeerRoute(network(prefix))
        for i in range(1000)
        for prefix in (
            f"10.{164 + i // 256}.{i % 256}.0/24",
            f"10.159.{4 + i // 256}.{i % 256}/32",
            f"fd00:0:0:{i + 16:x}::/64",
            f"fd00::{i + 16:x}/128",
        )
    ]
    state.apply(replace(DESIRED, peers=frozenset(peers)))
    routes = ours(namespace)
    assert sum(route.metric == METRIC_PEER for route in routes.values()) == 4000
    state.apply(
        replace(DESIRED, peers=frozenset([*peers[4:], PeerRoute(network("10.170.0.0/24"), mtu=1300)]))
    )
    changed = ours(namespace)
    assert set(routes.keys() ^ changed.keys()) == {
        f"{prefix} {METRIC_PEER}"
        for prefix in ("10.164.0.0/24", "10.159.4.0/32", "fd00:0:0:10::/64", "fd00::10/128", "10.170.0.0/24")
    }
    assert changed[f"10.170.0.0/24 {METRIC_PEER}"].mtu == 1300
    state.apply(DESIRED)
    assert len(ours(namespace)) == 12
    await state.settled()
    assert state.repaired == {}


async def test_a_new_overlay_address_is_the_source_of_all_routes(
    namespace: Namespace, state: HostState
) -> None:
    state.apply(replace(DESIRED, overlay=(ipaddress.ip_address("10.159.9.9"), DESIRED.overlay[1])))
    await state.settled()
    assert picture(namespace)["addresses"] == [("10.159.9.9", 32), ("fd00::1", 128)]
    sources = {str(r.source) for r in ours(namespace).values() if r.device and r.destination.version == 4}
    assert sources == {"10.159.9.9"}
    assert len(ours(namespace)) == 12
    assert state.repaired == {}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.161.7.1/24", "mesh prefix 10.160.0.0/12 overlaps 10.161.7.0/24, .* by uplink0"),
        ("10.0.0.1/8", "mesh prefix 10.159.0.0/16 overlaps 10.0.0.0/8, .* by uplink0"),
        ("fd00:0:0:5::1/64", "mesh prefix fd00::/48 overlaps fd00:0:0:5::/64, .* by uplink0"),
    ],
)
async def test_a_supernet_over_a_connected_network_is_refused(
    namespace: Namespace, address: str, expected: str
) -> None:
    sh(namespace, "ip link add uplink0 type bridge", f"ip addr add {address} dev uplink0")
    before = picture(namespace)
    state = namespace.call(HostState, DESIRED)
    with pytest.raises(HostConflictError, match=expected):
        state.start(asyncio.get_running_loop())
    assert picture(namespace) == before
    state.close()


async def test_a_stock_peers_prefix_over_a_connected_network_is_left_out_and_told(
    namespace: Namespace, state: HostState
) -> None:
    sh(namespace, "ip link add lan0 type bridge", "ip addr add 192.168.1.7/24 dev lan0")
    stock = frozenset(PeerRoute(network(prefix)) for prefix in ("192.168.0.0/16", "172.16.0.0/24"))
    for _ in range(2):  # the same again changes nothing
        state.apply(replace(DESIRED, stock=stock))
        await state.settled()
        (problem,) = state.report()["problems"]
        assert "stock peer's prefix 192.168.0.0/16 overlaps 192.168.1.0/24" in problem["what"]
        assert f"172.16.0.0/24 {METRIC_PEER}" in ours(namespace)
        assert f"192.168.0.0/16 {METRIC_PEER}" not in ours(namespace)
    assert namespace.call(sysctl.read, "net/ipv4/conf/all/src_valid_mark") == "1"
    sh(namespace, "ip link del lan0")  # the network is left: the way is free
    await until(lambda: f"192.168.0.0/16 {METRIC_PEER}" in ours(namespace))
    assert state.report()["problems"] == []
    state.apply(DESIRED)
    await state.settled()
    assert state.report()["problems"] == []
    assert len(ours(namespace)) == 12


async def test_a_bridge_of_our_own_pods_is_no_conflict_and_a_later_conflict_is_told(
    namespace: Namespace, state: HostState
) -> None:
    sh(namespace, "ip link add cni0 type bridge", "ip addr add 10.160.1.1/24 dev cni0")
    sh(namespace, "ip link add wlan0 type bridge", "ip addr add 10.161.0.9/16 dev wlan0")
    await until(lambda: bool(state.report()["problems"]))
    (problem,) = state.report()["problems"]
    assert "10.160.0.0/12 overlaps 10.161.0.0/16" in problem["what"]
    with pytest.raises(HostConflictError, match="wlan0"):
        state.apply(replace(DESIRED, mesh=DESIRED.mesh[1:]))
    # What is routed stays so, and what comes to it is: peers must not wait for the conflict's end.
    state.apply(replace(DESIRED, stock=frozenset({PeerRoute(network("172.16.0.0/24"))})))
    await state.settled()
    assert f"172.16.0.0/24 {METRIC_PEER}" in ours(namespace)
    assert len(state.report()["problems"]) == 1
    sh(namespace, "ip link del wlan0")
    await until(lambda: state.report()["problems"] == [])


async def test_another_tun_name_is_refused_while_running(state: HostState) -> None:
    with pytest.raises(ValueError, match="name cannot change"):
        state.apply(replace(DESIRED, tun="crossedge1"))


async def test_what_the_kernel_refuses_is_told_and_tried_until_it_works(
    namespace: Namespace, state: HostState
) -> None:
    source = ipaddress.ip_address("192.0.2.1")  # not an address of this host
    peers = DESIRED.peers | {PeerRoute(network("10.170.0.0/16"), source=source)}
    state.apply(replace(DESIRED, peers=peers))
    (problem,) = state.report()["problems"]
    assert "cannot set the route to 10.170.0.0/16" in problem["what"]
    assert len(ours(namespace)) == 12
    sh(namespace, "ip addr add 192.0.2.1/32 dev lo")
    await until(lambda: len(ours(namespace)) == 13)
    await until(lambda: state.report()["problems"] == [])


async def test_somebody_who_keeps_undoing_our_changes_is_told(
    namespace: Namespace, state: HostState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def repaired(times: int) -> bool:
        return state.repaired["route"] == times

    for i in range(20):
        sh(namespace, "ip route del 10.160.2.0/24 table 41820")
        await until(partial(repaired, i + 1))
    (problem,) = state.report()["problems"]
    assert "keeps undoing" in problem["what"]
    sh(namespace, "ip route del 10.160.2.0/24 table 41820")
    await until(partial(repaired, 21))


async def test_a_host_without_ipv6_gets_ipv4_only(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sysctl.read
    monkeypatch.setattr(sysctl, "read", lambda name: None if "ipv6" in name else real(name))
    state = namespace.call(HostState, DESIRED)
    state.start(asyncio.get_running_loop())
    assert {route.destination.version for route in ours(namespace).values()} == {4}
    with namespace, Netlink() as netlink:
        assert sum(rule.table == TABLE for rule in list_rules(netlink)) == 1
    state.close()


async def test_routers_are_still_listened_to_when_forwarding_begins(namespace: Namespace) -> None:
    sh(
        namespace,
        "ip link add uplink0 type bridge",
        "ip link set uplink0 up",
        "ip link add quiet0 type bridge",
        "ip -6 route add default dev uplink0 proto ra",
    )
    with namespace:
        assert sysctl.read("net/ipv6/conf/uplink0/accept_ra") == "1"
    state = namespace.call(HostState, DESIRED)
    state.start(asyncio.get_running_loop())
    with namespace:
        assert sysctl.read("net/ipv6/conf/uplink0/accept_ra") == "2"
        assert sysctl.read("net/ipv6/conf/quiet0/accept_ra") == "1"
    state.cleanup()
    with namespace:
        assert sysctl.read("net/ipv6/conf/uplink0/accept_ra") == "1"
    state.close()


async def test_without_the_tun_nothing_goes_another_way(namespace: Namespace, state: HostState) -> None:
    state.stop()
    sh(
        namespace,
        "ip link add uplink0 type bridge",
        "ip link set uplink0 up",
        "ip addr add 192.0.2.1/24 dev uplink0",
        "ip route add default via 192.0.2.2",
        "ip link del crossedge0",
    )
    with namespace:
        for address in ("10.160.2.7", "10.160.1.7"):
            shown = subprocess.run(
                ["ip", "route", "get", address], capture_output=True, text=True, check=False
            )
            assert shown.returncode, shown.stdout
            assert "No route to host" in shown.stderr
        marked = ["ip", "route", "get", "10.160.2.7", "mark", "0xce5e"]
        assert "uplink0" in subprocess.run(marked, capture_output=True, text=True, check=True).stdout
    assert any(route.metric == METRIC_NOWHERE for route in ours(namespace).values())
