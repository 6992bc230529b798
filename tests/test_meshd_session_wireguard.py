"""The session cores against the distribution's wireguard-go, over real sockets.

    this namespace                          namespace "stock"
    Shell (Handshakes, Session)   veth      wireguard-go, TUN wg0
    192.0.2.1, inner 10.9.0.N  -----------  192.0.2.2, inner 10.9.0.2

The shell answers pings of its inner address itself, and sends some.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import IPv4Address
from math import ceil
from pathlib import Path
from typing import cast

import pytest

from crossedge.meshd.device import Device
from crossedge.meshd.handshakes import Handshakes
from crossedge.meshd.keypair import seal_transport
from crossedge.meshd.noise import PrivateKey
from crossedge.meshd.sequence import tai64n
from crossedge.meshd.session import Event, KeypairRotated, Session, SessionUp
from crossedge.wire.endpoint import UdpEndpoint
from tests.waiting import eventually

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.tool("wireguard-go"),
    pytest.mark.tool("wg"),
    pytest.mark.tool("ip"),
    pytest.mark.tool("ping"),
]

STOCK = UdpEndpoint("192.0.2.2", 51820)
STOCK_INNER = IPv4Address("10.9.0.2")
ECHO_REPLY, ECHO = 0, 8


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo(kind: int, source: IPv4Address, target: IPv4Address, body: bytes) -> bytes:
    """Return an IPv4 packet with an ICMP echo or reply; `body` starts with identifier and sequence number."""
    header = struct.pack(">BBHHHBBH", 0x45, 0, 24 + len(body), 0, 0x4000, 64, 1, 0)
    header += source.packed + target.packed
    header = header[:10] + struct.pack(">H", checksum(header)) + header[12:]
    icmp = struct.pack(">BBH", kind, 0, 0) + body
    return header + icmp[:2] + struct.pack(">H", checksum(icmp)) + icmp[4:]


class Shell(asyncio.DatagramProtocol):
    """One session on one socket: what a daemon does, in a few lines."""

    def __init__(self, inner: IPv4Address, stock: bytes, psk: bytes) -> None:
        self.inner = inner
        self.loop = asyncio.get_running_loop()
        device = Device(PrivateKey(os.urandom(32)), os.urandom, lambda _: tai64n(time.time_ns() // 1000))
        self.public = device.static.public
        self.session = Session(device, stock, now=self.loop.time(), psk=psk)
        self.handshakes = Handshakes(device, lambda key: self.session if key == stock else None)
        self.queue: list[bytes] = []
        self.replies: list[int] = []
        self.events: list[Event] = []
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)  # it is no subclass before 3.12
        self.port: int = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        now = self.loop.time()
        if data[:1] == b"\4":
            opened = self.handshakes.open_transport(data, now)
            if opened is not None and opened[2]:
                self.packet(opened[2])
        else:
            self.handshakes.receive(data, UdpEndpoint(*addr), now)
        self.drain()

    def packet(self, packet: bytes) -> None:
        length = int.from_bytes(packet[2:4], "big")
        kind, body = packet[20], packet[24:length]
        if kind == ECHO:
            self.send(echo(ECHO_REPLY, self.inner, IPv4Address(packet[12:16]), body))
        elif kind == ECHO_REPLY:
            self.replies.append(int.from_bytes(body[2:4], "big"))

    def ping(self, number: int) -> None:
        self.send(echo(ECHO, self.inner, STOCK_INNER, struct.pack(">HH", 7, number) + bytes(56)))
        self.drain()

    def send(self, packet: bytes) -> None:
        now = self.loop.time()
        if self.session.current is None or not self.session.usable(now):
            self.queue.append(packet)
            self.session.initiate(now)
            return
        self.transport.sendto(seal_transport(self.session.current, packet), STOCK)
        self.session.data_sent(now, len(packet))

    def drain(self) -> None:
        while (event := self.session.poll_event()) is not None:
            self.events.append(event)
            if isinstance(event, SessionUp | KeypairRotated):
                queued, self.queue = self.queue, []
                for packet in queued:
                    self.send(packet)
        while (reply := self.handshakes.poll_transmit()) is not None:
            self.transport.sendto(*reply)
        while (datagram := self.session.poll_transmit()) is not None:
            self.transport.sendto(datagram, STOCK)
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.session.next_deadline()
        self._timer = None if deadline is None else self.loop.call_at(deadline, self.timeout)

    def close(self) -> None:
        self.session.close()
        self.drain()

    def timeout(self) -> None:
        self.session.handle_timeout(self.loop.time())
        self.drain()


def run(*command: str, given: str | None = None) -> str:
    result = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
    return result.stdout


def in_stock(*command: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", "stock", *command)


@contextmanager
def wireguard_go(directory: Path) -> Iterator[bytes]:
    """Run a stock WireGuard in its own namespace; give its public key."""
    private = directory / "key"
    private.write_text(run("wg", "genkey"))
    private.chmod(0o600)
    run("ip", "netns", "add", "stock")
    run("ip", "link", "add", "ours", "type", "veth", "peer", "name", "theirs", "netns", "stock")
    run("ip", "addr", "add", "192.0.2.1/24", "dev", "ours")
    run("ip", "link", "set", "ours", "up")
    run("ip", "-n", "stock", "addr", "add", "192.0.2.2/24", "dev", "theirs")
    run("ip", "-n", "stock", "link", "set", "theirs", "up")
    log = (directory / "wireguard-go.log").open("w")
    daemon = subprocess.Popen(
        in_stock("wireguard-go", "-f", "wg0"),
        stdout=log,
        stderr=log,
        env={**os.environ, "LOG_LEVEL": "verbose", "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"},
    )
    try:
        answers = Path("/var/run/wireguard/wg0.sock").exists
        assert eventually(lambda: answers() or daemon.poll() is not None, 5.0), "wireguard-go does not answer"
        assert daemon.poll() is None, (directory / "wireguard-go.log").read_text()
        run(*in_stock("wg", "set", "wg0", "private-key", str(private), "listen-port", str(STOCK.port)))
        run("ip", "-n", "stock", "addr", "add", f"{STOCK_INNER}/24", "dev", "wg0")
        run("ip", "-n", "stock", "link", "set", "wg0", "up")
        yield base64.b64decode(run("wg", "pubkey", given=private.read_text()))
    finally:
        daemon.terminate()
        daemon.wait(10)
        log.close()
        run("ip", "netns", "delete", "stock")
        subprocess.run(["ip", "link", "delete", "ours"], capture_output=True, check=False)


@asynccontextmanager
async def joined(stock: bytes, inner: str, directory: Path, psk: bytes = bytes(32)) -> AsyncIterator[Shell]:
    """Open a shell and make it a peer of the stock side."""
    loop = asyncio.get_running_loop()
    transport, shell = await loop.create_datagram_endpoint(
        lambda: Shell(IPv4Address(inner), stock, psk), local_addr=("192.0.2.1", 0)
    )
    secret = directory / "psk"
    secret.write_text(base64.b64encode(psk).decode())
    peer = base64.b64encode(shell.public).decode()
    settings = ["allowed-ips", f"{inner}/32", "preshared-key", str(secret)]
    settings += ["endpoint", f"192.0.2.1:{shell.port}"]
    try:
        run(*in_stock("wg", "set", "wg0", "peer", peer, *settings))
        yield shell
    finally:
        shell.close()
        transport.close()
        await asyncio.sleep(0)


PATIENCE = 0.5  # seconds for which a ping goes on after what counts


async def unanswered(target: str, number: int, interval: float) -> list[int]:
    """Let the stock side ping; return which pings had no answer. Some more give the last ones time."""
    count = number + ceil(PATIENCE / interval)
    process = await asyncio.create_subprocess_exec(
        *in_stock("ping", "-n", "-c", str(count), "-i", str(interval), "-W", "2", target),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    answered = {int(each) for each in re.findall(rb"icmp_seq=(\d+) .*time=", output)}
    return [each for each in range(1, number + 1) if each not in answered]


@pytest.mark.asyncio
@pytest.mark.parametrize("psk", [bytes(32), b"shared" * 5 + b"!!"], ids=["no psk", "psk"])
async def test_stock_wireguard_opens_a_session_and_pings(tmp_path: Path, psk: bytes) -> None:
    with wireguard_go(tmp_path) as stock:
        async with joined(stock, "10.9.0.1", tmp_path, psk) as shell:
            assert await unanswered("10.9.0.1", 20, 0.05) == []
            assert [type(event) for event in shell.events] == [SessionUp]
            assert shell.session.current is not None
            assert not shell.session.current.initiator
            assert not shell.handshakes.dropped


@pytest.mark.asyncio
@pytest.mark.parametrize("psk", [bytes(32), b"shared" * 5 + b"!!"], ids=["no psk", "psk"])
async def test_we_open_a_session_with_stock_wireguard_and_ping(tmp_path: Path, psk: bytes) -> None:
    with wireguard_go(tmp_path) as stock:
        async with joined(stock, "10.9.0.1", tmp_path, psk) as shell:
            for number in range(20):
                shell.ping(number)
                await asyncio.sleep(0.03)
            await asyncio.sleep(0.3)
            assert shell.replies == list(range(20))
            assert shell.session.current is not None
            assert shell.session.current.initiator
            assert await unanswered("10.9.0.1", 10, 0.05) == []
            assert not shell.handshakes.dropped


@pytest.mark.slow
@pytest.mark.asyncio
async def test_sessions_with_stock_wireguard_live_across_rekeys_of_either_side(tmp_path: Path) -> None:
    """Two sessions for 250 s under pings both ways: the stock side started one, we the other."""
    seconds, interval = 250, 0.1
    with wireguard_go(tmp_path) as stock:
        async with joined(stock, "10.9.0.1", tmp_path) as theirs, joined(stock, "10.9.0.3", tmp_path) as ours:
            ours.ping(0)
            assert await unanswered("10.9.0.1", 2, 0.2) == []
            pings = [
                asyncio.create_task(unanswered(target, int(seconds / interval), interval))
                for target in ("10.9.0.1", "10.9.0.3")
            ]
            for number in range(1, int(seconds / interval)):
                theirs.ping(number)
                ours.ping(number)
                await asyncio.sleep(interval)
            for ping in pings:
                assert await ping == []
            await asyncio.sleep(0.5)
            assert theirs.replies == list(range(1, int(seconds / interval)))
            assert ours.replies == list(range(int(seconds / interval)))
            for shell, initiator in ((theirs, False), (ours, True)):
                assert [type(event) for event in shell.events] == [SessionUp, KeypairRotated, KeypairRotated]
                assert shell.session.current is not None
                assert shell.session.current.initiator is initiator
                assert not shell.handshakes.dropped
