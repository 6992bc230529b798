"""A whole daemon and stock WireGuard: what a `[[static_peer]]` is promised, on real packets.

The drawing is in `stock_lab`. meshd is as the operator starts it; the other end is Debian's wireguard-go,
which knows nothing of us.
"""

from __future__ import annotations

import re
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.stock_lab import EDGE_PORT, START, StockLab, StockPeer, counted, stock_lab
from tests.waiting import answered, until

pytestmark = [
    pytest.mark.namespaces,
    *(pytest.mark.tool(name) for name in ("wireguard-go", "wg", "ip", "ping", "ss")),
]

SECRET = "c2VjcmV0" * 5 + "YWI="  # 32 bytes
OTHER_SECRET = "b3RoZXIh" * 5 + "YWI="
IP_MTU_DISCOVER, IP_PMTUDISC_PROBE, IP_RECVERR, IP_MTU = 10, 3, 11, 14
IPV6_MTU_DISCOVER, IPV6_RECVERR = 23, 25
MSG_ERRQUEUE = socket.MSG_ERRQUEUE
SO_EE = struct.Struct("=IBBBxII")
EMSGSIZE = 90


def peers() -> list[StockPeer]:
    return [
        StockPeer("lodge", 1, "lodge"),
        StockPeer("vault", 2, "vault", preshared=SECRET),
        StockPeer("cabin", 3, "cabin", known=False, keepalive=1),
        StockPeer("mute", 4, "lodge", preshared=SECRET, at_edge=OTHER_SECRET),
    ]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StockLab]:
    with stock_lab(tmp_path_factory.mktemp("stock"), peers()) as lab:
        yield lab


both = pytest.mark.parametrize("name", ["lodge", "vault"], ids=["no psk", "psk"])


@both
def test_pings_pass_both_ways_and_over_both_protocols(lab: StockLab, name: str) -> None:
    peer = lab.peers[name]
    for where in ("edge", lab.pod):
        assert lab.ping(where, peer.inner4).all
        assert lab.ping(where, peer.inner6).all
    for target in (lab.overlay4, lab.overlay6, lab.pod4, lab.pod6):
        assert lab.ping(peer.host, target).all
    shown = lab.peer(name)
    assert (shown["kind"], shown["state"], shown["path"]) == ("static", "up", "direct")
    assert shown["endpoint"] == f"{lab.network.nodes[peer.host].address4}:{peer.port}"
    assert shown["superframes"] is False


@pytest.mark.tool("iperf3")
@pytest.mark.parametrize(
    ("name", "version"), [("lodge", 4), ("lodge", 6), ("vault", 4)], ids=["no psk", "no psk, IPv6", "psk"]
)
@pytest.mark.parametrize("way", ["to the peer", "from the peer"])
def test_tcp_flows(lab: StockLab, name: str, version: int, way: str) -> None:
    peer = lab.peers[name]
    target = peer.inner4 if version == 4 else peer.inner6
    end = lab.iperf(lab.pod, peer.host, target, *(["-R"] if way == "from the peer" else []))
    rate = end["sum_received"]["bits_per_second"] / 1e6
    print(f"TCP {way} over IPv{version}: {rate:.0f} Mbit/s, {end['sum_sent'].get('retransmits')} again")
    assert rate > 10


@pytest.mark.tool("iperf3")
@both
@pytest.mark.parametrize("way", ["to the peer", "from the peer"])
def test_udp_flows(lab: StockLab, name: str, way: str) -> None:
    reverse = ["-R"] if way == "from the peer" else []
    peer = lab.peers[name]
    for _ in range(TRIES):
        end = lab.iperf(lab.pod, peer.host, peer.inner4, "-u", "-b", "20M", *reverse)
        packets, lost = end["sum"]["packets"], end["sum"]["lost_percent"]
        print(f"UDP {way}: {lost:.2f} % of {packets} lost")
        if packets > 500 and lost < 2:
            return
    pytest.fail(f"{lost:.2f} % of {packets} lost at the last of {TRIES} tries")


def test_another_preshared_key_opens_no_session(lab: StockLab) -> None:
    mute = lab.peers["mute"]
    assert lab.ping("edge", mute.inner4, count=2).received == 0
    assert lab.handshake(mute) == 0
    assert lab.peer("mute")["state"] == "idle"


def test_peer_behind_a_nat_comes_to_us_and_keeps_its_mapping(lab: StockLab) -> None:
    """Its router forgets after two seconds; the peer's keepalive comes each second."""
    for name in ("udp_timeout", "udp_timeout_stream"):
        lab.run("cabin-router", "sysctl", "-qw", f"net.netfilter.nf_conntrack_{name}=2")
    cabin = lab.peers["cabin"]
    until("the peer behind the NAT has a session", lambda: lab.handshake(cabin) > 0, START)
    router = lab.network.routers["cabin-router"]
    assert lab.peer("cabin")["endpoint"] == f"{router.outer}:{cabin.port}"
    time.sleep(4)  # twice what the router remembers: only keepalives hold the mapping now
    assert lab.ping(lab.pod, cabin.inner4).all
    assert lab.ping(lab.pod, cabin.inner6).all
    assert lab.ping("cabin", lab.pod4).all


