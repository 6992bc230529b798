"""The real server, its command and its sockets, on loopback."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from crossedge.rendezvous import server as server_module
from crossedge.rendezvous.checkpoint import decode_checkpoint
from crossedge.rendezvous.config import RendezvousConfig
from crossedge.rendezvous.server import Server
from crossedge.rendezvous.sockets import SOL_UDP, UDP_GRO, UDP_SEGMENT
from crossedge.wire import messages as m
from crossedge.wire import stun
from crossedge.wire.armour import armour
from crossedge.wire.bundle import RendezvousAddress
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey, CookieReply, PairKeys, is_cookie_reply
from crossedge.wire.relay import pack_header
from tests.rendezvous_client import UNIX, Node, World

COMMAND = str(Path(sys.executable).parent / "crossedge-rendezvous")
PATIENCE = 10.0

Start = Callable[..., "Running"]
Connect = Callable[..., "Socket"]


class Running:
    """A server process under a root directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process = subprocess.Popen(
            [COMMAND, "run", "--root", str(root)], stderr=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stderr is not None
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line)
            if "listening on" in line:
                break

    def status(self) -> dict[str, object]:
        shown = command("status", "--json", "--root", str(self.root))
        assert shown.returncode == 0, shown.stderr
        answer = json.loads(shown.stdout)
        assert isinstance(answer, dict)
        return answer

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=PATIENCE)
        self.log += rest.splitlines()
        return self.process.returncode


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, check=False, timeout=30)


@pytest.fixture
def world() -> World:
    made = World()
    made.now = time.time() - UNIX
    return made


@pytest.fixture
def start(tmp_path: Path, world: World) -> Iterator[Start]:
    running: list[Running] = []
    key = base64.b64encode(world.ca.public).decode()

    def starter(*lines: str, fresh: bool = True) -> Running:
        if fresh:
            made = command("init", "--root", str(tmp_path), "--network", key)
            assert made.returncode == 0, made.stderr
            name = RendezvousAddress.parse(made.stdout.strip())
            file = tmp_path / "etc/crossedge/rendezvous.toml"
            file.write_text("\n".join([*lines, file.read_text()]))
            public_of(world, name.public_key)
        running.append(Running(tmp_path))
        return running[-1]

    yield starter
    for server in running:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.fixture
def connect(world: World) -> Iterator[Connect]:
    opened: list[Socket] = []

    def connector(name: str, host: str = "127.0.0.1") -> Socket:
        opened.append(Socket(Node(world, name), UdpEndpoint(host, 3478), host))
        return opened[-1]

    yield connector
    for node in opened:
        node.socket.close()


def public_of(world: World, public_key: bytes) -> None:
    """Let the world's nodes speak to a server of which only the public key is known."""

    class Public:
        public = public_key

    world.key = cast(ControlKey, Public())  # nodes use the public half alone


class Socket:
    """A node on a real socket."""

    def __init__(self, node: Node, server: UdpEndpoint, address: str = "127.0.0.1") -> None:
        self.node = node
        self.server = server
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind((address, 0))
        self.socket.settimeout(PATIENCE)
        node.pair = PairKeys.derive(node.control, node.world.key.public)
        node.endpoint = UdpEndpoint(address, self.socket.getsockname()[1])

    def receive(self) -> m.Message | None:
        return self.node.take(self.socket.recv(65536))

    def ask(self, message: m.Message) -> m.Message:
        self.socket.sendto(self.node.seal(message), self.server)
        while True:
            data = self.socket.recv(65536)
            if is_cookie_reply(data):
                self.node.cookie = CookieReply.parse(data).open(self.node.world.key.public)
                self.socket.sendto(self.node.seal(message), self.server)
                continue
            answer = self.node.take(data)
            if not isinstance(answer, m.Notify):
                assert answer is not None
                return answer


