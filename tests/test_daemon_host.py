"""What others delete on a daemon's host comes back; its inbound rules hold; what it cannot have it says."""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from crossedge.host.links import get_link
from crossedge.host.netlink import Netlink
from crossedge.host.tun import GSO_MAX_SIZE
from crossedge.host.vethpair import BIG_TCP_SIZE
from crossedge.lab.demo_mesh import CONFIG, program
from crossedge.lab.launch import ROOTS
from tests.daemon_fleet import (
    DEVICES,
    Fleet,
    a_fleet,
    changes,
    longest_gap,
    overlay_addresses,
    pod_prefixes,
)
from tests.fair_clock import FairClock
from tests.underlays import HOME, WEST, behind, node, two_regions
from tests.waiting import until

pytestmark = pytest.mark.namespaces

REPAIRED_WITHIN = 1.0
INTERVAL = 0.02
PORT = 7000
TOPOLOGY = two_regions("host", HOME, behind("farm", "barn", place=WEST), node("till", WEST), node("spare"))
INBOUND = "".join(
    f"""
[[inbound]]
group = "cashiers"
protocol = "any"
ports = ["{PORT}"]
to = "{to}"
[[inbound]]
group = "any"
protocol = "icmp"
to = "{to}"
"""
    for to in ("pods", "host")
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    sign = {"till": ("--group", "cashiers"), "barn": ("--group", "farmers")}
    configs = {"attic": INBOUND, "barn": DEVICES["tun"]}
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("host"), sign=sign, configs=configs) as made:
        for other in ("barn", "till"):
            made.go_direct("attic", other)
        yield made


# What is deleted by hand


def damages(fleet: Fleet) -> dict[str, list[str]]:
    """Return what an operator might do by mistake, by a name for it."""
    peer = pod_prefixes(fleet.member("barn"))
    own4, own6 = overlay_addresses(fleet.member("attic"))
    return {
        "route": [f"ip route del {peer[4]} table 41820", f"ip -6 route del {peer[6]} table 41820"],
        "routes": ["ip route flush table 41820", "ip -6 route flush table 41820"],
        "rule": ["ip rule del priority 5206", "ip -6 rule del priority 5206"],
        "address": [f"ip address del {own4}/32 dev crossedge0", f"ip address del {own6}/128 dev crossedge0"],
        "table": ["nft delete table inet crossedge"],
        "rules": ["nft flush table inet crossedge"],
        "link down": ["ip link set crossedge0 down"],
        "link": ["ip link delete crossedge0"],
        "far end down": ["ip link set crossedge0-far down"],
        "far end": ["ip link delete crossedge0-far"],
    }


@pytest.mark.pair
def test_one_node_has_a_veth_pair_and_one_a_tun(fleet: Fleet) -> None:
    assert fleet.status("attic")["host"]["tun"]["kind"] == "veth"
    assert fleet.status("barn")["host"]["tun"]["kind"] == "tun"
    shown = [fleet.command(name, "crossedge", "status").stdout for name in ("attic", "barn")]
    assert "; veth: big_tcp csum tso4" in shown[0]
    assert "; TUN: csum tso4" in shown[1]


@pytest.mark.pair
def test_pods_that_were_made_before_the_daemon_ran_send_what_its_device_takes(fleet: Fleet) -> None:
    def sizes(name: str) -> tuple[int, int]:
        with fleet.network.site(fleet.member(name).pod).namespace, Netlink() as netlink:
            link = get_link(netlink, "eth0")
            assert link is not None
            return link.gso_max_size, link.gso_ipv4_max_size

    until("the pod is adapted", lambda: sizes("attic") == (GSO_MAX_SIZE, BIG_TCP_SIZE), 3.0)
    assert sizes("barn") == (GSO_MAX_SIZE, GSO_MAX_SIZE)


