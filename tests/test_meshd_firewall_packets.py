"""Real packets through two hosts' tables, with a wire in place of the encrypted path.

pod1 --veth-- host1 [crossedge0] ====== [crossedge0] host2 --veth-- pod2
                |
              wan0 ---- world 198.51.100.1, 2001:db8::1
"""

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import pytest_asyncio

from crossedge.host import sysctl
from crossedge.host.namespaces import Namespace
from crossedge.meshd.desired import Desired, InboundRule, PeerRoute
from crossedge.meshd.hoststate import HostState

pytestmark = [pytest.mark.namespaces, pytest.mark.asyncio]
network, address = ipaddress.ip_network, ipaddress.ip_address
MESH = (network("10.159.0.0/16"), network("10.160.0.0/12"), network("fd00::/48"))
NUMBERS = {1: 2, 2: 1}
both_families = pytest.mark.parametrize("version", [4, 6])


def pod(number: int, version: int) -> str:
    return f"10.160.{number}.7" if version == 4 else f"fd00:0:0:{number}::7"


def overlay(number: int, version: int) -> str:
    return f"10.159.0.{number}" if version == 4 else f"fd00::{number}"


def prefixes(number: int) -> frozenset[Any]:
    return frozenset(
        network(text)
        for text in (
            f"10.159.0.{number}/32",
            f"10.160.{number}.0/24",
            f"fd00::{number}/128",
            f"fd00:0:0:{number}::/64",
        )
    )


def desired(number: int, *inbound: InboundRule, members: dict[str, frozenset[Any]] | None = None) -> Desired:
    return Desired(
        overlay=(address(overlay(number, 4)), address(overlay(number, 6))),
        pods=(network(f"10.160.{number}.0/24"), network(f"fd00:0:0:{number}::/64")),
        mesh=MESH,
        peers=frozenset(PeerRoute(prefix) for prefix in prefixes(NUMBERS[number])),
        inbound=inbound,
        members=members or {},
    )