def test_peer_that_roams_to_another_port_is_followed_without_loss(lab: StockLab) -> None:
    cabin, router = lab.peers["cabin"], lab.network.routers["cabin-router"]
    assert lab.ping("cabin", lab.pod4).all
    pings = lab.start_ping("cabin", lab.pod4, 100, 0.02)
    until("a third of the pings is answered", lambda: answered(pings.run) >= 35, START)
    lab.wg(cabin, "set", cabin.device, "listen-port", "51999")
    assert pings.wait(30.0).missing == []
    until("the endpoint moved", lambda: lab.peer("cabin")["endpoint"] == f"{router.outer}:51999", START)
    assert lab.ping(lab.pod, cabin.inner4).all


def test_peer_may_not_borrow_a_source(lab: StockLab) -> None:
    """Not that of a member, of another peer, of ourselves, nor any other."""
    lodge = lab.peers["lodge"]
    assert lab.ping("lodge", lab.pod4).all
    for borrowed in (lab.peers["vault"].inner4, "10.160.200.9", "192.0.2.77", lab.overlay4):
        lab.run("lodge", "ip", "addr", "add", f"{borrowed}/32", "dev", lodge.device)
        before = lab.dropped().get("inner-source", 0)
        command = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "0.3", "-I", borrowed, lab.pod4]
        assert " 0 received" in lab.network.run("lodge", command).stdout
        assert lab.dropped()["inner-source"] == before + 3
        lab.run("lodge", "ip", "addr", "del", f"{borrowed}/32", "dev", lodge.device)


def test_peer_reaches_nothing_but_our_pods_and_overlay_address(lab: StockLab) -> None:
    """Neither our underlay, nor another peer, nor the internet behind us, though the host forwards."""
    lodge = lab.peers["lodge"]
    outside = [lab.network.nodes["cloud"].address4, lab.peers["vault"].inner4, "10.160.200.9"]
    lab.wg(lodge, "set", lodge.device, "peer", lab.public, "allowed-ips", "0.0.0.0/0,::/0")
    try:
        for target in outside:
            before = lab.dropped().get("inner-destination", 0)
            lab.run("lodge", "ip", "route", "add", f"{target}/32", "dev", lodge.device)
            command = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "0.3", "-I", lodge.inner4, target]
            assert " 0 received" in lab.network.run("lodge", command).stdout
            lab.run("lodge", "ip", "route", "del", f"{target}/32", "dev", lodge.device)
            assert lab.dropped()["inner-destination"] == before + 3
    finally:
        allowed = ",".join(lab.prefixes)
        lab.wg(lodge, "set", lodge.device, "peer", lab.public, "allowed-ips", allowed)


def test_nothing_leaves_to_a_peer_but_from_our_own_addresses_and_to_its_own(lab: StockLab) -> None:
    peer = lab.peers["lodge"]
    before = lab.dropped()
    underlay = lab.network.nodes["edge"].address4
    command = ["ping", "-n", "-c", "3", "-i", "0.05", "-W", "0.3"]
    assert " 0 received" in lab.network.run("edge", [*command, "-I", underlay, peer.inner4]).stdout
    assert " 0 received" in lab.network.run("edge", [*command, "10.160.200.9"]).stdout
    after = lab.dropped()
    assert after["outbound-source"] - before.get("outbound-source", 0) == 3
    assert after["outbound-no-peer"] - before.get("outbound-no-peer", 0) == 3


def route_mtu(lab: StockLab, prefix: str) -> int | None:
    family = "-6" if ":" in prefix else "-4"
    found = re.search(
        r"\bmtu (\d+)", lab.run("edge", "ip", family, "route", "show", prefix, "table", "41820")
    )
    return int(found[1]) if found else None


def shrink(lab: StockLab, mtu: int) -> None:
    """Let the edge's link to the internet have another MTU, on both ends."""
    number = lab.network.nodes["edge"].address4.rpartition(".")[2]
    lab.run("edge", "ip", "link", "set", "eth0", "mtu", str(mtu))
    lab.run("region-town", "ip", "link", "set", f"c{number}", "mtu", str(mtu))


