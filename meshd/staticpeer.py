"""A stock WireGuard peer, configured by hand: its session, one endpoint that roams, nothing of the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from crossedge.meshd.constants import TRANSPORT_OVERHEAD
from crossedge.meshd.device import Device
from crossedge.meshd.events import LinkReady, MeshEvent, PathChanged, RoutesChanged, SessionChanged
from crossedge.meshd.link import SAFE_DATAGRAM, Link
from crossedge.meshd.pathmtu import IPV4_UDP, IPV6_UDP
from crossedge.meshd.peerport import Gate
from crossedge.meshd.session import HandshakeFailed, KeypairRotated, Session, SessionExpired, SessionUp
from crossedge.wire.endpoint import Endpoint, Network, UdpEndpoint

TOUCH: Final = 1.0  # seconds between looks at the timers of a session that has traffic


@dataclass(frozen=True, slots=True)
class StaticPeerSettings:
    """What the configuration says of a stock peer, its names and keys resolved."""

    name: str
    public_key: bytes
    """X25519, 32 bytes."""
    allowed_ips: tuple[Network, ...]
    endpoint: UdpEndpoint | None = None
    preshared_key: bytes | None = None
    keepalive: float = 0.0
    """Persistent keepalive in seconds, 0 for none."""


class StaticPort(Protocol):
    """What a static peer needs of the mesh."""

    def send(self, endpoint: Endpoint, datagram: bytes, ttl: int | None = None) -> None:
        """Transmit a datagram."""

    def touch(self, peer: StaticPeer) -> None:
        """Pump this peer soon."""

    def emit(self, event: MeshEvent) -> None:
        """Hand an event to the shell."""


class StaticPeer:
    """One stock peer."""

    def __init__(
        self, settings: StaticPeerSettings, port: StaticPort, device: Device, underlay_mtu: int, now: float
    ) -> None:
        """`underlay_mtu` is the MTU in bytes towards the internet. NoiseError: a weak key."""
        self.settings = settings
        self.session: Session | None = Session(
            device,
            settings.public_key,
            now=now,
            psk=settings.preshared_key or bytes(32),
            persistent_keepalive=settings.keepalive,
            owner=self,
        )
        self.link = Link(settings.name, Gate(self), stock=True)
        self.endpoint: UdpEndpoint | None = None
        self.last_heard: float | None = None
        self.datagram_size = SAFE_DATAGRAM
        self._port = port
        self._underlay_mtu = underlay_mtu
        self._touched = float("-inf")
        if settings.endpoint is not None:
            self._move(settings.endpoint)

    @property
    def name(self) -> str:
        """The name in the configuration."""
        return self.settings.name

    @property
    def mtu(self) -> int:
        """The largest inner packet in bytes that passes."""
        return self.datagram_size - TRANSPORT_OVERHEAD

    def set_underlay_mtu(self, mtu: int) -> bool:
        """Take another MTU towards the internet; True if the peer's route needs another one."""
        self._underlay_mtu = mtu
        before = self.mtu
        if self.endpoint is not None:
            self._set_path(self.endpoint)
        return self.mtu != before

    def want(self, now: float) -> None:
        """Open the session: a packet waits for it."""
        if self.session is not None and self.endpoint is not None:
            self.session.initiate(now)
        self._port.touch(self)

    def heard(self, source: Endpoint, now: float) -> None:
        """Follow the peer to where its last authenticated datagram came from (paper, 2.1)."""
        self.last_heard = now
        if isinstance(source, UdpEndpoint) and source != self.endpoint:
            self._move(source)
            self._port.touch(self)

    def on_data_sent(self, now: float, size: int) -> None:  # noqa: ARG002 - the session counts sizes
        """Note that the data path sent a batch."""
        self._on_traffic(now)

    def on_data_received(self, now: float, size: int) -> None:  # noqa: ARG002 - the session counts sizes
        """Note that the data path opened a batch."""
        self.last_heard = now
        self._on_traffic(now)

    def on_rotated(self) -> None:
        """Note that another keypair is in use."""
        self._port.touch(self)

    def _on_traffic(self, now: float) -> None:
        if now - self._touched >= TOUCH:
            self._touched = now
            self._port.touch(self)

    def handle_timeout(self, now: float) -> None:
        """Do what is due, then pump."""
        if self.session is not None:
            self.session.handle_timeout(now)
        self.pump(now)

    def deadline(self, now: float) -> float | None:  # noqa: ARG002 - as a mesh peer's
        """Return when `handle_timeout` has something to do."""
        return None if self.session is None else self.session.next_deadline()

    def pump(self, now: float) -> None:
        """Send what the session has to send."""
        session = self.session
        if session is None:
            return
        while (datagram := session.poll_transmit()) is not None:
            if self.endpoint is not None:
                self._port.send(self.endpoint, datagram)
        while (event := session.poll_event()) is not None:
            match event:
                case SessionUp():
                    self._port.emit(SessionChanged(self.name, "up"))
                case KeypairRotated():
                    pass
                case SessionExpired():
                    self._port.emit(SessionChanged(self.name, "expired"))
                case HandshakeFailed():
                    self._port.emit(SessionChanged(self.name, "failed"))
        if self.link.queue and self.link.endpoints and session.usable(now):
            self._port.emit(LinkReady(self.link))

    def close(self) -> None:
        """Let go of the keys."""
        if self.session is not None:
            self.session.close()
            self.session = None

    def _move(self, endpoint: UdpEndpoint) -> None:
        old, mtu = self.link.endpoints, self.mtu
        self.endpoint = endpoint
        self._set_path(endpoint)
        if self.mtu != mtu:
            self._port.emit(RoutesChanged())
        self._port.emit(PathChanged(self.name, old, self.link.endpoints, "roamed" if old else "configured"))

    def _set_path(self, endpoint: UdpEndpoint) -> None:
        overhead = IPV6_UDP if ":" in endpoint.host else IPV4_UDP
        self.datagram_size = max(self._underlay_mtu - overhead, SAFE_DATAGRAM)
        self.link.set_path((endpoint,), self.datagram_size)
