"""A flood of control messages with fresh sender keys against a real rendezvous, and what nodes notice of it.

As a program it is the flooder: `python rendezvous_flood.py HOST PORT KEY RATE SECONDS SOURCES COOKIES` sends
sealed messages, made beforehand, in trains that the kernel cuts (UDP_SEGMENT), at a rate that it keeps to,
and prints how many it sent in how many seconds. `Keepalives` are those of registered nodes, in turn.
"""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import sys
import time
from random import Random
from typing import TYPE_CHECKING

from crossedge.rendezvous.sockets import SOL_UDP, UDP_SEGMENT
from crossedge.wire import messages as m
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import PairKeys, is_cookie_reply, seal

if TYPE_CHECKING:  # the flooder runs without the tests' package
    from tests.rendezvous_client import Node

TRAIN = 32
"""Messages that leave by one system call."""
KINDS = 65_536
"""Different messages, each of another sender: many times what a server could remember."""
SIZE = 96
"""Bytes of plaintext, about those of a keepalive."""


def forgeries(key: bytes, count: int, cookies: float, seed: int = 1) -> list[bytes]:
    """Return messages that only their mac1 fits: sender keys without a private half.

    `cookies` is the share of them that show a cookie, a wrong one.
    """
    random = Random(seed)
    made = []
    for _ in range(count):
        pair = PairKeys(random.randbytes(32), key, random.randbytes(32), bytes(32))
        cookie = random.randbytes(16) if random.random() < cookies else None
        made.append(seal(random.randbytes(SIZE), pair, random.randbytes(24), cookie))
    return made


def flood(
    server: tuple[str, int], key: bytes, rate: float, seconds: float, sources: int, cookies: float
) -> tuple[int, float]:
    """Send at a rate from so many source addresses, each of a /24 of its own; return (sent, seconds)."""
    messages = forgeries(key, KINDS, cookies)
    trains = [b"".join(messages[at : at + TRAIN]) for at in range(0, KINDS, TRAIN)]
    segment = struct.pack("=H", len(messages[0]))
    socks = []
    for number in range(sources):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((f"127.{100 + number // 250}.{number % 250}.9", 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        sock.connect(server)
        socks.append(sock)
    print("ready", flush=True)
    sys.stdin.readline()
    began = now = time.monotonic()
    sent = turn = 0
    while now < began + seconds:
        while sent < (now - began) * rate:
            socks[turn % sources].sendmsg([trains[turn % len(trains)]], [(SOL_UDP, UDP_SEGMENT, segment)])
            turn += 1
            sent += TRAIN
        time.sleep(0.0005)
        now = time.monotonic()
    return sent, now - began


class Keepalives:
    """Registered nodes on real sockets that send keepalives in turn, each once, and note the answers."""

    PATIENCE = 1.0
    """Seconds after which an answer counts as lost."""

    def __init__(self, nodes: list[Registered], server: UdpEndpoint) -> None:
        self._nodes = nodes
        self._server = server
        self.times: list[float] = []
        self.sent = 0

    @property
    def lost(self) -> int:
        """How many were not answered in time."""
        return self.sent - len(self.times)

    def run(self, seconds: float, interval: float) -> None:
        """Send one keepalive each `interval` seconds for a time, and wait for the last answers."""
        poll = select.epoll()
        waiting: dict[tuple[int, int], float] = {}
        nodes = {}
        for node in self._nodes:
            poll.register(node.socket.fileno(), select.EPOLLIN)
            nodes[node.socket.fileno()] = node
        began = now = time.monotonic()
        turn = 0
        while now < began + seconds + self.PATIENCE:
            due = began + turn * interval
            if now >= due and due < began + seconds:
                node = self._nodes[turn % len(self._nodes)]
                waiting[node.socket.fileno(), node.send(self._server)] = now
                self.sent += 1
                turn += 1
                continue
            for descriptor, _ in poll.poll(max(0.0, min(due - now, 0.1)) if due > now else 0.1):
                for answered in nodes[descriptor].answers():
                    took = time.monotonic() - waiting.pop((descriptor, answered))
                    if took < self.PATIENCE:
                        self.times.append(took)
            now = time.monotonic()
        poll.close()

    def quantile(self, share: float) -> float:
        """Return the time that this share of the answers took at most, in seconds."""
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Registered:
    """A node of `tests.rendezvous_client` on a socket."""

    def __init__(self, node: Node, address: str) -> None:
        self.node = node
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, 0))
        self.socket.settimeout(10.0)
        node.pair = PairKeys.derive(node.control, node.world.key.public)
        node.endpoint = UdpEndpoint(address, self.socket.getsockname()[1])

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def register(self, server: UdpEndpoint) -> None:
        """Register, with a cookie."""
        for _ in range(5):
            self.socket.sendto(self.node.seal(self.node.registration()), server)
            data = self.socket.recv(2048)
            while isinstance(answer := self.node.take(data), m.Notify):
                data = self.socket.recv(2048)
            if isinstance(answer, m.Registered):
                self.socket.setblocking(False)
                return
        raise RuntimeError(f"{self.node.name} cannot register: {answer}")

    def send(self, server: UdpEndpoint) -> int:
        """Send a keepalive; return its id."""
        message = m.Keepalive(id=self.node.id_(), seq=self.node.next_seq(), epoch=0, version=0)
        self.socket.sendto(self.node.seal(message), server)
        return message.id

    def answers(self) -> list[int]:
        """Return the ids of the answers that have come."""
        found = []
        while True:
            try:
                data = self.socket.recv(2048)
            except BlockingIOError:
                return found
            if is_cookie_reply(data):
                raise RuntimeError(f"{self.node.name} has lost its lease")
            answer = self.node.take(data)
            if isinstance(answer, m.KeepaliveReply):
                found.append(answer.id)


class Flooder:
    """The flooder as a process of its own."""

    def __init__(
        self, server: UdpEndpoint, key: bytes, rate: int, seconds: float, sources: int, cookies: float
    ) -> None:
        """Let it make its messages."""
        arguments = [server.host, server.port, key.hex(), rate, seconds, sources, cookies]
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def begin(self) -> None:
        """Let it send."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def end(self) -> tuple[int, float]:
        """Wait for its end; return how many messages it sent in how many seconds."""
        said, _ = self._process.communicate(timeout=120)
        sent, took = said.split()
        return int(sent), float(took)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.communicate()


if __name__ == "__main__":
    host, port, key, rate, seconds, sources, cookies = sys.argv[1:]
    print(
        *flood(
            (host, int(port)), bytes.fromhex(key), float(rate), float(seconds), int(sources), float(cookies)
        )
    )
