"""The heart of the daemon: members, stock peers, sessions, paths and the rendezvous, as one core.

    shell             Mesh                      ControlPlane: rendezvous clients, directory, calls, pings
    datagrams  --->   receive  ---------------> MeshPeer, one per member: session, paths, punch
    packets    --->   want_session, Gate  ----> StaticPeer, one per stock WireGuard peer
    events, datagrams, deadline  <---  poll_event, poll_transmit, next_deadline

The data path has the sessions' keys and the links; everything else comes through here. Whatever is called,
drain `poll_transmit` and `poll_event` afterwards and ask `next_deadline` again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from crossedge.meshd import inner, snapshots
from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.client_events import Called
from crossedge.meshd.device import Device
from crossedge.meshd.directory import Peer as Member
from crossedge.meshd.eventqueue import EventQueue
from crossedge.meshd.events import MeshEvent, ReachChanged, RoutesChanged, StateToPersist
from crossedge.meshd.greeter import Greeter
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.latencyplane import LatencyPlane
from crossedge.meshd.link import Link
from crossedge.meshd.mesh_control import ControlPlane
from crossedge.meshd.noise import PrivateKey
from crossedge.meshd.peer import MeshPeer
from crossedge.meshd.peerservices import PeerServices
from crossedge.meshd.reach import Reach
from crossedge.meshd.sequence import Sequence as Numbers
from crossedge.meshd.sequence import tai64n
from crossedge.meshd.settings import MeshSettings
from crossedge.meshd.staticpeer import StaticPeer
from crossedge.meshd.transmit import Transmit
from crossedge.meshd.turns import Turns
from crossedge.meshd.wallclock import Wallclock
from crossedge.wire import messages as m
from crossedge.wire.demux import Kind, classify
from crossedge.wire.endpoint import DirectEndpoint, Endpoint, RelayEndpoint, UdpEndpoint, remote_of
from crossedge.wire.errors import WireError

RESTORED_MAX: Final = 256  # peers that an earlier life was talking to and that are opened at start
HANDSHAKES: Final = (Kind.INITIATION, Kind.RESPONSE, Kind.COOKIE)

AnyPeer = MeshPeer | StaticPeer


class Mesh:
    """One node's mesh."""

    def __init__(
        self,
        settings: MeshSettings,
        allowed: AllowedIPs[Link],
        clock: Wallclock,
        numbers: Numbers,
        random: Callable[[int], bytes],
        now: float,
    ) -> None:
        """Start with nobody but the stock peers.

        Args:
            settings: who we are; see there.
            allowed: whose each inner address is; shared with the data path, which reads it.
            clock: the wall clock, whose `set` the shell calls.
            numbers: the one source of sequence numbers, with its persisted floor.
            random: returns that many random bytes.
            now: seconds of CLOCK_BOOTTIME.
        """
        self.settings = settings
        self.allowed = allowed
        self.dropped: Counter[str] = Counter()
        self.device = Device(PrivateKey(settings.session_key), random, lambda at: tai64n(numbers.next(at)))
        self.members: dict[bytes, MeshPeer] = {}
        self.static: dict[bytes, StaticPeer] = {}
        self.started = now
        self.stirred = False
        """Whether something waits to be pumped or handed out since the caller set this to False, after calls
        that the data path made; plain calls of the mesh always do."""
        self.reach = Reach(settings.certificate.node_id, settings.unreachable_after, now)
        self._random = random
        self._now = now
        self._events = EventQueue(self.dropped)
        self._turns: Turns[AnyPeer] = Turns()
        self._owners: dict[Link, AnyPeer] = {}
        self._control_deadline: float | None = None
        self._control = ControlPlane(settings, self, clock, numbers, random, now)
        self.latency = LatencyPlane(settings.certificate.node_id, self.members, random, self._last_now)
        self.services = PeerServices(
            settings,
            self.device,
            self._control,
            lambda: self.control,
            self.dropped,
            self.touch,
            self.emit,
            self.latency,
            now,
            random,
        )
        self.control.directory.is_needed = self._is_needed
        self.greeter = Greeter(
            self.device,
            self.members,
            self.static,
            self._control.directory.by_session_key,
            self._control.transmit,
            self.touch,
            self.dropped,
        )
        for static in settings.static_peers:
            peer = StaticPeer(static, self.services, self.device, settings.underlay_mtu, now)
            self.static[static.public_key] = peer
            self._owners[peer.link] = peer
            for network in static.allowed_ips:
                allowed.insert(network, peer.link)
            self.touch(peer)
        if self.static:
            self.emit(RoutesChanged())

    @property
    def control(self) -> ControlPlane:
        """The control side. Whoever asks for it may change it, so its deadline is looked up again."""
        self._control_deadline = None
        return self._control

    # --- What the shell tells ---------------------------------------------------------------------------

    def set_rendezvous(self, public_key: bytes, endpoint: UdpEndpoint, now: float) -> None:
        """Use the rendezvous with this key at this endpoint (its name, resolved), from now on."""
        self._now = now
        self.control.set_rendezvous(public_key, endpoint, now)
        self._pump()

    def set_static_endpoint(self, name: str, endpoint: UdpEndpoint, now: float) -> None:
        """Tell where the name in a stock peer's endpoint leads now; a peer that is heard knows better."""
        self._now = now
        for static in self.static.values():
            if static.name == name:
                static.resolved(endpoint, now)
        self._pump()

    def set_host_addresses(self, addresses: Iterable[str], now: float, *, moved: bool = False) -> None:
        """Take the host's own addresses, favourites first, without loopback, link-local and the TUN's.

        Call it at start and after each network event. `moved`: the way out may be another one though the
        addresses are the same (the default route changed). Where either is so, everything is proven again.
        """
        self._now = now
        hosts = tuple(addresses)
        first = not self.services.own_hosts
        changed = self.control.set_host_addresses(hosts, now) or frozenset(hosts) != self.services.own_hosts
        self.services.own_hosts = frozenset(hosts)
        if (changed or moved) and not first:
            for peer in self.members.values():
                peer.moved(now)
            self.latency.moved(now)
        self._pump()

    def set_underlay_mtu(self, mtu: int, now: float) -> None:
        """Take the MTU in bytes of the way to the internet; it matters for stock peers."""
        self._now = now
        if [peer for peer in self.static.values() if peer.set_underlay_mtu(mtu)]:
            self.emit(RoutesChanged())

    def datagram_too_big(self, endpoint: Endpoint, now: float, size: int = 0) -> None:
        """Take the kernel's word (EMSGSIZE) that `size` bytes (0: unknown) for that endpoint cannot leave."""
        self._now = now
        for peer in self.members.values():
            path = peer.paths.get(endpoint)
            if path is not None:
                path.too_big(size, now)
                self.touch(peer)
        self._pump()

    def begin_netcheck(self, ports: Sequence[int], now: float) -> None:
        """Start a network check with sockets on these local ports, the daemon's own first.

        What is for socket number i carries `local=i`. `control.nat.report` is there once
        `netcheck_running` ends.
        """
        self._now = now
        self.control.begin_netcheck(ports, now)

    @property
    def netcheck_running(self) -> bool:
        """Whether a network check still needs its sockets."""
        return self.control.nat.netcheck is not None

    def want_session(self, link: Link, now: float) -> None:
        """Open the session of a link: the data path has a packet for it and no key or no endpoint."""
        self._now = now
        owner = self._owners.get(link)
        if owner is not None:
            owner.want(now)
            self._pump()

    def want_address(self, address: bytes, now: float) -> None:
        """Look for the member whose prefix has this packed address: nobody known has it."""
        self._now = now
        self.control.find(address, now)

    def ping(self, name: str, number: int, now: float) -> bool:
        """Probe the way to a member; a `PingResult` with this number follows. False: no such member."""
        self._now = now
        peer = next((peer for peer in self.members.values() if peer.name == name), None)
        if peer is None:
            return False
        peer.talk.ping(number, now)
        self._pump()
        return True

    def status(self, now: float) -> dict[str, Any]:
        """Return the node's state for the control socket; see `snapshots`."""
        return snapshots.status(self, now)

    def peers(self, now: float) -> list[dict[str, Any]]:
        """Return every peer's state for the control socket; see `snapshots`."""
        return snapshots.peers(self, now)

    def routes(self) -> list[snapshots.MeshRoute]:
        """Return every prefix that is reached through the mesh."""
        return snapshots.routes(self)

    # --- What arrives -----------------------------------------------------------------------------------

    def receive(self, datagram: bytes, source: Endpoint, now: float, local: int = 0) -> None:
        """Take a datagram that is not transport data or a chunk; a relay envelope is unwrapped before.

        `local` is the number of the socket, 0 but for the fresh ones of a network check.
        """
        self._now = now
        if isinstance(source, RelayEndpoint) and not self._control.relay_server(source.server):
            self.dropped["unknown-relay"] += 1
            return
        kind = classify(datagram)
        if kind in HANDSHAKES:
            self.greeter.receive(datagram, source, now)
        elif kind is Kind.CONTROL:
            self.control.receive(datagram, source, now)
        elif kind is Kind.STUN and not isinstance(source, RelayEndpoint):
            self.control.nat.receive(datagram, source, local, now)
        else:
            self.dropped["unexpected-kind"] += 1
        self._pump()

    def receive_inner(
        self, link: Link, plaintext: bytes, source: Endpoint, now: float, stamp: float | None = None
    ) -> None:
        """Take the plaintext of an in-session message (first nibble 0) that the data path opened."""
        self._now = now
        owner = self._owners.get(link)
        if not isinstance(owner, MeshPeer):
            self.dropped["inner-of-stock-peer"] += 1
            return
        try:
            message = inner.decode(bytes(plaintext))
        except WireError as error:
            self.dropped[f"inner-{error.reason}"] += 1
            return
        if isinstance(message, inner.Statement):
            self.control.offer(message.record, message.certificate, owner.node_id, now)
            owner.sources.roamed(source, len(plaintext), now)
        else:
            owner.receive_inner(message, len(plaintext), source, now, now if stamp is None else stamp)
        self._pump()

    def report(self, link: Link, keypair: Keypair, now: float) -> None:
        """Tell a link's peer what was received of its superframes under a keypair."""
        self._now = now
        owner = self._owners.get(link)
        if isinstance(owner, MeshPeer):
            tally = keypair.tally
            owner.talk.say(inner.Report(keypair.local_index, tally.end, tally.opened).encode(), now)

    def roamed(self, link: Link, source: Endpoint, size: int, now: float) -> None:
        """Note that the data path opened `size` bytes of this link from where it does not send to."""
        self._now = now
        owner = self._owners.get(link)
        if isinstance(owner, StaticPeer):
            owner.heard(source, now)
        elif owner is not None:
            owner.sources.roamed(source, size, now)
        self._pump()

    # --- Time and output --------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """Return when `handle_timeout` has something to do, in seconds of `now`."""
        self._pump()
        if self._control_deadline is None:
            self._control_deadline = self._control.next_deadline()
        latency = self.latency.next_deadline() if self.settings.measure else None
        others = (self._turns.next(), self.services.next_deadline(), self.reach.deadline, latency)
        return min([self._control_deadline, *(when for when in others if when is not None)])

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        self._now = now
        self.control.handle_timeout(now)
        self.services.handle_timeout(now)
        if self.settings.measure:
            self.latency.handle_timeout(now)
        self._turns.handle_timeout(now)
        if now >= self.reach.deadline:
            stock = [each.last_heard for each in self.static.values() if each.last_heard is not None]
            if self.reach.look(self.members, max(stock, default=None), now):
                self.emit(ReachChanged(self.reach.cut_off))
        self._pump()

    def poll_transmit(self, clock: Callable[[], float] | None = None) -> Transmit | None:
        """Return the next datagram to send, or None.

        `clock` tells `now` at that very moment, for what says when it left; None: the last `now` will do.
        """
        self._pump()
        return self._control.poll_transmit(self._last_now if clock is None else clock)

    def _last_now(self) -> float:
        return self._now

    def poll_event(self) -> MeshEvent | None:
        """Return the next event, or None."""
        self._pump()
        return self._events.poll()

    def _pump(self) -> None:
        self._turns.pump(self._now)

    def all_dropped(self) -> Counter[str]:
        """Return what the core dropped and why, the data path's counters not included."""
        return self.dropped + self.device.dropped + self._control.all_dropped()

    # --- What survives a restart ------------------------------------------------------------------------

    def export_active(self, now: float) -> list[tuple[bytes, UdpEndpoint | None]]:
        """Return (node id, last proven direct endpoint) of every member with traffic, to persist."""
        active = [peer for peer in self.members.values() if peer.up(now) and peer.last_data is not None]
        active.sort(key=lambda peer: -(peer.last_data or 0.0))
        return [(peer.node_id, peer.last_good) for peer in active[:RESTORED_MAX]]

    def restore(
        self,
        records: Iterable[tuple[bytes, bytes]],
        active: Iterable[tuple[bytes, UdpEndpoint | None]],
        now: float,
    ) -> int:
        """Take what an earlier life persisted and open its sessions; returns how many records held."""
        self._now = now
        taken = self.control.restore(records, now)
        for node_id, last_good in list(active)[:RESTORED_MAX]:
            peer = self.members.get(node_id)
            if peer is not None:
                peer.reopen(last_good, now)
        self._pump()
        return taken

    def close(self) -> None:
        """Let go of every key; nothing is sent any more."""
        for peer in self.members.values():
            peer.close("stopped")
        for static in self.static.values():
            static.close()

    # --- What the control side tells (ControlHost) ------------------------------------------------------

    def member_added(self, member: Member, now: float) -> None:
        """Make a peer of a new member."""
        leads = self.settings.certificate.node_id < member.node_id
        peer = MeshPeer(member, self.services, self._random, leads=leads, now=now)
        self.members[member.node_id] = peer
        self._owners[peer.link] = peer
        self.latency.prober.add(member.node_id)
        for network in member.certificate.allowed_ips:
            self.allowed.insert(network, peer.link)
        self.reach.appeared(now)
        self.emit(RoutesChanged())
        self.emit(StateToPersist())

    def member_changed(self, member: Member, previous: Member, now: float) -> None:
        """Give a peer its newer record."""
        peer = self.members.get(member.node_id)
        if peer is None:
            return
        if member.fingerprint != previous.fingerprint:
            self.allowed.remove_value(peer.link)
            for network in member.certificate.allowed_ips:
                self.allowed.insert(network, peer.link)
            self.emit(RoutesChanged())
        peer.replace(member, now)
        self.emit(StateToPersist())

    def member_removed(self, member: Member, reason: str) -> None:
        """Let go of a peer and of everything that was its own."""
        peer = self.members.pop(member.node_id, None)
        if peer is None:
            return
        peer.close(reason)
        self.latency.removed(member.node_id)
        self.allowed.remove_value(peer.link)
        del self._owners[peer.link]
        self._turns.forget(peer)
        self.dropped["peer-removed-queue"] += len(peer.link.take_queue())
        self.emit(RoutesChanged())
        self.emit(StateToPersist())

    def called(
        self, member: Member, body: m.CallBody, relay: RelayEndpoint | None, event: Called, now: float
    ) -> None:
        """Answer a call: take its handshake, its channel, and punch."""
        peer = self.members.get(member.node_id)
        if peer is None:
            return
        peer.measuring.called(now, measure=body.measure)
        if relay is not None:
            peer.sources.learn_relay(relay, now, heard=True)
        peer.seen_at = event.observed.host
        if body.initiation:
            self.greeter.receive(body.initiation, relay or self.control.clients[event.server].endpoint, now)
        peer.called(body.attempt, body.candidates, body.observed_by, now)

    def call_answered(self, node_id: bytes, relay: RelayEndpoint, now: float) -> None:
        """Give a peer the channel that its call got."""
        peer = self.members.get(node_id)
        if peer is not None:
            peer.sources.learn_relay(relay, now, heard=False)

    def relay_bound(self, relay: RelayEndpoint, now: float) -> None:
        """Let the peer behind a channel hear from us, now that it leads to us again."""
        for peer in self.members.values():
            if peer.paths.get(relay) is not None:
                peer.relay_bound(relay, now)

    def relay_gone(self, relay: RelayEndpoint, now: float) -> None:
        """Forget a channel that its rendezvous does not know."""
        for peer in self.members.values():
            if peer.paths.get(relay) is not None:
                peer.relay_gone(relay, now)

    def pinged(self, member: Member, source: Endpoint, size: int, now: float) -> None:
        """Let a peer note that it was heard from an address: a second observer of that address."""
        peer = self.members.get(member.node_id)
        if peer is not None and not isinstance(source, RelayEndpoint):
            self.services.budget.confirm(remote_of(source))
            peer.sources.pinged(source, size, now)

    def ponged(self, member: Member, endpoint: DirectEndpoint, now: float) -> None:
        """Let a peer note that an endpoint answered."""
        peer = self.members.get(member.node_id)
        if peer is not None:
            self.services.budget.confirm(remote_of(endpoint))
            peer.sources.ponged(endpoint, now)

    def scouted(self, local: int, mapped: UdpEndpoint, now: float) -> None:
        """Tell whoever opened a further socket where it is seen."""
        peer = self.services.sockets.owner(local)
        if peer is not None:
            peer.later.scouted(local, mapped, now)
            self.touch(peer)

    def reachable(self, server: bytes, now: float, *, anew: bool) -> None:
        """Call whoever waits, now that a rendezvous has us; one that forgot us forgot its channels too."""
        client = self.control.clients[server]
        for peer in self.members.values():
            peer.rendezvous_reachable(client.endpoint, now, anew=anew)

    def restated(self, now: float) -> None:
        """Tell every peer with a session our new record."""
        for peer in self.members.values():
            peer.restated(now)

    def further_sockets(self, count: int) -> tuple[int, ...]:
        """Return numbers for so many sockets that belong to no peer; those given before are closed."""
        return self.services.own_sockets(count)

    def emit(self, event: MeshEvent) -> None:
        """Queue an event for the shell."""
        self.stirred = True
        self._events.put(event)

    # --- What services need -----------------------------------------------------------------------------

    def blocklist_wanted(self, node_id: bytes, now: float) -> None:
        """Ask a member for its newer blocklist, inside the session if there is one."""
        peer = self.members.get(node_id)
        if peer is not None:
            self.services.fetch_blocklist(peer, now)

    def touch(self, peer: AnyPeer) -> None:
        """Pump this peer soon."""
        self.stirred = True
        self._turns.touch(peer)

    def _is_needed(self, node_id: bytes) -> bool:
        peer = self.members.get(node_id)
        return peer is not None and peer.active
