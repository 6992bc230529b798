"""The control side of a mesh: rendezvous clients, directory, candidates, our own record, pings and calls.

It knows members by node id and nothing of sessions or paths. What a rendezvous says is a carrier's word:
records and certificates are verified by the directory, calls and pings by the member's own control key, and
the endpoint at which a rendezvous claims to have seen a caller is not used at all.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from crossedge.meshd import client_events as ce
from crossedge.meshd import directory as dir_
from crossedge.meshd.callbody import call_body
from crossedge.meshd.callers import Finds, WaitingCalls
from crossedge.meshd.candidates import Candidates
from crossedge.meshd.challenges import Challenges
from crossedge.meshd.client import RendezvousClient
from crossedge.meshd.controlhost import ControlHost
from crossedge.meshd.events import BlocklistToPersist, Notice
from crossedge.meshd.natdiscovery import NatDiscovery
from crossedge.meshd.nodecontrol import PING_LONG, PING_SHORT, NodeControl
from crossedge.meshd.ownrecord import OwnRecord
from crossedge.meshd.punch import Shot
from crossedge.meshd.sequence import Sequence as Numbers
from crossedge.meshd.settings import MeshSettings
from crossedge.meshd.transmit import Late, Make, Transmit
from crossedge.meshd.wallclock import Wallclock
from crossedge.wire import messages as m
from crossedge.wire.endpoint import (
    DirectEndpoint,
    Endpoint,
    RelayEndpoint,
    UdpEndpoint,
    remote_of,
)
from crossedge.wire.envelope import ControlKey, is_cookie_reply

TRANSMITS_MAX: Final = 4096
PROBE_SPACING: Final = 0.25  # seconds between questions where we are seen


class ControlPlane:
    """Everything of the mesh that is not a session or a path."""

    def __init__(
        self,
        settings: MeshSettings,
        host: ControlHost,
        clock: Wallclock,
        numbers: Numbers,
        random: Callable[[int], bytes],
        now: float,
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.dropped: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.directory = dir_.Directory(
            settings.ca_public, settings.certificate, settings.blocklist, clock, now
        )
        self.candidates = Candidates(settings.port, settings.mesh_prefixes)
        self.candidates.set_static(settings.advertise)
        self.node = NodeControl(ControlKey.generate(random), random, now)
        self.own = OwnRecord(settings.certificate, settings.signing_key, self.node.key.public, numbers, clock)
        self.clients: dict[bytes, RendezvousClient] = {}
        self.nat = NatDiscovery(settings.stun, self.candidates, host, self._say, self.dropped, random, now)
        self._host = host
        self._numbers = numbers
        self._random = random
        self._now = now
        self._challenges = Challenges(random)
        self._waiting = WaitingCalls(self.dropped)
        self._finds = Finds(self.dropped)
        self._epochs: dict[bytes, int] = {}
        self._probed = float("-inf")
        self.transmits: deque[Transmit | Late] = deque()
        self._say(now)

    # --- Rendezvous -------------------------------------------------------------------------------------

    def set_rendezvous(self, public_key: bytes, endpoint: UdpEndpoint, now: float) -> None:
        """Use a rendezvous at this endpoint, or learn that it is there now."""
        self._now = now
        for client in self.clients.values():
            if client.public_key == public_key:
                client.set_endpoint(endpoint, now)
                return
        client = RendezvousClient(
            public_key,
            endpoint,
            self.node.key,
            self._numbers,
            self.own.make,
            self.directory.known,
            self._random,
            now,
        )
        self.clients[client.server] = client
        self.directory.set_servers(self.clients)
        self._say(now)

    def relay_server(self, server: UdpEndpoint) -> bool:
        """Tell whether this is a rendezvous of ours, whose channels may lead to members."""
        return any(client.endpoint == server for client in self.clients.values())

    def call(
        self,
        member: dir_.Peer,
        attempt: int,
        rtt: float,
        initiation: bytes,
        now: float,
        fresh: Sequence[UdpEndpoint] | None = None,
        *,
        measure: bool = False,
    ) -> bool:
        """Call a member through every rendezvous that both know; False where none has us registered.

        `rtt` is that through the relay in seconds, 0 if not known; `fresh` stands for our candidates.
        `measure`: we only measure the pair.
        """
        called = False
        servers = set(member.record.servers) & set(self.clients) or set(self.clients)
        endpoints = [candidate.endpoint for candidate in self.candidates.current] if fresh is None else fresh
        for server in servers:
            client = self.clients[server]
            if client.state is not ce.ClientState.REGISTERED:
                continue
            body = call_body(
                lambda: self._numbers.next(now),
                attempt,
                endpoints,
                self.candidates.observed_by(),
                rtt,
                initiation,
                measure=measure,
            )
            sealed = self.node.seal(body, member.record.control_key)
            if sealed is not None and client.call(member.node_id, sealed, now) is not None:
                self.sent["call"] += 1
                called = True
        return called

    def bind(self, relay: RelayEndpoint, now: float) -> None:
        """Bind our side of a channel anew."""
        for client in self.clients.values():
            if client.endpoint == relay.server:
                client.bind(relay.channel, now)

    def probe_mappings(self, now: float) -> None:
        """Ask every rendezvous where it sees us now; many peers may want to know at the same time."""
        if now - self._probed < PROBE_SPACING:
            return
        self._probed = now
        for client in self.clients.values():
            client.network_changed(now)

    def find(self, address: bytes, now: float) -> None:
        """Ask whose prefix has this packed address; at most once per second for each."""
        if self._finds.may_ask(address, now):
            for client in self.clients.values():
                client.find_address(address, now)

    def _find_node(self, node_id: bytes, now: float) -> None:
        if self._finds.may_ask(node_id, now):
            for client in self.clients.values():
                client.find_node(node_id, now)

    # --- Ourselves --------------------------------------------------------------------------------------

    def set_host_addresses(self, addresses: Iterable[str], now: float) -> bool:
        """Take the host's addresses; True if they make other candidates."""
        changed = self.candidates.set_host_addresses(addresses)
        self.nat.observers.refresh(now)
        self.probe_mappings(now)
        if changed:
            self._say(now)
        return changed

    def _say(self, now: float) -> None:
        """Sign a new record if what it says has changed, and tell everyone."""
        news = self.own.update(
            control_key=self.node.key.public,
            candidates=self.candidates.current,
            verdict=self.nat.verdict,
            servers=self.clients,
            blocklist=self.directory.blocklist.serial,
        )
        if news or self.own.is_off(now):
            for client in self.clients.values():
                client.record_changed(now)
            self._host.restated(now)

    def own_record(self, now: float) -> bytes:
        """Return our newest signed record."""
        return self.own.make(self._numbers.next(now), now)[0]

    def rotate_key(self, now: float) -> None:
        """Make a new control key; the old one is understood for a while."""
        self.node.rotate(ControlKey.generate(self._random), now)
        self._say(now)
        for client in self.clients.values():
            client.set_control_key(self.node.key, now)

    def begin_netcheck(self, ports: Sequence[int], now: float) -> None:
        """Start a network check with sockets on these local ports, the daemon's own first."""
        self.nat.begin_netcheck([client.endpoint for client in self.clients.values()], ports, now)

    def scout(self, local: int, now: float) -> bool:
        """Ask a server where it sees this further socket; False where there is none to ask."""
        registered = [c.endpoint for c in self.clients.values() if c.state is ce.ClientState.REGISTERED]
        return self.nat.scout(registered, local, now)

    # --- Pings ------------------------------------------------------------------------------------------

    def ping(self, member: dir_.Peer, shot: Shot, now: float) -> None:
        """Challenge an endpoint; the caller has paid for it."""
        number = self._challenges.new(member.node_id, shot.endpoint, now)
        message = m.Ping(id=number, seq=self._numbers.next(now), attempt=shot.attempt)
        floor = PING_SHORT if shot.short else PING_LONG
        sealed = self.node.seal(message, member.record.control_key, floor)
        if sealed is None:
            return
        self.sent["ping"] += 1
        self.transmit(shot.endpoint, sealed, shot.ttl)

    def volley(
        self,
        member: dir_.Peer,
        targets: Sequence[DirectEndpoint],
        attempt: int,
        ttl: int | None,
        now: float,
    ) -> None:
        """Send one ping to many endpoints; the caller has paid for them. Its answer agrees to nothing."""
        if not targets:
            return
        number = self._challenges.new(member.node_id, None, now)
        message = m.Ping(id=number, seq=self._numbers.next(now), attempt=attempt)
        sealed = self.node.seal(message, member.record.control_key, PING_LONG)
        if sealed is None:
            return
        self.sent["volley"] += len(targets)
        for target in targets:
            self.transmit(target, sealed, ttl)

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> None:
        """Take an untrusted control datagram (CE 01)."""
        self._now = now
        if isinstance(source, UdpEndpoint):
            for client in self.clients.values():
                if client.receive(datagram, source, now):
                    self._client_events(client, now)
                    return
        if is_cookie_reply(datagram):
            self.dropped["unasked-cookie"] += 1
            return
        parsed = self.node.parse(datagram, now)
        if parsed is None:
            return
        sealed, own = parsed
        member = self.directory.by_control_key(sealed.sender)
        if member is None:
            self.dropped["unknown-sender"] += 1
            return
        message = self.node.open(sealed, own)
        if message is None:
            return
        if not isinstance(message, m.Ping | m.Pong):
            self.dropped["unexpected-message"] += 1
        elif not self.node.fresh(sealed, own, message.seq):
            pass
        elif isinstance(message, m.Ping):
            self._on_ping(member, message, source, len(datagram), now)
        else:
            self._on_pong(member, message, now)

    def _on_ping(self, member: dir_.Peer, ping: m.Ping, source: Endpoint, size: int, now: float) -> None:
        observed = source.server if isinstance(source, RelayEndpoint) else remote_of(source)
        pong = m.Pong(id=ping.id, seq=self._numbers.next(now), observed=observed)
        sealed = self.node.seal(pong, member.record.control_key)
        if sealed is None:
            return
        if len(sealed) > size:
            self.dropped["short-ping"] += 1
            return
        self.transmit(source, sealed)
        self._host.pinged(member, source, size - len(sealed), now)

    def _on_pong(self, member: dir_.Peer, pong: m.Pong, now: float) -> None:
        asked, endpoint = self._challenges.met(pong.id, member.node_id, now)
        if not asked:
            self.dropped["unasked-pong"] += 1
        elif endpoint is not None:
            self._host.ponged(member, endpoint, now)

    # --- Calls ------------------------------------------------------------------------------------------

    def _on_called(self, event: ce.Called, now: float, *, waited: bool = False) -> None:
        if event.record and not waited:
            self.directory.offer(event.record, b"", event.server, now)
            self._directory_events(now)
        parsed = self.node.parse(event.sealed, now)
        if parsed is None:
            return
        sealed, own = parsed
        member = self.directory.get(event.caller)
        if member is None or member.record.control_key != sealed.sender:
            if not waited:
                self._waiting.add(event, now)
                self._find_node(event.caller, now)
            else:
                self.dropped["unknown-caller"] += 1
            return
        body = self.node.open(sealed, own)
        if not isinstance(body, m.CallBody):
            if body is not None:
                self.dropped["unexpected-message"] += 1
            return
        if not self.node.fresh(sealed, own, body.seq):
            return
        client = self.clients.get(event.server)
        if client is None:
            return
        relay = RelayEndpoint(client.endpoint, event.channel) if event.channel else None
        self._host.called(member, body, relay, event, now)

    def _retry_calls(self, node_id: bytes, now: float) -> None:
        for event in self._waiting.take(node_id, now):
            self._on_called(event, now, waited=True)

    # --- Events from below ------------------------------------------------------------------------------

    def _client_events(self, client: RendezvousClient, now: float) -> None:
        while (event := client.poll_event()) is not None:
            match event:
                case ce.Called():
                    self._on_called(event, now)
                case ce.CallAnswered():
                    if event.status == "ok" and event.channel:
                        relay = RelayEndpoint(client.endpoint, event.channel)
                        self._host.call_answered(event.target, relay, now)
                    else:
                        self.dropped[f"call-{event.status}"] += 1
                case ce.RecordsArrived():
                    for record, certificate in event.items:
                        self.directory.offer(record, certificate, event.server, now)
                    self.directory.gone(event.gone, event.server, now)
                case ce.Found():
                    if event.record:
                        self.directory.offer(event.record, event.certificate, event.server, now)
                case ce.Registered():
                    self.clock.hint(event.server, event.unix_time, now)
                    self._say(now)
                    anew = self._epochs.get(event.server) != event.epoch
                    self._epochs[event.server] = event.epoch
                    self._host.reachable(event.server, now, anew=anew)
                case ce.Observed():
                    if self.candidates.observe(event.server, event.host, event.endpoint):
                        self._say(now)
                case ce.BlocklistArrived():
                    self.directory.offer_blocklist(event.encoded, now)
                case ce.Bound():
                    self._host.relay_bound(RelayEndpoint(client.endpoint, event.channel), now)
                case ce.RequestFailed():
                    self._on_request_failed(client, event, now)
                case ce.StateChanged():
                    level = "warning" if event.new is ce.ClientState.REFUSED else "info"
                    where = f"rendezvous {client.endpoint}"
                    self._host.emit(
                        Notice(level, f"{where}: {event.old.value} -> {event.new.value}: {event.why}")
                    )
            self._directory_events(now)

    def _on_request_failed(self, client: RendezvousClient, event: ce.RequestFailed, now: float) -> None:
        self.dropped[f"{event.kind.lower()}-{event.code}"] += 1
        if event.kind == "Bind" and event.code != "timeout":
            channel = int.from_bytes(event.subject, "big")
            self._host.relay_gone(RelayEndpoint(client.endpoint, channel), now)

    def _directory_events(self, now: float) -> None:
        while (event := self.directory.poll_event()) is not None:
            match event:
                case dir_.PeerAdded(member):
                    self._host.member_added(member, now)
                    self._retry_calls(member.node_id, now)
                case dir_.PeerChanged(member, previous):
                    if previous.record.control_key != member.record.control_key:
                        self.node.forget(previous.record.control_key)
                    self._host.member_changed(member, previous, now)
                    self._retry_calls(member.node_id, now)
                case dir_.PeerRemoved(member, reason):
                    self.node.forget(member.record.control_key)
                    self._host.member_removed(member, reason)
                case dir_.CertificateWanted(node_id):
                    self._find_node(node_id, now)
                case dir_.BlocklistWanted(node_id=node_id):
                    self._host.blocklist_wanted(node_id, now)
                    for client in self.clients.values():
                        client.fetch_blocklist(self.directory.blocklist.serial, now)
                case dir_.BlocklistChanged(blocklist):
                    self._host.emit(BlocklistToPersist(blocklist))
                    self._say(now)
                case dir_.OwnCertificateRevoked(serial):
                    self._host.emit(Notice("error", f"blocklist {serial} revokes our own certificate"))

    def offer(self, record: bytes, certificate: bytes, source: bytes, now: float) -> None:
        """Take a record that a member handed us itself."""
        self.directory.offer(record, certificate, source, now)
        self._directory_events(now)

    def offer_blocklist(self, encoded: bytes, now: float) -> None:
        """Take a blocklist that a member gave us."""
        self.directory.offer_blocklist(encoded, now)
        self._directory_events(now)

    def restore(self, items: Iterable[tuple[bytes, bytes]], now: float) -> int:
        """Take the records of an earlier life; returns how many held."""
        taken = self.directory.restore(items, now)
        self._directory_events(now)
        return taken

    # --- In and out -------------------------------------------------------------------------------------

    def transmit(
        self, destination: Endpoint, datagram: bytes, ttl: int | None = None, local: int = 0
    ) -> None:
        """Queue a datagram."""
        if len(self.transmits) >= TRANSMITS_MAX:
            self.dropped["transmit-queue"] += 1
            return
        self.transmits.append(Transmit(destination, datagram, ttl, local))

    def transmit_late(self, destination: Endpoint, make: Make) -> None:
        """Queue a datagram that is made when it leaves."""
        if len(self.transmits) >= TRANSMITS_MAX:
            self.dropped["transmit-queue"] += 1
            return
        self.transmits.append(Late(destination, make))

    def poll_transmit(self, clock: Callable[[], float]) -> Transmit | None:
        """Return the next datagram to send; it leaves at what `clock` says."""
        while self.transmits:
            first = self.transmits.popleft()
            if isinstance(first, Transmit):
                return first
            datagram = first.make(clock)
            if datagram is not None:
                return Transmit(first.destination, datagram)
            self.dropped["late-transmit"] += 1
        for client in self.clients.values():
            if (item := client.poll_transmit()) is not None:
                return item
        return self.nat.poll_transmit()

    def all_dropped(self) -> Counter[str]:
        """Return what was dropped here, by the directory and by the clients, and why."""
        parts = [self.node.dropped, self.directory.dropped]
        return sum((*parts, *(client.dropped for client in self.clients.values())), self.dropped)

    def next_deadline(self) -> float:
        """Return when `handle_timeout` has something to do."""
        times = [*(client.next_deadline() for client in self.clients.values()), self.nat.next_deadline()]
        known = [when for when in times if when is not None]
        return min([self.directory.next_deadline(), self.node.next_rotation(), *known])

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        self._now = now
        for client in self.clients.values():
            client.handle_timeout(now)
            self._client_events(client, now)
        self.directory.handle_timeout(now)
        self._directory_events(now)
        self.nat.handle_timeout(now)
        if now >= self.node.next_rotation():
            self.rotate_key(now)
