"""What a mesh core is started with: identity and configuration, already checked, names resolved."""

from __future__ import annotations

from dataclasses import dataclass

from crossedge.meshd.inner import Aeads
from crossedge.meshd.link import LARGEST_DATAGRAM
from crossedge.meshd.staticpeer import StaticPeerSettings
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.certificate import Certificate
from crossedge.wire.endpoint import Network, UdpEndpoint
from crossedge.wire.identity import SigningKey


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshSettings:
    """Everything that does not change while the daemon runs."""

    certificate: Certificate
    """Our own, verified."""
    ca_public: bytes
    """Ed25519 public key of the network's authority."""
    blocklist: Blocklist
    """The newest that is at hand, verified: the bundle's or a persisted one."""
    session_key: bytes
    """X25519 private key of the certificate, 32 bytes."""
    signing_key: SigningKey
    """Signing key of the certificate."""
    port: int
    """UDP port of the daemon's sockets."""
    families: frozenset[int] = frozenset({4, 6})
    """IP versions for which there is a socket."""
    mesh_prefixes: tuple[Network, ...] = ()
    """The network's supernets: never a candidate."""
    advertise: tuple[UdpEndpoint, ...] = ()
    """Endpoints that are forwarded to this node by hand."""
    stun: tuple[UdpEndpoint, ...] = ()
    """Further observers of our address."""
    static_peers: tuple[StaticPeerSettings, ...] = ()
    """Stock WireGuard peers."""
    aeads: Aeads = Aeads.AES_256_GCM | Aeads.CHACHA20_POLY1305
    """AEADs of superframes to offer; AES only where the CPU has it; none switches superframes off."""
    gso: frozenset[int] = frozenset()
    """virtio GSO types that can be written to the TUN."""
    largest_chunk: int = LARGEST_DATAGRAM
    """The longest superframe datagram that is taken, in bytes."""
    unreachable_after: float = 60.0
    """Seconds without reaching any peer after which the node counts as cut off."""
    measure: bool = False
    """Whether pairs without traffic are measured."""
    underlay_mtu: int = 1500
    """MTU in bytes of the way to the internet, for stock peers."""
