"""What a peer may not use never reaches the kernel: an authenticated member lies to a real daemon.

    town ---- cloud      the rendezvous
      |------ edge       meshd with a real TUN; a packet socket sees everything that comes out of it
      '------ mallory    a member whose programs are the test's (`evil_member`)

Each lie is sealed under the session's true keys. The daemon must count it under its name, and the packet
socket must see nothing but the honest packet that follows.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address

import pytest

from crossedge.lab.demo import bundle_of
from crossedge.lab.demo_mesh import Member, Mesh, program
from crossedge.lab.network import Network
from crossedge.lab.topology import parse_topology
from crossedge.meshd.virtio import GSO_TYPES
from tests.data_pair import ip, super_frame, tcp, udp
from tests.evil_member import EvilMember, frame
from tests.underlays import node, region, serving, underlay

pytestmark = [pytest.mark.namespaces, pytest.mark.tool("ip")]

TOWN = "town"
TOPOLOGY = underlay("guard", region(TOWN), serving("cloud", TOWN), node("edge", TOWN), node("mallory", TOWN))
STOCK_PEER = """
[[static_peer]]
name = "printer"
public_key = "rYNLTSwvOjYkMVIb3tF8N5dLmjzdXSQZFEmmcq5WJUk="
allowed_ips = ["10.8.0.2/32", "fd88::2/128"]
"""
ETH_P_ALL, SOL_PACKET, PACKET_IGNORE_OUTGOING = 3, 263, 23
WAIT = 60.0
REASONS = (  # how the counters begin that tell of what arrived inside of a session
    *("bad-tag", "checksum-", "chunk-", "frame-", "gso-", "inner-", "replay", "superframe-", "truncated"),
    *("tun-", "unknown-receiver"),
)
PARTIAL, LAST = 1, 2  # flags of a frame
TCPV4, UFO, TCPV6, UDP_L4, ECN = 1, 3, 4, 5, 0x80  # virtio's GSO types


class Guard:
    """The edge, the liar, and the eye on the TUN."""

    def __init__(self, network: Network, mesh: Mesh, stack: ExitStack) -> None:
        self.edge: Member = mesh.members["edge"]
        ours, theirs = bundle_of(self.edge).certificate, bundle_of(mesh.members["mallory"]).certificate
        self.mine4, self.mine6 = str(ours.overlay4), str(ours.overlay6)
        self.pod4, self.pod6 = (str(prefix[2]) for prefix in ours.prefixes)
        self.his4, self.his6 = (str(prefix[9]) for prefix in theirs.prefixes)
        self.underlay = network.nodes["edge"].address4
        self.cloud = network.nodes["cloud"].address4
        site = network.site("mallory")
        self.evil = EvilMember(
            mesh.members["mallory"].root, site.namespace, network.nodes["mallory"].address4
        )
        stack.callback(self.evil.close)
        with network.site("edge").namespace:
            self.tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
        stack.enter_context(self.tap)
        self.tap.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
        self.tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self.tap.bind(("crossedge0", ETH_P_ALL))
        self.tap.setblocking(False)
        self.number = 0
        self.told: dict[str, int] = {}
        """What was sent of each kind."""

    def dropped(self) -> dict[str, int]:
        found: dict[str, int] = self.edge.ask("status")["dropped"]
        return found

    def seen(self) -> list[bytes]:
        """Return the packets that came out of the TUN."""
        packets = []
        while True:
            try:
                packets.append(self.tap.recv(70_000))
            except BlockingIOError:
                return packets

    def come_out(self, enough: Callable[[list[bytes]], bool]) -> list[bytes]:
        """Return the packets that come out of the TUN, once they are enough or it has taken too long."""
        end = time.monotonic() + WAIT
        packets: list[bytes] = []
        while True:
            self.evil.turn()
            packets += self.seen()
            if enough(packets) or time.monotonic() > end:
                return packets
            self.evil.rest(self.tap)

    def honest(self) -> bytes:
        """Return a packet that mallory may send, another one each time."""
        self.number += 1
        return udp(f"honest {self.number}".encode(), source=self.his4, destination=self.mine4)

    def tell(self, *datagrams: bytes, reason: str) -> None:
        """Send a lie: it is counted by name, and only the honest packet behind it comes out.

        It counts once, or once for each of its datagrams where they do not arrive in one wake-up.
        """
        self.evil.turn()
        self.seen()
        before = self.dropped()
        packet = self.honest()
        self.evil.send("edge", *datagrams, self.evil.record("edge", frame(packet)))
        packets = self.come_out(lambda packets: packet in packets)
        after = self.dropped()
        packets += self.seen()
        grown = {name: after[name] - before.get(name, 0) for name in after if name.startswith(REASONS)}
        times = grown.pop(reason, 0)
        assert not {name: count for name, count in grown.items() if count}
        assert 1 <= times <= len(datagrams)
        assert packets == [packet]
        self.told[reason] = self.told.get(reason, 0) + times


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guard]:
    directory = tmp_path_factory.mktemp("guard")
    with ExitStack() as stack:
        network = stack.enter_context(Network(parse_topology(TOPOLOGY, "guard.toml")))
        mesh = Mesh(network, stack, directory)
        mesh.make_identities()
        members = dict(mesh.members)
        del mesh.members["mallory"]  # its program is ours
        mesh.start({"edge": STOCK_PEER})
        mesh.wait("answering", lambda member: bool(member.ask("status")), 60.0)
        mesh.members = members
        guard = Guard(network, mesh, stack)
        guard.evil.open("edge")
        yield guard
        mesh.check_alive()


def supers(guard: Guard, kind: str) -> bytes:
    """Return a super-packet that mallory may send, its checksum partial."""
    six = {"source": guard.his6, "destination": guard.mine6}
    four = {"source": guard.his4, "destination": guard.mine4}
    make, ends = {"tcp4": (tcp, four), "tcp6": (tcp, six), "udp4": (udp, four), "udp6": (udp, six)}[kind]
    return super_frame(make(bytes(1150), partial=True, **ends), 500)[10:]


def test_what_is_allowed_comes_out(guard: Guard) -> None:
    """Or the other tests would show nothing."""
    guard.evil.turn()
    guard.seen()
    wanted = []
    for kind, gso_type in (("tcp4", TCPV4), ("tcp6", TCPV6), ("udp4", UDP_L4), ("udp6", UDP_L4)):
        packet = supers(guard, kind)
        wanted.append(packet)
        guard.evil.send("edge", guard.evil.record("edge", frame(packet, gso_type, 500, PARTIAL | LAST)))
    for destination in (guard.mine4, guard.pod4):
        packet = udp(b"plain", source=guard.his4, destination=destination)
        wanted.append(packet)
        guard.evil.send("edge", guard.evil.transport("edge", packet))
    packets = guard.come_out(lambda packets: len(packets) >= len(wanted))
    assert sorted(packets) == sorted(wanted)


VIRTIO = [
    # what is wrong, counter, packet, GSO type, segment size, flags
    ("UDP fragmentation", "gso-type", "udp4", UFO, 500, PARTIAL | LAST),
    ("a type that is not", "gso-type", "tcp4", 2, 500, PARTIAL | LAST),
    ("the last type there can be", "gso-type", "tcp4", 0x7F, 500, PARTIAL | LAST),
    ("TCP with the ECN bit", "gso-type", "tcp4", ECN | TCPV4, 500, PARTIAL | LAST),
    ("only the ECN bit", "gso-type", "tcp4", ECN, 500, PARTIAL | LAST),
    ("TCP segmentation of UDP", "gso-protocol", "udp4", TCPV4, 500, PARTIAL | LAST),
    ("UDP segmentation of TCP", "gso-protocol", "tcp4", UDP_L4, 500, PARTIAL | LAST),
    ("IPv6 segmentation of IPv4", "gso-protocol", "tcp4", TCPV6, 500, PARTIAL | LAST),
    ("IPv4 segmentation of IPv6", "gso-protocol", "tcp6", TCPV4, 500, PARTIAL | LAST),
    ("no segment size", "gso-size", "tcp4", TCPV4, 0, PARTIAL | LAST),
    ("segments of one byte", "gso-size", "tcp4", TCPV4, 1, PARTIAL | LAST),
    ("segments longer than the MTU", "gso-size", "tcp4", TCPV4, 1400, PARTIAL | LAST),
    ("the largest segments", "gso-size", "udp4", UDP_L4, 0xFFFF, PARTIAL | LAST),
    ("a segment size without a type", "gso-size", "udp4", 0, 500, PARTIAL),
    ("segmentation of a whole checksum", "gso-checksum", "tcp4", TCPV4, 500, LAST),
    ("a flag of virtio's", "frame-flags", "tcp4", TCPV4, 500, PARTIAL | LAST | 4),
    ("all flags", "frame-flags", "tcp4", 0, 0, 0xFF),
]


@pytest.mark.parametrize(
    ("reason", "kind", "gso_type", "gso_size", "flags"),
    [row[1:] for row in VIRTIO],
    ids=[row[0] for row in VIRTIO],
)
def test_virtio_header_that_a_peer_may_not_use(
    guard: Guard, reason: str, kind: str, gso_type: int, gso_size: int, flags: int
) -> None:
    lie = frame(supers(guard, kind), gso_type, gso_size, flags)
    guard.tell(guard.evil.record("edge", lie), reason=reason)
    guard.tell(*guard.evil.spread("edge", lie, 3), reason=reason)


def test_checksum_that_is_asked_for_where_there_is_none(guard: Guard) -> None:
    """The kernel would write it into whatever stands there."""
    icmp = ip(guard.his4, guard.mine4, 1, b"\x08\0\0\0ping")
    guard.tell(guard.evil.record("edge", frame(icmp, 0, 0, PARTIAL)), reason="checksum-place")
    short = ip(guard.his4, guard.mine4, 17, b"1234567")
    guard.tell(guard.evil.record("edge", frame(short, 0, 0, PARTIAL)), reason="checksum-place")
    cut = ip(guard.his4, guard.mine4, 6, bytes(12) + b"\xf0" + bytes(27))
    guard.tell(guard.evil.record("edge", frame(cut, 0, 0, PARTIAL)), reason="checksum-place")


def test_segmentation_of_what_has_no_transport_header(guard: Guard) -> None:
    fragment = bytearray(supers(guard, "udp4"))
    fragment[6:8] = b"\x20\0"
    lie = frame(bytes(fragment), UDP_L4, 500, PARTIAL | LAST)
    guard.tell(guard.evil.record("edge", lie), reason="gso-fragment")
    cut = ip(guard.his4, guard.mine4, 6, bytes(12) + b"\xf0" + bytes(27))
    guard.tell(guard.evil.record("edge", frame(cut, TCPV4, 500, PARTIAL | LAST)), reason="gso-header")


@pytest.mark.parametrize(
    ("reason", "gso_type", "gso_size", "flags", "length"),
    [
        ("gso-type", UFO, 500, PARTIAL, None),
        ("frame-position", 0, 0, 0, None),
        ("frame-flags", TCPV4, 500, PARTIAL | 8, None),
        ("frame-length", TCPV4, 500, PARTIAL, 70),
        ("gso-size", TCPV4, 0, PARTIAL, None),
        ("gso-protocol", UDP_L4, 500, PARTIAL, None),
        ("gso-checksum", TCPV4, 500, 0, None),
    ],
)
def test_piece_that_a_peer_may_not_use(
    guard: Guard, reason: str, gso_type: int, gso_size: int, flags: int, length: int | None
) -> None:
    """A piece of a super-packet: the first half of it."""
    packet = supers(guard, "tcp4")
    piece = packet[: len(packet) - 575]
    lie = frame(piece, gso_type, gso_size, flags, length)
    guard.tell(guard.evil.record("edge", lie, int(gso_type not in GSO_TYPES)), reason=reason)


FOUR = {
    "ourselves": "{mine4}",
    "our pod": "{pod4}",
    "our underlay": "{underlay}",
    "the rendezvous": "{cloud}",
    "a stock peer": "10.8.0.2",
    "nobody": "10.160.200.9",
    "our LAN": "192.168.1.1",
    "link-local": "169.254.0.1",
    "loopback": "127.0.0.1",
    "this network": "0.0.0.1",
    "unspecified": "0.0.0.0",
    "multicast": "224.0.0.251",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
}
SIX = {
    "ourselves, IPv6": "{mine6}",
    "our pod, IPv6": "{pod6}",
    "a stock peer, IPv6": "fd88::2",
    "the internet, IPv6": "2a00:1::1",
    "link-local, IPv6": "fe80::1",
    "an IPv4 address in IPv6": "::ffff:10.160.0.2",
    "loopback, IPv6": "::1",
    "unspecified, IPv6": "::",
    "multicast, IPv6": "ff02::1",
}
ENDS = FOUR | SIX
OURS = {"ourselves", "our pod", "ourselves, IPv6", "our pod, IPv6"}
NO_HOST = {
    *("loopback", "this network", "unspecified", "multicast", "reserved", "broadcast"),
    *("loopback, IPv6", "unspecified, IPv6", "multicast, IPv6"),
}


def tell_ends(guard: Guard, source: str, destination: str, reason: str) -> None:
    """Send a packet with these ends in every form in which a member can send one."""
    evil = guard.evil
    packet = udp(bytes(300), source=source, destination=destination)
    guard.tell(evil.record("edge", frame(packet)), reason=reason)
    guard.tell(evil.transport("edge", packet), reason=reason)
    guard.tell(*evil.spread("edge", frame(packet), 3), reason=reason)
    whole = super_frame(tcp(bytes(1150), partial=True, source=source, destination=destination), 500)[10:]
    kind, head = (TCPV6 if ":" in source else TCPV4), len(whole) - 1150
    guard.tell(evil.record("edge", frame(whole, kind, 500, PARTIAL | LAST)), reason=reason)
    pieces = [
        evil.record("edge", frame(whole[: head + 575], kind, 500, flags), number)
        for number, flags in enumerate((PARTIAL, PARTIAL | LAST))
    ]
    guard.tell(*pieces, reason=reason)


@pytest.mark.parametrize("who", ENDS)
def test_source_that_a_peer_may_not_use(guard: Guard, who: str) -> None:
    source = ENDS[who].format_map(vars(guard))
    tell_ends(guard, source, guard.mine4 if who in FOUR else guard.mine6, "inner-source")


@pytest.mark.parametrize("who", [who for who in ENDS if who not in OURS])
def test_destination_that_a_peer_may_not_reach(guard: Guard, who: str) -> None:
    destination = ENDS[who].format_map(vars(guard))
    reason = "inner-multicast" if who in NO_HOST else "inner-destination"
    tell_ends(guard, guard.his4 if who in FOUR else guard.his6, destination, reason)


def test_lengths_and_versions_that_are_no_packet(guard: Guard) -> None:
    evil = guard.evil
    good = udp(b"length", source=guard.his4, destination=guard.mine4)
    for reason, packet in (
        ("inner-length", good + b"more"),
        ("inner-length", good[:-1]),
        ("inner-truncated", good[:19]),
        ("inner-version", b"\x50" + good[1:]),
        ("inner-header", b"\x41" + good[1:]),
        ("inner-header", b"\x4f" + good[1:]),
    ):
        guard.tell(evil.record("edge", frame(packet)), reason=reason)
    guard.tell(evil.record("edge", frame(good, length=2**31)), reason="frame-length")
    guard.tell(evil.transport("edge", good[:-1]), reason="inner-length")
    guard.tell(evil.transport("edge", b"\x50" + good[1:]), reason="inner-version")


@pytest.mark.parametrize("option", [131, 137], ids=["loose", "strict"])
def test_source_route_that_hides_a_destination(guard: Guard, option: int) -> None:
    """An IPv4 option that names further stops: the destination in the header is only the first one."""
    packet = bytearray(udp(b"route", source=guard.his4, destination=guard.mine4))
    options = bytes((option, 7, 4)) + ip_address(guard.underlay).packed + b"\0"
    packet[0:1] = b"\x47"
    packet[20:20] = options
    packet[2:4] = len(packet).to_bytes(2, "big")
    for datagram in (
        guard.evil.record("edge", frame(bytes(packet))),
        guard.evil.transport("edge", bytes(packet)),
    ):
        guard.tell(datagram, reason="inner-source-route")


@pytest.mark.parametrize("kind", [0, 2, 3, 4])
def test_routing_header_that_hides_a_destination(guard: Guard, kind: int) -> None:
    """The same in IPv6, of every type: segments are left."""
    payload = udp(b"route", source=guard.his6, destination=guard.mine6)[40:]
    header = bytes((17, 2, kind, 1)) + bytes(4) + ip_address("2a00:1::1").packed
    packet = ip(guard.his6, guard.mine6, 43, header + payload)
    for datagram in (guard.evil.record("edge", frame(packet)), guard.evil.transport("edge", packet)):
        guard.tell(datagram, reason="inner-source-route")


def test_forgeries_and_replays_come_to_nothing(guard: Guard) -> None:
    evil = guard.evil
    packet = udp(b"once", source=guard.his4, destination=guard.mine4)
    record = evil.record("edge", frame(packet))
    for bit in (8 * 4, 8 * 20, 8 * (len(record) - 1)):
        forged = bytearray(record)
        forged[bit // 8] ^= 1
        if bit == 8 * 4:
            guard.tell(bytes(forged), reason="unknown-receiver")
        else:
            guard.tell(bytes(forged), reason="bad-tag")
    message = evil.transport("edge", packet)
    guard.tell(message[:-1] + bytes((message[-1] ^ 1,)), reason="bad-tag")
    for datagram in (record, message):
        evil.send("edge", datagram)
        assert packet in guard.come_out(lambda packets: packet in packets)
        guard.tell(datagram, reason="replay")


def test_status_counts_each_kind_under_its_name(guard: Guard) -> None:
    command = [*program("crossedge"), "--root", str(guard.edge.root), "status", "--json"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    status = json.loads(said.stdout)
    for reason, count in guard.told.items():
        assert status["dropped"][reason] >= count, reason
    print({reason: status["dropped"][reason] for reason in sorted(guard.told)})