class Wire:
    """Two hosts, their pods and the world, in six namespaces."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.host = {number: Namespace.anonymous() for number in (1, 2)}
        self.pod = {number: Namespace.anonymous() for number in (1, 2)}
        self.world = Namespace.anonymous()
        self.state: dict[int, HostState] = {}
        self.frames: list[bytes] = []
        self.open: list[socket.socket] = []

    def start(self) -> None:
        for number in (1, 2):
            self.state[number] = self.host[number].call(HostState, desired(number))
            self.state[number].start(self.loop)
            self.connect(number)
        for number in (1, 2):
            self.loop.add_reader(self.state[number].tun.descriptor, self.pump, number, NUMBERS[number])
        self.join(self.host[1], "wan0", self.world, "wan0")
        self.sh(self.host[1], "addr add 198.51.100.2/24 dev wan0", "addr add 2001:db8::2/64 dev wan0 nodad")
        self.sh(self.world, "addr add 198.51.100.1/24 dev wan0", "addr add 2001:db8::1/64 dev wan0 nodad")
        self.sh(self.host[1], "route add default via 198.51.100.1", "-6 route add default via 2001:db8::1")

    def connect(self, number: int) -> None:
        """Attach a pod as a plugin would: a routed veth pair, with an MTU that is too large for the mesh."""
        host, inside = self.host[number], self.pod[number]
        self.join(host, "ce0", inside, "eth0")
        self.sh(host, f"route add {pod(number, 4)}/32 dev ce0", f"-6 route add {pod(number, 6)}/128 dev ce0")
        self.sh(host, "addr add 169.254.1.1/32 dev ce0", "addr add fe80::1/64 dev ce0 nodad")
        self.sh(
            inside, f"addr add {pod(number, 4)}/32 dev eth0", f"addr add {pod(number, 6)}/128 dev eth0 nodad"
        )
        self.sh(inside, "route add 169.254.1.1 dev eth0", "route add default via 169.254.1.1")
        self.sh(inside, "-6 route add default via fe80::1 dev eth0")

    def join(self, one: Namespace, first: str, other: Namespace, second: str) -> None:
        path = f"/proc/{os.getpid()}/fd/{other.fileno()}"
        with one:
            make = f"ip link add {first} type veth peer name {second} netns {path}"
            subprocess.run(make.split(), check=True)
        self.sh(one, f"link set {first} up")
        self.sh(other, f"link set {second} up")

    @staticmethod
    def sh(namespace: Namespace, *commands: str) -> None:
        with namespace:
            for command in commands:
                subprocess.run(["ip", *command.split()], check=True)

    def pump(self, source: int, destination: int) -> None:
        """Carry frames from one device to the other, virtio headers and all."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = os.read(self.state[source].tun.descriptor, 500_000)
                link = 14 if self.state[source].tun.sender >= 0 else 0
                self.frames.append(frame[:10] + frame[10 + link :])
                with contextlib.suppress(OSError, RuntimeError):  # the other side may be down
                    self.write(destination, frame)

    def inject(self, number: int, packet: bytes) -> None:
        """Let a packet come out of a host's device."""
        tun, kind = self.state[number].tun, b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"
        link = tun.mac + bytes(6) + kind if tun.sender >= 0 else b""
        self.write(number, bytes(10) + link + packet)

    def write(self, number: int, frame: bytes) -> None:
        """Write a frame of this kind of device; on both hosts it is the same."""
        tun = self.state[number].tun
        os.write(tun.sender if tun.sender >= 0 else tun.descriptor, frame)

    async def run(self, namespace: Namespace, command: str) -> bool:
        def work() -> bool:
            with namespace:
                return subprocess.run(command.split(), capture_output=True, check=False).returncode == 0

        return await asyncio.to_thread(work)

    async def ping(self, namespace: Namespace, target: str) -> bool:
        return await self.run(namespace, f"ping -c 1 -W 1 {target}")

    def listen(self, namespace: Namespace, host: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        server = namespace.call(socket.create_server, (host, port), family=family)
        server.settimeout(5)
        self.open.append(server)
        return server

    async def reaches(self, namespace: Namespace, host: str, port: int) -> bool:
        def work() -> bool:
            with namespace:
                try:
                    socket.create_connection((host, port), 2).close()
                except OSError:
                    return False
                return True

        return await asyncio.to_thread(work)

    async def apply(self, number: int, value: Desired) -> None:
        self.state[number].apply(value)
        await self.state[number].settled()

    async def counters(self, number: int) -> dict[str, int]:
        await self.state[number].refresh()
        found = self.state[number].report()["nftables"]["counters"]
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        for state in self.state.values():
            self.loop.remove_reader(state.tun.descriptor)
            state.close()
        for opened in self.open:
            opened.close()
        for namespace in (*self.host.values(), *self.pod.values(), self.world):
            namespace.close()


@pytest_asyncio.fixture
async def wire() -> AsyncIterator[Wire]:
    made = Wire()
    try:
        made.start()
        yield made
    finally:
        made.close()


@both_families
async def test_without_rules_members_reach_pods_and_host(wire: Wire, version: int) -> None:
    for source in (wire.pod[1], wire.host[1]):
        assert await wire.ping(source, pod(2, version))
        assert await wire.ping(source, overlay(2, version))
    assert await wire.counters(2) == {"spoofed": 0, "leak": 0, "not-our-pod": 0}


@both_families
@pytest.mark.parametrize("to", ["pods", "host"])
async def test_only_members_of_the_group_get_through_and_only_to_its_port(
    wire: Wire, version: int, to: Literal["pods", "host"]
) -> None:
    target = pod(2, version) if to == "pods" else overlay(2, version)
    place = wire.pod[2] if to == "pods" else wire.host[2]
    for port in (8080, 8081):
        wire.listen(place, target, port)
    rule = InboundRule("web", to, "tcp", ((8080, 8080),))
    await wire.apply(2, desired(2, rule, members={"web": prefixes(1)}))
    assert await wire.reaches(wire.pod[1], target, 8080)
    assert not await wire.reaches(wire.pod[1], target, 8081)
    assert not await wire.ping(wire.pod[1], target)
    await wire.apply(2, desired(2, rule, members={"web": prefixes(9)}))
    assert not await wire.reaches(wire.pod[1], target, 8080)
    assert (await wire.counters(2))[f"refused-{to}"] > 0
    await wire.apply(2, desired(2, rule, members={"web": prefixes(9) | prefixes(1)}))
    assert await wire.reaches(wire.pod[1], target, 8080)
    await wire.apply(2, desired(2))
    assert await wire.reaches(wire.pod[1], target, 8081)
    assert wire.state[2].repaired == {}


@both_families
async def test_a_refused_member_still_answers(wire: Wire, version: int) -> None:
    await wire.apply(2, desired(2, InboundRule("none")))
    assert not await wire.ping(wire.pod[1], pod(2, version))
    assert await wire.ping(wire.pod[2], pod(1, version))
    assert await wire.ping(wire.host[2], overlay(1, version))


@both_families
async def test_icmp_rules_let_pings_in_and_nothing_else(wire: Wire, version: int) -> None:
    wire.listen(wire.pod[2], pod(2, version), 8080)
    await wire.apply(2, desired(2, InboundRule("any", "pods", "icmp")))
    assert await wire.ping(wire.pod[1], pod(2, version))
    assert not await wire.reaches(wire.pod[1], pod(2, version), 8080)
    assert not await wire.ping(wire.pod[1], overlay(2, version))


@both_families
async def test_pods_reach_the_world_by_the_hosts_address_and_each_other_by_their_own(
    wire: Wire, version: int
) -> None:
    world, host = ("198.51.100.1", "198.51.100.2") if version == 4 else ("2001:db8::1", "2001:db8::2")
    server = wire.listen(wire.world, world, 8080)
    assert await wire.reaches(wire.pod[1], world, 8080)
    connection, peer = await asyncio.to_thread(server.accept)
    connection.close()
    assert peer[0] == host
    server = wire.listen(wire.pod[2], pod(2, version), 8080)
    for source, expected in ((wire.pod[1], pod(1, version)), (wire.host[1], overlay(1, version))):
        assert await wire.reaches(source, pod(2, version), 8080)
        connection, peer = await asyncio.to_thread(server.accept)
        connection.close()
        assert peer[0] == expected


@both_families
async def test_the_segment_size_fits_the_tun_both_ways(wire: Wire, version: int) -> None:
    server = wire.listen(wire.pod[2], pod(2, version), 8080)
    assert await wire.reaches(wire.pod[1], pod(2, version), 8080)
    (await asyncio.to_thread(server.accept))[0].close()
    sizes = [size for frame in wire.frames if (size := segment_size(frame[10:])) is not None]
    header = 40 if version == 4 else 60
    # Each is clamped as it leaves its host.
    assert sizes[0] == 1380 - header
    syn_ack = next(
        f for f in wire.frames if segment_size(f[10:]) is not None and flags(f[10:]) & 0x12 == 0x12
    )
    assert segment_size(syn_ack[10:]) == 1380 - header


def tcp(packet: bytes) -> int | None:
    if packet[0] >> 4 == 4:
        return (packet[0] & 15) * 4 if packet[9] == 6 else None
    return 40 if packet[6] == 6 else None


def flags(packet: bytes) -> int:
    offset = tcp(packet)
    return packet[offset + 13] if offset is not None else 0


def segment_size(packet: bytes) -> int | None:
    """Return the maximum segment size that a SYN asks for."""
    offset = tcp(packet)
    if offset is None or not packet[offset + 13] & 2:
        return None
    options = packet[offset + 20 : offset + (packet[offset + 12] >> 4) * 4]
    while options:
        if options[0] == 2:
            return int(struct.unpack("!H", options[2:4])[0])
        options = options[1:] if options[0] == 1 else options[options[1] :] if options[0] else b""
    return None


def udp4(source: str, destination: str) -> bytes:
    body = struct.pack("!HHHH", 1000, 2000, 12, 0) + b"abcd"
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 17, 0)
    head += socket.inet_aton(source) + socket.inet_aton(destination)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:] + body