def ask_stun(server: UdpEndpoint, source: str = "") -> tuple[stun.Success, UdpEndpoint, UdpEndpoint]:
    """Return the answer, where it came from, and our own endpoint."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((source, 0))
        sock.settimeout(PATIENCE)
        sock.sendto(stun.encode_request(b"t" * 12), server)
        data, where = sock.recvfrom(2048)
        answer = stun.decode(data)
        assert isinstance(answer, stun.Success)
        return answer, UdpEndpoint(*where[:2]), UdpEndpoint(*sock.getsockname()[:2])


@pytest.mark.namespaces
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_stun_and_register_on_real_sockets(start: Start, connect: Connect, host: str) -> None:
    server = start()
    answer, where, mine = ask_stun(UdpEndpoint(host, 3478), host)
    assert answer.mapped == mine
    assert where == answer.origin == UdpEndpoint(host, 3478)
    node = connect("alice", host)
    registered = node.ask(node.node.registration())
    assert isinstance(registered, m.Registered)
    assert registered.observed == node.node.endpoint
    assert abs(registered.unix_time - time.time()) < 5
    status = server.status()
    assert status["leases"] == 1
    assert status["received"] == {"Register": 1}
    assert status["failed_sends"] == {}
    shown = command("status", "--root", str(server.root)).stdout
    assert "1 nodes are here" in shown


@pytest.mark.namespaces
def test_wildcard_socket_answers_from_the_address_that_was_asked(start: Start) -> None:
    start()
    for host in ("127.0.0.1", "127.0.0.2", "127.9.9.9"):
        for port in (3478, 3479):
            answer, where, _ = ask_stun(UdpEndpoint(host, port))
            assert where == answer.origin == UdpEndpoint(host, port)


@pytest.mark.namespaces
def test_two_addresses_give_full_behaviour_discovery(start: Start) -> None:
    start('listen = ["127.0.0.1:3478"]', 'alternate = ["127.0.0.2"]')
    answer, _, _ = ask_stun(UdpEndpoint("127.0.0.1", 3478))
    assert answer.other == UdpEndpoint("127.0.0.2", 3479)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(PATIENCE)
        for change_ip, change_port, origin in (
            (False, True, ("127.0.0.1", 3479)),
            (True, False, ("127.0.0.2", 3478)),
            (True, True, ("127.0.0.2", 3479)),
        ):
            sock.sendto(stun.encode_request(b"t" * 12, change_ip, change_port), ("127.0.0.1", 3478))
            assert sock.recvfrom(2048)[1] == origin


@pytest.mark.namespaces
@pytest.mark.parametrize("offloads", [[], ['disable_offloads = ["gso", "gro"]']], ids=["offloads", "none"])
def test_relayed_train_arrives_whole(start: Start, connect: Connect, offloads: list[str]) -> None:
    server = start(*offloads)
    alice, bob = connect("alice"), connect("bob")
    where = alice.server
    for node in (alice, bob):
        assert isinstance(node.ask(node.node.registration()), m.Registered)
    reply = alice.ask(m.Call(id=1, seq=alice.node.next_seq(), target=bob.node.id, sealed=b"for bob"))
    assert isinstance(reply, m.CallReply)
    called = bob.receive()
    while isinstance(called, m.Notify):
        called = bob.receive()
    assert isinstance(called, m.Called)
    segments = [pack_header(reply.channel) + bytes([number]) * 1192 for number in range(30)]
    segments.append(segments[0][:100])
    bob.socket.setsockopt(SOL_UDP, UDP_GRO, 1)
    alice.socket.sendmsg([b"".join(segments)], [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", 1200))], 0, where)
    for segment in segments:
        alice.socket.sendto(segment, where)
    got: list[bytes] = []
    while len(got) < 2 * len(segments):
        data, ancillary, _, source = bob.socket.recvmsg(65536, 64)
        assert source == where
        size = struct.unpack("=i", ancillary[0][2])[0] if ancillary else len(data)
        got += [data[at : at + size] for at in range(0, len(data), size)]
    assert got == segments * 2
    relay = server.status()["relay"]
    assert isinstance(relay, dict)
    assert relay["datagrams"] == 2 * len(segments)


@pytest.mark.namespaces
def test_restarted_server_brings_its_nodes_back(start: Start, connect: Connect) -> None:
    server = start()
    node = connect("alice")
    registered = node.ask(node.node.registration())
    assert isinstance(registered, m.Registered)
    assert server.end(signal.SIGTERM) == 0
    assert not (server.root / "run/crossedge-rendezvous/control.sock").exists()
    checkpoint = server.root / "var/lib/crossedge/rendezvous/leases"
    assert checkpoint.stat().st_mode & 0o777 == 0o600
    server = start(fresh=False)
    notify = node.receive()
    assert isinstance(notify, m.Notify)
    assert notify.epoch != registered.epoch
    again = node.ask(node.node.registration())
    assert isinstance(again, m.Registered)
    assert again.epoch == notify.epoch
    assert server.end(signal.SIGINT) == 0


@pytest.mark.namespaces
def test_blocklist_file_takes_effect_on_sighup(
    start: Start, connect: Connect, world: World, tmp_path: Path
) -> None:
    file = tmp_path / "etc/crossedge/blocklist"
    server = start('blocklists = ["/etc/crossedge/blocklist"]')
    assert any("blocklist" in line for line in server.log)
    node = connect("alice")
    assert isinstance(node.ask(node.node.registration()), m.Registered)
    file.write_text(armour("BLOCKLIST", world.blocklist(4, {"alice": 1000})))
    server.process.send_signal(signal.SIGHUP)
    answer = None
    for _ in range(100):
        answer = node.ask(m.Keepalive(id=1, seq=node.node.next_seq(), epoch=0, version=0))
        if isinstance(answer, m.Error):
            break
    assert isinstance(answer, m.Error)
    assert answer.code == "unregistered"
    refused = node.ask(node.node.registration())
    assert isinstance(refused, m.Error)
    assert refused.code == "revoked"


@pytest.mark.namespaces
def test_port_in_use_is_one_line_and_status_2(start: Start, tmp_path: Path) -> None:
    start()
    second = command("run", "--root", str(tmp_path))
    assert second.returncode == 2
    assert second.stderr == (
        "crossedge-rendezvous: listen: 0.0.0.0:3478: expected an address this host can open "
        "(Address already in use)\n"
    )


@pytest.mark.namespaces
@pytest.mark.tool("turnutils_stunclient")
@pytest.mark.parametrize("second", [(), ('listen = ["127.0.0.1:3478"]', 'alternate = ["127.0.0.2"]')])
def test_stock_stun_client_gets_its_address_and_ends(start: Start, second: tuple[str, ...]) -> None:
    # With two addresses it goes on to RESPONSE-PORT, and would wait for ever for an answer.
    start(*second)
    shown = subprocess.run(
        ["turnutils_stunclient", "-p", "3478", "127.0.0.1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    text = shown.stdout + shown.stderr
    assert shown.returncode == 0, text
    assert re.search(r"reflexive addr: 127\.0\.0\.1:\d+", text), text


@pytest.mark.namespaces
@pytest.mark.tool("turnutils_natdiscovery")
def test_stock_nat_discovery_finds_no_nat_on_loopback(start: Start) -> None:
    start('listen = ["127.0.0.1:3478"]', 'alternate = ["127.0.0.2"]')
    shown = subprocess.run(
        ["turnutils_natdiscovery", "-m", "-f", "-p", "3478", "-L", "127.0.0.1", "127.0.0.1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    text = shown.stdout + shown.stderr
    assert "Endpoint Independent Filtering!" in text, text


@pytest.mark.namespaces
@pytest.mark.asyncio
async def test_checkpoint_is_kept_while_the_server_runs(
    connect: Connect, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "CHECKPOINT_INTERVAL", 0.01)
    loop = asyncio.get_running_loop()
    written: asyncio.Queue[bytes] = asyncio.Queue()
    write = server_module.write_atomic
    refusals = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def noted(path: Path, content: bytes) -> None:
        if refusals:
            raise refusals.pop()  # the next round has to try again, though no node has moved since
        write(path, content)
        loop.call_soon_threadsafe(written.put_nowait, content)

    monkeypatch.setattr(server_module, "write_atomic", noted)
    server = Server(RendezvousConfig(networks=(world.ca.public,)), world.key, tmp_path)
    ready = asyncio.Event()
    running = asyncio.create_task(server.run(ready.set))
    await ready.wait()
    node = connect("alice")
    await asyncio.to_thread(node.ask, node.node.registration())
    content = await asyncio.wait_for(written.get(), PATIENCE)
    (hint,) = decode_checkpoint(content)
    assert (hint.endpoint, hint.control_key) == (node.node.endpoint, node.node.control.public)
    assert hint.local == UdpEndpoint("127.0.0.1", 3478)
    server.stop()
    await running
    assert (tmp_path / "var/lib/crossedge/rendezvous/leases").read_bytes() == content
