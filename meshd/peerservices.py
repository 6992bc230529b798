"""What peers get from the mesh: sending within the budget, calls, sessions, statements, the blocklist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache
from typing import Final

from crossedge.meshd.blocklistpeer import PeerFetch, part_of
from crossedge.meshd.budget import Budget
from crossedge.meshd.device import Device
from crossedge.meshd.events import MeshEvent, SocketsFreed
from crossedge.meshd.furthersockets import FurtherSockets
from crossedge.meshd.hello import HelloExchange, gso_bits
from crossedge.meshd.inner import BlocklistAsk, BlocklistPart, Place, Statement
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.latencyplane import LatencyPlane
from crossedge.meshd.mesh_control import ControlPlane
from crossedge.meshd.natplan import HARD, Nature, nature
from crossedge.meshd.nodecontrol import PING_LONG, PING_SHORT
from crossedge.meshd.noise import NoiseError
from crossedge.meshd.path import KEEPALIVE_INTERVAL
from crossedge.meshd.peer import MeshPeer
from crossedge.meshd.punch import Shot, Volley
from crossedge.meshd.session import Session
from crossedge.meshd.settings import MeshSettings
from crossedge.meshd.staticpeer import StaticPeer
from crossedge.meshd.transmit import Make
from crossedge.wire.endpoint import (
    DirectEndpoint,
    Endpoint,
    RelayEndpoint,
    UdpEndpoint,
    refused_candidate,
    remote_of,
)
from crossedge.wire.limits import ENVELOPE_OVERHEAD
from crossedge.wire.record import Behaviour, CandidateKind, NatVerdict, Record

LIFETIME_SHARE: Final = 0.8  # of a measured mapping lifetime after which the mapping is used again
SPRAY_SPACING: Final = 35.0  # seconds between two sprays: longer than most routers keep an unanswered mapping
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
        random: Callable[[int], bytes],
    ) -> None:
        """`control` returns `plane` for a change of it; `touch` has a peer pumped soon."""
        self.seal_time = 0.0
        self._latency = latency
        self.dropped = dropped
        self.budget = Budget(now)
        self.own_hosts: frozenset[str] = frozenset()
        """The host's own addresses."""
        self.sockets = FurtherSockets()
        self._random = random
        self._spray_next = now
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

    def spend(self, peer: MeshPeer, endpoint: DirectEndpoint, now: float) -> bool:
        """Pay for a packet to an endpoint that has not agreed; False (counted) where it may not go."""
        remote = remote_of(endpoint)
        single = peer.offers.single_observer(remote)
        if single and not peer.offers.signed(remote):
            remote = UdpEndpoint(remote.host, 0)  # what calls add of one address is one to this budget
        reason = self.budget.take(remote, now, single_observer=single)
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

    def send_volley(self, peer: MeshPeer, volley: Volley, now: float) -> None:
        """Send one sealed ping to many endpoints of one address, as far as they can be paid for."""
        targets = volley.targets
        if volley.spray and targets:
            host = remote_of(targets[0]).host
            allowed = self.budget.spray(host, len(targets), len(self._neighbours()), now)
            if allowed < len(targets):
                self.dropped["budget-spray"] += len(targets) - allowed
                targets = targets[:allowed]
        else:
            targets = tuple(target for target in targets if self.spend(peer, target, now))
        self._plane.volley(peer.member, targets, volley.attempt, volley.ttl, now)

    def usable(self, endpoint: Endpoint) -> bool:
        """Tell whether anything may be sent to an endpoint from here at all, on a peer's word."""
        if isinstance(endpoint, RelayEndpoint):
            return self._plane.relay_server(endpoint.server)
        host, port = remote_of(endpoint)
        six = ":" in host
        if (6 if six else 4) not in self._settings.families:
            return False
        if self.own_hosts and not any((":" in own) is six for own in self.own_hosts):
            return False  # a host that has no address of that IP version has no way there
        if host in self.own_hosts and port == self._settings.port:
            return False
        return _refused(host, self._settings.mesh_prefixes) is None

    def keepalive(self, peer: MeshPeer) -> float:
        """Return how often an idle path has to be used, in seconds, for both NATs to keep their mappings.

        A NAT whose lifetime was not measured is taken for one that forgets soon.
        """
        measured = (self._plane.nat.verdict.lifetime, peer.member.record.verdict.lifetime)
        intervals = [
            KEEPALIVE_INTERVAL if lifetime is None else max(LIFETIME_LEAST, lifetime * LIFETIME_SHARE)
            for lifetime in measured
        ]
        return min(intervals)

    def touch(self, peer: MeshPeer | StaticPeer) -> None:
        """Pump this peer soon."""
        self._touch(peer)

    def emit(self, event: MeshEvent) -> None:
        """Hand an event to the shell."""
        self._emit(event)

    # --- NATs -------------------------------------------------------------------------------------------

    def verdict(self) -> NatVerdict:
        """Return what the NAT before us is known to be; who shares our public address may know it better."""
        own = self._plane.nat.verdict
        if own.mapping is not Behaviour.UNKNOWN:
            return own
        return self._shared(self._public(), None) or own

    def verdict_of(self, peer: MeshPeer) -> NatVerdict:
        """Return what the NAT before a peer is known to be, by it or by who shares its public address."""
        record = peer.member.record
        if record.verdict.mapping is not Behaviour.UNKNOWN:
            return record.verdict
        return self._shared(_reflexive(record), peer.node_id) or record.verdict

    def _shared(self, hosts: frozenset[str], but: bytes | None) -> NatVerdict | None:
        if hosts:
            for member in self._plane.directory.peers():
                known = member.record.verdict.mapping is not Behaviour.UNKNOWN
                if known and member.node_id != but and hosts & _reflexive(member.record):
                    return member.record.verdict
        return None

    def _public(self) -> frozenset[str]:
        current = self._plane.candidates.current
        return frozenset(c.endpoint.host for c in current if c.kind is CandidateKind.REFLEXIVE)

    def _neighbours(self) -> list[bytes]:
        """Return the members that share our public address, and so our router."""
        hosts = self._public()
        members = self._plane.directory.peers() if hosts else ()
        return [member.node_id for member in members if hosts & _reflexive(member.record)]

    def picture(self) -> object:
        """Return what of ourselves makes another try to punch worth it where it changes.

        Behind a hard NAT only the addresses count: its ports change all the time.
        """
        verdict = self._plane.nat.verdict
        endpoints = {candidate.endpoint for candidate in self._plane.candidates.current}
        if nature(verdict) is Nature.EASY:
            return verdict.mapping, verdict.filtering, frozenset(endpoints)
        return verdict.mapping, verdict.filtering, frozenset(endpoint.host for endpoint in endpoints)

    def port_step(self) -> int:
        """Return the usual distance between the ports that our NAT gives in order, not 0."""
        report = self._plane.nat.report
        return report.step if report is not None and report.step else 1

    def take_sockets(self, peer: MeshPeer, count: int) -> tuple[int, ...]:
        """Return numbers for so many further sockets; none (counted) where there are not as many left."""
        taken = self.sockets.take(peer, count)
        if not taken:
            self.dropped["sockets-full"] += 1
        return taken

    def free_sockets(self, peer: MeshPeer, kept: Collection[int]) -> None:
        """Close every further socket that the peer has, but those."""
        freed = self.sockets.free(peer, kept)
        if freed:
            self._emit(SocketsFreed(freed))

    def own_sockets(self, count: int) -> tuple[int, ...]:
        """Return numbers for so many further sockets that belong to no peer; earlier ones are closed."""
        freed = self.sockets.free(None, ())
        if freed:
            self._emit(SocketsFreed(freed))
        return self.sockets.take(None, count)

    def scout(self, local: int, now: float) -> bool:
        """Ask a STUN server where it sees this socket; False where there is none to ask."""
        return self._control().scout(local, now)

    def begin_spray(self, now: float) -> float:
        """Begin a spray of ours and return `now`, or return when that may be.

        One after the other, and not before the mappings of the last one have ended: small routers have room
        for a few hundred in all.
        """
        if now < self._spray_next:
            return self._spray_next
        self._spray_next = now + SPRAY_SPACING
        return now

    def spray_target(self, peer: MeshPeer) -> str | None:
        """Return the peer's address of which many ports may be tried; None (counted) where that may not be.

        The peer signed the address and the verdict, two observers saw it there, and so does the rendezvous
        that brought its call: neither a member nor a rendezvous alone can aim a spray.
        """
        verdict = peer.member.record.verdict
        hosts = _reflexive(peer.member.record)
        if verdict.mapping not in HARD or peer.seen_at not in hosts:
            self.dropped["spray-not-signed"] += 1
        elif not peer.offers.vouched(peer.seen_at):
            self.dropped["spray-single-observer"] += 1
        else:
            return peer.seen_at
        return None

    def draw_ports(self, count: int, low: int, high: int) -> list[int]:
        """Return so many different random ports."""
        size = high - low + 1
        drawn: dict[int, None] = {}
        while len(drawn) < count:
            raw = self._random(4 * count)
            for at in range(0, len(raw), 4):
                drawn[low + int.from_bytes(raw[at : at + 4], "big") % size] = None
        return list(drawn)[:count]

    # --- Rendezvous -------------------------------------------------------------------------------------

    def call(
        self, peer: MeshPeer, attempt: int, now: float, fresh: Sequence[UdpEndpoint] | None = None
    ) -> bool:
        """Call a peer through every rendezvous that both know; False where there is none in reach."""
        waiting = None if peer.session is None else peer.session.initiation
        rtt = peer.paths.relay_rtt()
        body = waiting or b""
        return self._control().call(peer.member, attempt, rtt, body, now, fresh, measure=peer.measuring.only)

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


_refused = lru_cache(maxsize=1024)(refused_candidate)


def _reflexive(record: Record) -> frozenset[str]:
    """Return the addresses at which servers see a member behind a NAT."""
    kinds = record.candidates
    return frozenset(each.endpoint.host for each in kinds if each.kind is CandidateKind.REFLEXIVE)