def udp6(source: str, destination: str) -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, destination)
    body = struct.pack("!HHHH", 1000, 2000, 12, 0) + b"abcd"
    total = sum(struct.unpack("!22H", ends + body)) + len(body) + 17
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:6] + struct.pack("!H", ~total & 0xFFFF) + body[8:]
    return struct.pack("!IHBB", 6 << 28, len(body), 17, 64) + ends + body


@both_families
async def test_a_peer_cannot_reach_the_world_through_us(wire: Wire, version: int) -> None:
    world = "198.51.100.1" if version == 4 else "2001:db8::1"
    make = udp4 if version == 4 else udp6
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    receiver = wire.world.call(socket.socket, family, socket.SOCK_DGRAM)
    wire.open.append(receiver)
    receiver.bind((world, 2000))
    receiver.setblocking(False)
    wire.inject(1, make(pod(2, version), world))
    assert (await wire.counters(1))["not-our-pod"] == 1
    with pytest.raises(BlockingIOError):
        receiver.recv(100)
    # What a pod itself sends arrives: the way is open.
    sender = wire.pod[1].call(socket.socket, family, socket.SOCK_DGRAM)
    wire.open.append(sender)
    sender.sendto(b"ok", (world, 2000))
    receiver.settimeout(5)
    assert await asyncio.to_thread(receiver.recv, 100) == b"ok"


