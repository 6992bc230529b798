"""A member of the mesh whose programs are the test's: true identity and keys, true sessions, any lie inside.

It runs the mesh core on a socket in its own namespace, without TUN and data path, so that a real daemon takes
it for a peer like others. What it says under its keys is up to the test.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path

from crossedge.host.clock import boottime, realtime_offset
from crossedge.host.namespaces import Namespace
from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.config import MeshdConfig
from crossedge.meshd.identity import load_identity
from crossedge.meshd.keypair import HEADER as TRANSPORT
from crossedge.meshd.keypair import NONCE, Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.mesh import Mesh
from crossedge.meshd.peer import MeshPeer
from crossedge.meshd.sequence import Sequence
from crossedge.meshd.settings import MeshSettings
from crossedge.meshd.superframe import FRAME, HEADER, HEADER_SIZE, MAGIC, nonce
from crossedge.meshd.virtio import GSO_TYPES
from crossedge.meshd.wallclock import Wallclock
from crossedge.wire.demux import Kind, classify
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, UdpEndpoint
from crossedge.wire.relay import HEADER as RELAY_HEADER
from crossedge.wire.relay import pack_header, unpack_header

PORT = 41820
AT_MOST = 0.05
"""Seconds of the longest rest: what is waited for may come to a socket that is not told of."""


class EvilMember:
    """One such member."""

    def __init__(self, root: Path, namespace: Namespace, address: str) -> None:
        """Take the files of an enrolled node below `root`; `address` is that of its host."""
        identity = load_identity(MeshdConfig(), root)
        self.certificate = identity.bundle.certificate
        with namespace:
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind((address, PORT))
        self.socket.setblocking(False)
        now = boottime()
        clock = Wallclock(float(self.certificate.not_before), now)
        clock.set(realtime_offset(), True)
        settings = MeshSettings(
            certificate=self.certificate,
            ca_public=identity.bundle.ca,
            blocklist=identity.bundle.blocklist,
            session_key=identity.session,
            signing_key=identity.signing,
            port=PORT,
            families=frozenset({4}),
            mesh_prefixes=identity.bundle.supernets,
            gso=GSO_TYPES,
        )
        allowed: AllowedIPs[Link] = AllowedIPs()
        self.mesh = Mesh(
            settings, allowed, clock, Sequence(0, clock.issuing, lambda _: None), os.urandom, now
        )
        self.mesh.set_host_addresses([address], now)
        for server in identity.bundle.rendezvous:
            self.mesh.set_rendezvous(server.public_key, UdpEndpoint(server.host, server.port), now)

    def close(self) -> None:
        self.socket.close()

    # --- A well-behaved core ----------------------------------------------------------------------------

    def run(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Let the core live until a condition holds."""
        end = time.monotonic() + timeout
        self.turn()
        while not condition():
            assert time.monotonic() < end, f"not within {timeout:.0f} s; dropped {self.mesh.dropped}"
            self.rest()
            self.turn()

    def rest(self, *others: socket.socket) -> None:
        """Wait until something has come, to one of other sockets too, or something is due, or for a while."""
        due = max(self.mesh.next_deadline() - boottime(), 0.0)
        select.select([self.socket, *others], [], [], min(due, AT_MOST))

    def turn(self) -> None:
        """Receive what is there, do what is due, send what there is to send."""
        while True:
            try:
                datagram, address = self.socket.recvfrom(65_536)
            except OSError:
                break
            self._receive(datagram, UdpEndpoint(*address))
        now = boottime()
        if self.mesh.next_deadline() <= now:
            self.mesh.handle_timeout(now)
        while (item := self.mesh.poll_transmit()) is not None:
            self._send(item.datagram, item.destination)
        while self.mesh.poll_event() is not None:
            pass  # no routes and no programs here: nobody acts on them

    def _receive(self, datagram: bytes, source: Endpoint) -> None:
        now = boottime()
        kind = classify(datagram)
        if kind is Kind.RELAY and isinstance(source, UdpEndpoint):
            self._receive(datagram[RELAY_HEADER:], RelayEndpoint(source, unpack_header(datagram)))
        elif kind is Kind.TRANSPORT:
            opened = self.mesh.greeter.handshakes.open_transport(datagram, now)
            if opened is not None and opened[2] and not opened[2][0] >> 4:
                owner = opened[0].owner
                assert isinstance(owner, MeshPeer)
                self.mesh.receive_inner(owner.link, opened[2], source, now)
        elif kind is not Kind.CHUNK:
            self.mesh.receive(datagram, source, now)

    def _send(self, datagram: bytes, destination: Endpoint) -> None:
        if isinstance(destination, RelayEndpoint):
            datagram, destination = pack_header(destination.channel) + datagram, destination.server
        self.socket.sendto(datagram, destination)

    def peer(self, name: str) -> MeshPeer | None:
        """Return another member, once it is known."""
        return next((peer for peer in self.mesh.members.values() if peer.name == name), None)

    def open(self, name: str) -> None:
        """Open the session with a member, hellos and direct path included."""
        self.run(lambda: self.peer(name) is not None)
        peer = self.peer(name)
        assert peer is not None
        self.mesh.want_session(peer.link, boottime())
        self.run(lambda: peer.link.superframes and peer.way.direct is not None)

    # --- Lies -------------------------------------------------------------------------------------------

    def keypair(self, name: str) -> Keypair:
        peer = self.peer(name)
        assert peer is not None
        assert peer.session is not None
        assert peer.session.current is not None
        return peer.session.current

    def record(self, name: str, plaintext: bytes, position: int = 0) -> bytes:
        """Seal a superframe record of one datagram."""
        keypair = self.keypair(name)
        counter = keypair.reserve_chunks(1)
        assert keypair.chunks_send is not None
        head = HEADER.pack(MAGIC, position, 1, keypair.remote_index, counter)
        return head + keypair.chunks_send.encrypt(nonce(counter, 1, position), plaintext, None)

    def spread(self, name: str, plaintext: bytes, count: int) -> list[bytes]:
        """Seal a superframe record of several datagrams; its length must divide well."""
        keypair = self.keypair(name)
        counter = keypair.reserve_chunks(count)
        assert keypair.chunks_send is not None
        plaintext += bytes(-(len(plaintext) + 16) % count)
        sealed = keypair.chunks_send.encrypt(nonce(counter, count), plaintext, None)
        size = len(sealed) // count
        return [
            HEADER.pack(MAGIC, index, count, keypair.remote_index, counter) + sealed[index * size :][:size]
            for index in range(count)
        ]

    def transport(self, name: str, plaintext: bytes) -> bytes:
        """Seal WireGuard transport data, without padding."""
        keypair = self.keypair(name)
        counter = keypair.reserve()
        return TRANSPORT.pack(4, keypair.remote_index, counter) + keypair.send.encrypt(
            NONCE.pack(counter), plaintext, None
        )

    def send(self, name: str, *datagrams: bytes) -> None:
        """Send datagrams the direct way."""
        peer = self.peer(name)
        assert peer is not None
        self.mesh.want_session(peer.link, boottime())  # without traffic the path would not be kept up
        self.run(lambda: peer.way.direct is not None)
        assert peer.way.direct is not None
        for datagram in datagrams:
            self._send(datagram, peer.way.direct.endpoint)


def frame(
    packet: bytes, gso_type: int = 0, gso_size: int = 0, flags: int = 0, length: int | None = None
) -> bytes:
    """Return a superframe's frame, its header as the liar wants it."""
    return FRAME.pack(flags, gso_type, gso_size, len(packet) if length is None else length) + packet


assert HEADER_SIZE == 16
