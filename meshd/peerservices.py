"""What peers get from the mesh: sending within the budget, calls, sessions, statements, the blocklist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from crossedge.meshd.blocklistpeer import PeerFetch, part_of
from crossedge.meshd.budget import Budget
from crossedge.meshd.device import Device
from crossedge.meshd.events import MeshEvent
from crossedge.meshd.hello import HelloExchange, gso_bits
from crossedge.meshd.inner import BlocklistAsk, BlocklistPart, Place, Statement
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.latencyplane import LatencyPlane
from crossedge.meshd.mesh_control import ControlPlane
from crossedge.meshd.nodecontrol import PING_LONG, PING_SHORT
from crossedge.meshd.noise import NoiseError
from crossedge.meshd.path import KEEPALIVE_INTERVAL
from crossedge.meshd.peer import MeshPeer
from crossedge.meshd.punch import Shot
from crossedge.meshd.session import Session
from crossedge.meshd.settings import MeshSettings
from crossedge.meshd.staticpeer import StaticPeer
from crossedge.meshd.transmit import Make
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, UdpEndpoint, refused_candidate
from crossedge.wire.limits import ENVELOPE_OVERHEAD

LIFETIME_SHARE: Final = 0.8  # of a measured mapping lifetime after which the mapping is used again
LIFETIME_LEAST: Final = 5.0  # seconds: no NAT is kept open by more


class PeerServices:
    """The `Port` of every peer of one mesh."""

    def __init__(
        self,
        settings: MeshSettings,
        device: Device,
        plane: ControlPlane,
        control: Callable[[], ControlPlane],
        dropped: Counter[str],
        touch: Callable[[MeshPeer | StaticPeer], None],
        emit: Callable[[MeshEvent], None],
        latency: LatencyPlane,
        now: float,
    ) -> None:
        """`control` returns `plane` for a change of it; `touch` has a peer pumped soon."""
        self.seal_time = 0.0
        self._latency = latency
        self.dropped = dropped
        self.budget = Budget(now)
        self.own_hosts: frozenset[str] = frozenset()
        """The host's own addresses."""
        self._settings = settings
        self._device = device
        self._plane = plane
        self._control = control
        self._touch = touch
        self._emit = emit
        self._fetch: PeerFetch | None = None
        self._fetch_peer: MeshPeer | None = None

    # --- Sending ----------------------------------------------------------------------------------------

    def send(self, endpoint: Endpoint, datagram: bytes, ttl: int | None = None) -> None:
        """Queue a datagram."""
        self._plane.transmit(endpoint, datagram, ttl)

    def send_late(self, endpoint: Endpoint, make: Make) -> None:
        """Queue a datagram that is made when it leaves."""
        self._plane.transmit_late(endpoint, make)

    def spend(self, peer: MeshPeer, endpoint: UdpEndpoint, now: float) -> bool:
        """Pay for a packet to an endpoint that has not agreed; False (counted) where it may not go."""
        reason = self.budget.take(endpoint, now, single_observer=peer.offers.single_observer(endpoint))
        if reason is not None:
            self.dropped[reason] += 1
        return reason is None

    def send_ping(self, peer: MeshPeer, shot: Shot, now: float) -> None:
        """Send a sealed ping, if it can be paid for."""
        path = peer.paths.get(shot.endpoint)
        size = ENVELOPE_OVERHEAD + (PING_SHORT if shot.short else PING_LONG)
        if path is not None and not path.pays(size):
            self.dropped["unproven-source"] += 1
        elif (path is not None and path.consented) or self.spend(peer, shot.endpoint, now):
            self._plane.ping(peer.member, shot, now)

    def usable(self, endpoint: Endpoint) -> bool:
        """Tell whether anything may be sent to an endpoint from here at all, on a peer's word."""
        if isinstance(endpoint, RelayEndpoint):
            return self._plane.relay_server(endpoint.server)
        if (6 if ":" in endpoint.host else 4) not in self._settings.families:
            return False
        if endpoint.host in self.own_hosts and endpoint.port == self._settings.port:
            return False
        return refused_candidate(endpoint.host, self._settings.mesh_prefixes) is None

    def keepalive(self) -> float:
        """Return how often an idle path has to be used, in seconds, for our NAT to keep its mapping."""
        lifetime = self._plane.verdict.lifetime
        return KEEPALIVE_INTERVAL if lifetime is None else max(LIFETIME_LEAST, lifetime * LIFETIME_SHARE)

    def touch(self, peer: MeshPeer | StaticPeer) -> None:
        """Pump this peer soon."""
        self._touch(peer)

    def emit(self, event: MeshEvent) -> None:
        """Hand an event to the shell."""
        self._emit(event)

    # --- Rendezvous -------------------------------------------------------------------------------------

    def call(self, peer: MeshPeer, attempt: int, now: float) -> bool:
        """Call a peer through every rendezvous that both know; False where there is none in reach."""
        waiting = None if peer.session is None else peer.session.initiation
        return self._control().call(
            peer.member, attempt, peer.paths.relay_rtt(), waiting or b"", now, measure=peer.measure_only
        )

    def rebind(self, peer: MeshPeer, now: float) -> None:
        """Bind our side of the peer's relay channels anew, and look whether our mapping moved."""
        control = self._control()
        control.probe_mappings(now)
        for path in peer.paths.relays():
            if isinstance(path.endpoint, RelayEndpoint):
                control.bind(path.endpoint, now)

    # --- Sessions ---------------------------------------------------------------------------------------

    def new_session(self, peer: MeshPeer, now: float) -> Session | None:
        """Make the peer's session; None (counted) where its key is unusable."""
        try:
            return Session(self._device, peer.member.certificate.x25519, now=now, mesh=True, owner=peer)
        except NoiseError:
            self.dropped["weak-key"] += 1
            return None

    def new_hello(self, keypair: Keypair, now: float) -> HelloExchange:
        """Begin the hello of a keypair."""
        settings = self._settings
        return HelloExchange(keypair, settings.aeads, gso_bits(settings.gso), settings.largest_chunk, now)

    def statement(self, now: float) -> bytes:
        """Return the plaintext that tells a peer our newest record."""
        return Statement(self._plane.own_record(now), self._settings.certificate.encode()).encode()

    # --- Latency ----------------------------------------------------------------------------------------

    def measurement_due(self, peer: MeshPeer, now: float) -> bool:
        """Tell whether the pair should be measured while its session is there."""
        return self._latency.due(peer, now)

    def measured(self, peer: MeshPeer, *, answered: bool) -> None:
        """Take note that a measurement of the pair has ended."""
        self._latency.measured(peer, answered=answered)

    def tell_place(self, peer: MeshPeer, now: float) -> None:
        """Tell the peer our coordinates, if it has not heard them lately."""
        self._latency.tell_place(peer, now)

    def place_heard(self, peer: MeshPeer, place: Place, now: float) -> None:
        """Take the coordinates that the peer told."""
        self._latency.place_heard(peer, place, now)

    # --- The blocklist ----------------------------------------------------------------------------------

    def blocklist_part(self, ask: BlocklistAsk) -> BlocklistPart | None:
        """Return a part of the blocklist that we hold."""
        return part_of(self._plane.directory.blocklist, ask)

    def fetch_blocklist(self, peer: MeshPeer, now: float) -> None:
        """Ask a peer for its newer blocklist, unless there is no session or one is on its way already."""
        if self._fetch is None and peer.up(now):
            held = self._plane.directory.blocklist.serial
            self._fetch, self._fetch_peer = PeerFetch(peer.node_id, held, now), peer
            self._ask(now)

    def blocklist_arrived(self, peer: MeshPeer, part: BlocklistPart, now: float) -> None:
        """Take a part of a blocklist that we asked the peer for."""
        fetch = self._fetch
        if fetch is None or fetch.node_id != peer.node_id:
            self.dropped["unasked-blocklist"] += 1
            return
        encoded = fetch.take(part, now)
        if encoded is not None:
            self._fetch = self._fetch_peer = None
            self._control().offer_blocklist(encoded, now)
        elif fetch.due <= now:
            self._ask(now)

    def _ask(self, now: float) -> None:
        fetch, peer = self._fetch, self._fetch_peer
        ask = None if fetch is None or peer is None or not peer.up(now) else fetch.ask(now)
        if ask is None or peer is None:
            self._fetch = self._fetch_peer = None
            return
        peer.talk.say(ask.encode(), now)
        self._touch(peer)

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do."""
        return None if self._fetch is None else self._fetch.due

    def handle_timeout(self, now: float) -> None:
        """Ask again for what did not come."""
        if self._fetch is not None and self._fetch.due <= now:
            self._ask(now)