@both_families
async def test_a_mesh_source_from_outside_the_tun_is_dropped(wire: Wire, version: int) -> None:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    host, flag = ("198.51.100.2", "") if version == 4 else ("2001:db8::2", "-6 ")
    length = 32 if version == 4 else 128
    wire.sh(wire.world, f"addr add {pod(2, version)}/{length} dev lo" + (" nodad" if version == 6 else ""))
    wire.sh(wire.world, f"{flag}route add {pod(1, version)}/{length} via {host}")
    receiver = wire.pod[1].call(socket.socket, family, socket.SOCK_DGRAM)
    sender = wire.world.call(socket.socket, family, socket.SOCK_DGRAM)
    wire.open += [receiver, sender]
    receiver.bind((pod(1, version), 2000))
    receiver.setblocking(False)
    sender.bind((pod(2, version), 1000))
    sender.sendto(b"forged", (pod(1, version), 2000))
    async with asyncio.timeout(5):  # the neighbour must be found first
        while not (await wire.counters(1))["spoofed"]:
            await asyncio.sleep(0.01)
    with pytest.raises(BlockingIOError):
        receiver.recv(100)


@both_families
async def test_what_is_for_the_mesh_never_leaves_by_another_way(wire: Wire, version: int) -> None:
    flag = "" if version == 4 else "-6 "
    prefix = "10.160.2.0/24" if version == 4 else "fd00:0:0:2::/64"
    gateway = "198.51.100.1" if version == 4 else "2001:db8::1"
    wire.state[1].stop()
    # Even where somebody leads it astray, before our own rule.
    wire.sh(wire.host[1], f"{flag}route add {prefix} via {gateway} dev wan0 table 99")
    wire.sh(wire.host[1], f"{flag}rule add lookup 99 priority 100")
    with wire.world:
        capture = socket.socket(
            socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800 if version == 4 else 0x86DD)
        )
    wire.open.append(capture)
    capture.bind(("wan0", 0x0800 if version == 4 else 0x86DD))
    capture.setblocking(False)
    assert not await wire.ping(wire.pod[1], pod(2, version))
    assert not await wire.ping(wire.host[1], pod(2, version))
    seen = []
    with contextlib.suppress(BlockingIOError):
        while True:
            seen.append(capture.recv(2000))
    wanted = ipaddress.ip_address(pod(2, version)).packed
    assert not any(wanted in packet for packet in seen)
    wire.state[1] = wire.host[1].call(HostState, desired(1))
    wire.state[1].start(wire.loop)
    assert (await wire.counters(1))["leak"] >= 2


@pytest.mark.pair
async def test_what_leaves_for_the_mesh_does_not_come_in_by_the_far_end(wire: Wire) -> None:
    """The host's stack would take it for its own where it goes to a group."""
    group, host = "239.1.2.3", wire.host[1]

    def listen() -> socket.socket:
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened.bind((group, 2000))
        far = socket.if_nametoindex("crossedge0-far")
        member = socket.inet_aton(group) + bytes(4) + struct.pack("=i", far)
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        opened.settimeout(0.3)
        return opened

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
            near = struct.pack("=4s4si", b"", b"", socket.if_nametoindex("crossedge0"))
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, near)
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
            opened.sendto(b"to all", (group, 2000))

    receiver = host.call(listen)
    wire.open.append(receiver)
    host.call(send)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(receiver.recv, 100)
    assert (await wire.counters(1))["spoofed"] == 0  # nor is it taken for another's
    assert any(frame.endswith(b"to all") for frame in wire.frames)  # our own socket has it


async def test_our_own_datagrams_may_go_where_the_mesh_is(wire: Wire) -> None:
    """A stock peer's prefix may cover part of the underlay, even if the reverse path is checked strictly."""
    wire.sh(wire.world, "addr add 203.0.113.1/24 dev lo")
    with wire.world:
        sysctl.write("net/ipv4/conf/wan0/arp_announce", "2")  # ask for the neighbour as a router would
    with wire.host[1]:
        sysctl.write("net/ipv4/conf/wan0/rp_filter", "1")
    await wire.apply(1, replace(desired(1), stock=frozenset({PeerRoute(network("203.0.113.0/24"))})))
    ours = wire.host[1].call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    theirs = wire.world.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    wire.open += [ours, theirs]
    for opened, where in ((ours, "198.51.100.2"), (theirs, "203.0.113.1")):
        opened.bind((where, 41820))
        opened.settimeout(5)
    theirs.sendto(b"hello", ("198.51.100.2", 41820))
    assert await asyncio.to_thread(ours.recv, 100) == b"hello"
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0xCE5E)
    ours.sendto(b"answer", ("203.0.113.1", 41820))
    assert await asyncio.to_thread(theirs.recv, 100) == b"answer"
    # What is not ours goes into the tunnel, or nowhere.
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)
    wire.frames.clear()
    ours.sendto(b"through the tunnel", ("203.0.113.1", 41820))
    async with asyncio.timeout(5):
        while not any(b"through the tunnel" in frame for frame in wire.frames):
            await asyncio.sleep(0.01)