def too_big(lab: StockLab, target: str, size: int) -> int | None:
    """Send a UDP packet of `size` bytes that the route's MTU does not stop; return the MTU in the answer."""
    v6 = ":" in target
    family, level = (socket.AF_INET6, socket.IPPROTO_IPV6) if v6 else (socket.AF_INET, socket.IPPROTO_IP)
    with lab.network.site("edge").namespace:
        opened = socket.socket(family, socket.SOCK_DGRAM)
    with opened:
        opened.setblocking(False)
        opened.setsockopt(level, IPV6_MTU_DISCOVER if v6 else IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
        opened.setsockopt(level, IPV6_RECVERR if v6 else IP_RECVERR, 1)
        opened.bind((lab.overlay6 if v6 else lab.overlay4, 0))
        opened.sendto(bytes(size - (48 if v6 else 28)), (target, 9))
        errors = select.poll()
        errors.register(opened, 0)  # POLLERR, which comes unasked for
        end = time.monotonic() + 0.7
        while (left := end - time.monotonic()) > 0:
            errors.poll(left * 1000)
            try:
                _, ancillary, _, _ = opened.recvmsg(2048, 512, MSG_ERRQUEUE)
            except BlockingIOError:
                continue
            for _, _, data in ancillary:
                error, _, _, _, info, _ = SO_EE.unpack_from(data)
                if error == EMSGSIZE:
                    return int(info)
    return None


def test_path_of_a_stock_peer_sets_the_routes_mtu_and_larger_packets_are_answered(lab: StockLab) -> None:
    """The way out shrinks to 1,360 bytes: 1,360 - 28 (IPv4, UDP) - 32 (WireGuard) = 1,300 are left."""
    peer = lab.peers["lodge"]
    assert lab.ping(lab.pod, peer.inner4).all
    assert [route_mtu(lab, prefix) for prefix in peer.allowed] == [1376, 1376]  # see `whole_mtu`
    shrink(lab, 1360)
    try:
        until("routes have the MTU", lambda: [route_mtu(lab, p) for p in peer.allowed] == [1300, 1300], 3.0)
        whole = ("-M", "do", "-s")
        lab.ping("edge", peer.inner4, *whole, str(1300 - 28), count=1)  # teaches the other side's kernel
        for where in ("edge", lab.pod):
            assert lab.ping(where, peer.inner4, *whole, str(1300 - 28), count=2).all
            assert lab.ping(where, peer.inner6, *whole, str(1300 - 48), count=2).all
            for target, size in ((peer.inner4, 1301 - 28), (peer.inner6, 1301 - 48)):
                command = ["ping", "-n", "-c", "2", "-i", "0.05", "-W", "1", *whole, str(size), target]
                said = lab.network.run(where, command)
                assert re.search(r"mtu ?[:=] ?1300", said.stdout + said.stderr), said
        for target in (peer.inner4, peer.inner6):
            assert too_big(lab, target, 1301) == 1300
            assert too_big(lab, target, 1300) is None
    finally:
        shrink(lab, 1500)
    until("routes have the MTU", lambda: [route_mtu(lab, p) for p in peer.allowed] == [1376, 1376], 3.0)


TRIES = 3  # of UDP, which loses where the machine is too busy to receive it
REKEYED = 262.0  # seconds: rekeys come after 120 and 240
INTERVAL = 0.1


@pytest.mark.slow
def test_sessions_live_across_rekeys_that_either_side_starts(tmp_path: Path) -> None:
    """Pings both ways on two sessions at once: we began one, so its rekeys are ours; the peer the other."""
    with stock_lab(
        tmp_path, [StockPeer("lodge", 1, "lodge"), StockPeer("vault", 2, "vault", preshared=SECRET)]
    ) as lab:
        ours, theirs = lab.peers["lodge"], lab.peers["vault"]
        assert lab.ping(lab.pod, ours.inner4, count=1).all
        assert lab.ping(theirs.host, lab.pod4, count=1).all
        ways = [
            (lab.pod, ours.inner4),
            (ours.host, lab.pod4),
            (lab.pod, theirs.inner4),
            (theirs.host, lab.pod4),
        ]
        count = int(REKEYED / INTERVAL)
        pings = [lab.start_ping(where, target, count, INTERVAL) for where, target in ways]
        seen: dict[str, set[int]] = {"lodge": set(), "vault": set()}
        while pings[0].process.poll() is None:
            for name, peer in lab.peers.items():
                seen[name].add(lab.handshake(peer))
            with suppress(subprocess.TimeoutExpired):
                pings[0].process.wait(5.0)
        for (where, target), ping in zip(ways, pings, strict=True):
            result = ping.wait(60.0)
            print(f"{where} to {target}: {result.received} of {result.sent} answered")
            assert (result.sent, result.missing) == (count, []), (where, target)
        for name, handshakes in seen.items():
            print(f"{name}: {len(handshakes) - 1} rekeys seen by wg")
            assert len(handshakes) >= 3, (name, handshakes)
        sent, received = r"Sending handshake initiation", r"Received handshake initiation"
        assert counted(ours.log, sent) == 0
        assert counted(ours.log, received) >= 3
        assert counted(theirs.log, sent) >= 3
        assert counted(theirs.log, received) == 0
        assert lab.dropped().get("inner-source", 0) == 0
        assert lab.network.nodes["edge"].address4 + f":{EDGE_PORT}" in lab.wg(theirs, "show", theirs.device)