@pytest.mark.parametrize(
    "what",
    [
        "route",
        "routes",
        "rule",
        "address",
        "table",
        "rules",
        "link down",
        "link",
        pytest.param("far end down", marks=pytest.mark.pair),
        pytest.param("far end", marks=pytest.mark.pair),
    ],
)
def test_what_is_deleted_by_hand_is_back_within_a_second_and_traffic_goes_on(fleet: Fleet, what: str) -> None:
    before = fleet.picture("attic")
    ping = fleet.pinging("barn", "attic", count=3000, interval=INTERVAL)
    six = fleet.pinging("attic", "barn", count=3000, interval=INTERVAL, six=True)
    clock = FairClock()
    for command in damages(fleet)[what]:
        fleet.run("attic", command)
    back = until(f"{what} is back", lambda: not changes(before, fleet.picture("attic")), 3 * REPAIRED_WITHIN)
    gaps = [longest_gap(each.stop()) * INTERVAL for each in (ping, six)]
    print(what, back, gaps, clock.waited)
    assert max(gaps) < REPAIRED_WITHIN + clock.waited


@pytest.mark.parametrize("what", ["link down", "link"])
def test_a_tun_is_back_within_a_second_too(fleet: Fleet, what: str) -> None:
    before = fleet.picture("barn")
    ping = fleet.pinging("attic", "barn", count=3000, interval=INTERVAL)
    clock = FairClock()
    for command in damages(fleet)[what]:
        fleet.run("barn", command)
    until(f"{what} is back", lambda: not changes(before, fleet.picture("barn")), 3 * REPAIRED_WITHIN)
    assert longest_gap(ping.stop()) * INTERVAL < REPAIRED_WITHIN + clock.waited


# Inbound rules


@dataclass
class Attempt:
    """A try to reach a service, and what came of it: "" while nothing did."""

    source: str
    address: str
    protocol: str
    socket: socket.socket
    outcome: str = ""


@dataclass
class Services:
    """TCP and UDP listeners on a host and in its pod, which answer whatever comes."""

    fleet: Fleet
    stack: ExitStack
    attempts: list[Attempt] = field(default_factory=list)
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def listen(self, place: str) -> None:
        """Offer both services by both IP versions."""
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                opened = self.stack.enter_context(self.fleet.open(place, socket.socket, family, kind))
                if family == socket.AF_INET6:
                    opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                opened.bind(("", PORT))
                if kind == socket.SOCK_STREAM:
                    opened.listen()
                opened.setblocking(False)
                self.selector.register(opened, selectors.EVENT_READ)

    def reach_for(self, place: str, address: str) -> None:
        """Try both services at an address."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for protocol, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)):
            opened = self.stack.enter_context(self.fleet.open(place, socket.socket, family, kind))
            opened.setblocking(False)
            opened.connect_ex((address, PORT))
            if protocol == "udp":
                opened.send(b"is anybody there?")
            attempt = Attempt(place, address, protocol, opened)
            self.attempts.append(attempt)
            event = selectors.EVENT_WRITE if protocol == "tcp" else selectors.EVENT_READ
            self.selector.register(opened, event, attempt)

    def serve(self, seconds: float) -> None:
        """Answer, and note outcomes, until every attempt has one."""
        end = time.monotonic() + seconds
        while any(not attempt.outcome for attempt in self.attempts) and time.monotonic() < end:
            for key, _ in self.selector.select(0.1):
                opened = key.fileobj
                assert isinstance(opened, socket.socket)
                if isinstance(key.data, Attempt):
                    error = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    key.data.outcome = errno.errorcode[error] if error else "through"
                    self.selector.unregister(opened)
                elif opened.type == socket.SOCK_STREAM:
                    self.stack.enter_context(opened.accept()[0])
                else:
                    text, source = opened.recvfrom(100)
                    opened.sendto(text, source)


def test_only_members_of_the_group_reach_what_inbound_rules_offer_pods_and_host(fleet: Fleet) -> None:
    attic = fleet.member("attic")
    targets = [attic.pod4, attic.pod6, *overlay_addresses(attic)]
    with ExitStack() as stack:
        services = Services(fleet, stack)
        for place in ("attic", attic.pod):
            services.listen(place)
        for node in ("barn", "till"):
            for place in (node, fleet.member(node).pod):
                for address in targets:
                    services.reach_for(place, address)
        services.serve(5.0)
    got = {(each.source, each.address, each.protocol): each.outcome for each in services.attempts}
    assert len(got) == 2 * 2 * 4 * 2
    inside = {"till", fleet.member("till").pod}
    assert {key: outcome for key, outcome in got.items() if key[0] in inside and outcome != "through"} == {}
    refusals = {"EHOSTUNREACH", "EACCES"}  # by ICMP and ICMPv6: administratively prohibited
    outside = {key: outcome for key, outcome in got.items() if key[0] not in inside}
    assert {key: outcome for key, outcome in outside.items() if outcome not in refusals} == {}
    counters = fleet.status("attic")["host"]["nftables"]["counters"]
    assert counters["refused-pods"] > 0
    assert counters["refused-host"] > 0


def test_other_ports_are_refused_to_members_of_the_group_too(fleet: Fleet) -> None:
    attic = fleet.member("attic")
    for address in (attic.pod4, overlay_addresses(attic)[0]):
        with fleet.open(fleet.member("till").pod, socket.socket) as client:
            client.settimeout(3.0)
            assert client.connect_ex((address, PORT + 1)) == errno.EHOSTUNREACH


# What shows only when it runs


def start_in_vain(fleet: Fleet, node: str, root: Path, config: str, *wrapper: str) -> str:
    """Start a daemon that cannot run; return its one line, once status and host are as they should be."""
    before = fleet.picture(node)
    (root / "test.toml").write_text(config)
    words = [*wrapper, *program("meshd"), "run", "--root", str(root), "--config", str(root / "test.toml")]
    done = fleet.network.run(node, words)
    assert done.returncode == 2, done.stderr
    assert changes(before, fleet.picture(node)) == []
    lines = [line for line in done.stderr.splitlines() if "is a TUN, and not a veth pair" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_second_daemon_on_the_same_state_is_refused_and_the_first_goes_on(fleet: Fleet) -> None:
    line = start_in_vain(fleet, "attic", ROOTS / "attic", INBOUND)
    assert line == (f"meshd: {fleet.state('attic')}: expected a state directory that no other meshd is using")
    assert fleet.answers("attic", "barn")
    assert fleet.status("attic")["name"] == "attic"


def test_cleanup_is_refused_while_the_daemon_runs(fleet: Fleet) -> None:
    before = fleet.picture("attic")
    done = fleet.command("attic", "meshd", "cleanup")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"meshd: {fleet.state('attic')}: expected a state directory that no other meshd is using\n"
    )
    assert changes(before, fleet.picture("attic")) == []


def test_what_cannot_be_had_is_one_line_and_leaves_nothing(fleet: Fleet) -> None:
    fleet.mesh.end("spare")
    cleaned = fleet.command("spare", "meshd", "cleanup", "--config", str(ROOTS / "spare" / CONFIG))
    assert cleaned.returncode == 0
    root = ROOTS / "spare"

    with fleet.open("spare", socket.socket, socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 41820))
        assert start_in_vain(fleet, "spare", root, "") == (
            "meshd: meshd.toml: listen.port: expected a UDP port that is free: 41820 is in use (IPv4)"
        )

    fleet.run("spare", "ip link add lan type bridge")
    fleet.run("spare", "ip address add 10.170.3.4/20 dev lan")
    fleet.run("spare", "ip link set lan up")
    line = start_in_vain(fleet, "spare", root, "")
    assert "10.160.0.0/12" in line
    assert "10.170.0.0/20" in line
    assert "by lan" in line
    fleet.run("spare", "ip link delete lan")

    fleet.run("spare", "ip link add crossedge0 type bridge")
    assert "crossedge0" in start_in_vain(fleet, "spare", root, "")
    fleet.run("spare", "ip link delete crossedge0")

    without = ("setpriv", "--bounding-set", "-net_admin")
    assert "CAP_NET_ADMIN" in start_in_vain(fleet, "spare", root, "", *without)

    (root / "file").write_text("")
    assert "/file/state" in start_in_vain(fleet, "spare", root, 'state = "/file/state"\n')
    line = start_in_vain(fleet, "spare", root, 'run = "/file/run"\n')
    assert line == f"meshd: {root}/file/run: run: expected a directory that can be made; Not a directory"


def test_a_start_that_fails_at_the_very_end_takes_back_what_it_made(fleet: Fleet) -> None:
    root = ROOTS / "spare"
    (root / "run/other/meshd.sock/in the way").mkdir(parents=True)
    assert "meshd.sock" in start_in_vain(fleet, "spare", root, 'run = "/run/other"\n')
