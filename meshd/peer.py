"""One member of the mesh as this node deals with it: session, paths, punch, hello, traffic.

    cold       no session; the first packet that wants one makes the call
    opening    called: pings go to the candidates, the handshake through the relay and wherever a ping was
               answered
    up         data flows, through the relay until a direct path is proven; `Paths` says which way
    idle       no traffic for ACTIVE_TIME: only keepalives; after SESSION_IDLE the session is closed: cold

What it sends goes through its `Port`, which is the mesh: that one seals, pays from the budget and knows the
rendezvous. Whatever happened, `pump` follows: it sends what is due and chooses the way again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from crossedge.meshd.directory import Peer as Member
from crossedge.meshd.events import Direct, LinkReady, PathChanged, SessionChanged
from crossedge.meshd.hello import HelloExchange, gso_types
from crossedge.meshd.inner import Hello, Inner, Probe, ProbeReply
from crossedge.meshd.keypair import CounterExhaustedError, Keypair, seal_transport
from crossedge.meshd.link import Link
from crossedge.meshd.offers import Offers
from crossedge.meshd.path import KEEPALIVE_INTERVAL, Path, State
from crossedge.meshd.paths import Paths
from crossedge.meshd.peerport import Gate, Port
from crossedge.meshd.punch import Phase, Punch
from crossedge.meshd.session import HandshakeFailed, KeypairRotated, Session, SessionExpired, SessionUp
from crossedge.meshd.userping import UserPings
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, UdpEndpoint

ACTIVE_TIME: Final = 20.0  # seconds after the last packet for which a pair counts as having traffic
SESSION_IDLE: Final = 300.0  # seconds without traffic after which a session is closed
SILENT: Final = 2.0  # seconds without a sign of life, with traffic, after which new keys are tried
SILENT_AGAIN: Final = 5.0
DOUBT_AGAIN: Final = 5.0  # seconds between calls because no direct path is good any more
SPRAY_AFTER: Final = 1.0  # seconds without a relay after which handshakes go to the candidates themselves
STATEMENTS: Final = (0.0, 0.3, 1.0)  # seconds after a change of ours at which a peer is told in the session
RESPONSE_TIME: Final = 1.0  # seconds for which our answer to an initiation may be sent again
NEVER: Final = float("-inf")
TRANSPORT: Final = 4  # first byte of a WireGuard transport message


class MeshPeer:
    """One member of the mesh."""

    def __init__(
        self, member: Member, port: Port, random: Callable[[int], bytes], *, leads: bool, now: float
    ) -> None:
        """`leads`: our node id is the lower one."""
        self.member = member
        self.session: Session | None = None
        self.link = Link(member.name, Gate(self))
        seed = random(6)
        self.paths = Paths(int.from_bytes(seed[:4], "big"), int.from_bytes(seed[4:], "big") / 65536)
        self.punch = Punch(leads=leads)
        self.hello: HelloExchange | None = None
        self.offers = Offers(member.record, port.usable)
        self.pings = UserPings(member.name)
        self.last_good: UdpEndpoint | None = None
        """The direct endpoint that was proven last, in this life or an earlier one."""
        self.created = now
        self.wanted_at: float | None = None
        self.opened_at: float | None = None
        self.up_at: float | None = None
        self.direct_at: float | None = None
        self.time_to_direct: float | None = None
        """Seconds from the first packet of the cold pair to the first data sent direct; the newest one."""
        self.last_data: float | None = None
        self.last_heard: float | None = None
        self.keepalive = KEEPALIVE_INTERVAL
        """Seconds between keepalives of idle direct paths."""
        self._port = port
        self._called = False
        self._response = b""
        self._responded = NEVER
        self._silent_tried = NEVER
        self._doubt_tried = NEVER
        self._statements: list[float] = []

    # --- What it is -------------------------------------------------------------------------------------

    @property
    def node_id(self) -> bytes:
        """The 16-byte id."""
        return self.member.node_id

    @property
    def name(self) -> str:
        """The name in the certificate."""
        return self.member.name

    @property
    def active(self) -> bool:
        """Whether there is a session, or one is being opened."""
        return self.session is not None

    def lively(self, now: float) -> bool:
        """Tell whether the pair has traffic."""
        return self.last_data is not None and now - self.last_data < ACTIVE_TIME

    def up(self, now: float) -> bool:
        """Tell whether data can be sealed."""
        return self.session is not None and self.session.usable(now)

    @property
    def direct(self) -> Path | None:
        """The direct path that data takes alone, if it does."""
        current = self.paths.current
        if current is None or current.relay or self.link.endpoints != (current.endpoint,):
            return None
        return current

    def relay_rtt(self) -> float:
        """Return the smoothed RTT through the best relay in seconds, 0 where none was measured."""
        return next((path.rtt.smoothed for path in self.paths.relays() if path.rtt.smoothed is not None), 0.0)

    # --- Opening and closing ----------------------------------------------------------------------------

    def want(self, now: float) -> None:
        """Open the session because a packet wants it, or note that there is traffic."""
        self.last_data = now
        if self.session is None:
            self.wanted_at = now
            self.open(now)
        elif not self.session.usable(now):
            if self.wanted_at is None:
                self.wanted_at = now
            self.session.initiate(now)
        self._port.touch(self)

    def open(self, now: float) -> None:
        """Start a handshake, call and punch."""
        if not self._ensure_session(now) or self.session is None:
            return
        self.opened_at = now
        self.session.initiate(now)
        self._called = self._port.call(self, 1, now)
        self.punch.start(self.offers.candidates(), now)
        self._port.touch(self)

    def reopen(self, last_good: UdpEndpoint | None, now: float) -> None:
        """Open the session that an earlier life of this daemon had."""
        self.last_good = last_good
        if self.session is None:
            self.open(now)

    def rendezvous_reachable(self, now: float) -> None:
        """Call through a rendezvous that has us registered now, where that was not possible before."""
        if self.session is None:
            return
        if not self.up(now):
            self.recall(now)
        elif self.lively(now) and not self.paths.relays():
            self._port.call(self, 0, now)

    def rendezvous_restarted(self, server: UdpEndpoint) -> None:
        """Forget the channel at a rendezvous that forgot it too."""
        for path in self.paths.relays():
            if isinstance(path.endpoint, RelayEndpoint) and path.endpoint.server == server:
                self.paths.remove(path.endpoint)
                self._port.touch(self)

    def relay_gone(self, relay: RelayEndpoint, now: float) -> None:
        """Forget a channel, and ask for another one while there is traffic."""
        self.paths.remove(relay)
        if self.lively(now):
            self._port.call(self, 0, now)
        self._port.touch(self)

    def _ensure_session(self, now: float) -> bool:
        if self.session is None:
            self.session = self._port.new_session(self, now)
            self.opened_at = now
        return self.session is not None

    def accept(self, now: float) -> Session | None:
        """Return the session for a handshake that comes in, a new one if need be."""
        self._ensure_session(now)
        return self.session

    def recall(self, now: float) -> None:
        """Call again: a rendezvous is in reach now, or something of ours changed that the peer must know."""
        if self.session is None:
            return
        self._doubt_tried = now
        self._called = self._port.call(self, 1, now)
        self.punch.start(self.offers.candidates(), now)
        self._port.touch(self)

    def close(self, state: str) -> None:
        """Let go of keys and paths; `state` says why."""
        if self.session is None:
            return
        told = self.up_at is not None or self.wanted_at is not None
        self.session.close()
        self.session = None
        self.hello = None
        self.link.agreed = None
        self._set_path((), 0, state)
        self.paths.clear()
        self.punch.reset()
        self.offers.clear()
        self.wanted_at = self.opened_at = self.up_at = self.direct_at = None
        self._called = False
        self._statements.clear()
        if told:
            self._port.emit(SessionChanged(self.name, state))

    def replace(self, member: Member, now: float) -> None:
        """Take a newer record, perhaps under a newer certificate."""
        old, self.member = self.member, member
        fresh = self.offers.replace(member.record)
        if member.certificate.x25519 != old.certificate.x25519:
            self.close("rekeyed")
            return
        if not self.active or not fresh:
            return
        current = self.paths.current
        if current is not None and isinstance(current.endpoint, UdpEndpoint):
            left = current.endpoint in old.record.endpoints and current.endpoint not in self.offers
            if left:
                self.paths.doubt(now)
        for endpoint in fresh:
            self.punch.add(endpoint, now)
        self._port.touch(self)

    def moved(self, now: float) -> None:
        """Prove everything again: an address of ours changed."""
        if not self.active:
            return
        self.paths.doubt(now, relays=True)
        self._statements = [now + delay for delay in STATEMENTS]
        self._port.rebind(self, now)
        self.recall(now)

    def restated(self, now: float) -> None:
        """Tell the peer our newest record inside the session."""
        if self.up(now) and not self._statements:
            self._statements = [now]
            self._port.touch(self)

    # --- What arrives -----------------------------------------------------------------------------------

    def called(
        self,
        attempt: int,
        offered: Iterable[UdpEndpoint],
        observed_by: Iterable[tuple[bytes, UdpEndpoint]],
        now: float,
    ) -> None:
        """Answer a call whose body was authentic and fresh: fire at once. Attempt 0 wants only a relay."""
        self._ensure_session(now)
        self.offers.add(offered, observed_by)
        if attempt == 1:
            self.punch.start(self.offers.candidates(), now)
        elif attempt:
            self.punch.synchronise(self.offers.candidates(), attempt, 0.0, now, called=True)
        self._port.touch(self)

    def learn_relay(self, endpoint: RelayEndpoint, now: float, *, heard: bool) -> None:
        """Take a channel that leads to the peer; `heard`: something authentic came through it."""
        path = self.paths.get(endpoint) or self.paths.add(endpoint, now)
        if path is None:
            return
        if heard:
            path.heard(now)
        if self.up(now):
            path.prove(now)
        elif not heard:
            self._handshake_again(endpoint, now)
        self._port.touch(self)

    def _handshake_again(self, endpoint: Endpoint, now: float) -> None:
        """Let a handshake that goes on try a new way; what a call carried already is not repeated."""
        session = self.session
        if session is None:
            return
        if session.initiation is not None and not (isinstance(endpoint, RelayEndpoint) and self._called):
            self._port.send(endpoint, session.initiation)
        if session.next is not None and now - self._responded < RESPONSE_TIME:
            self._port.send(endpoint, self._response)

    def responded(self, response: bytes, destination: Endpoint, now: float) -> None:
        """Send our answer to the peer's initiation every way, not only back: a copy of that is a replay."""
        self._response, self._responded = response, now
        for endpoint in self.handshake_endpoints(now):
            if endpoint != destination:
                self._port.send(endpoint, response)

    def repeated(self, source: Endpoint, now: float) -> None:
        """Answer a copy of the initiation that was answered last, because the first answer may be lost."""
        if (
            self.session is not None
            and self.session.next is not None
            and now - self._responded < RESPONSE_TIME
        ):
            self._port.send(source, self._response)

    def pinged(self, source: UdpEndpoint, now: float) -> None:
        """Note an authentic, fresh ping from this address: challenge it."""
        if not self._port.usable(source):
            return
        path = self.paths.add(source, now)
        if path is None:
            self._port.dropped["paths-full"] += 1
            return
        path.heard(now)
        self.punch.heard(source, now)
        if self.up(now) and path.state in (State.UNPROVEN, State.LOST):
            path.prove(now)
        self._port.touch(self)

    def ponged(self, endpoint: UdpEndpoint, now: float) -> None:
        """Note that the peer answered our challenge to this endpoint: it takes handshakes and proofs now."""
        path = self.paths.add(endpoint, now)
        if path is None:
            self._port.dropped["paths-full"] += 1
            return
        first = not path.consented
        path.consented = True
        path.heard(now)
        if self.up(now):
            path.prove(now)
        elif first:
            self._handshake_again(endpoint, now)
        self._port.touch(self)

    def handshaken(self, source: Endpoint, now: float, *, response: bool) -> None:
        """Note an authentic handshake message; a response echoes our initiation and so is consent."""
        self.last_heard = now
        path = self.paths.add(source, now) if self._port.usable(source) else None
        if path is not None:
            path.heard(now)
            if response and not path.relay:
                path.consented = True
        self._port.touch(self)

    def roamed(self, source: Endpoint, now: float) -> None:
        """Note that something was opened that came from an endpoint; one that is new is challenged."""
        self.last_heard = now
        path = self.paths.get(source)
        if path is None and self._port.usable(source):
            path = self.paths.add(source, now)
        if path is None:
            return
        path.heard(now)
        if self.up(now) and path.state is State.UNPROVEN:
            path.prove(now)
            self._port.touch(self)

    def receive_inner(self, message: Inner, source: Endpoint, now: float, stamp: float) -> None:
        """Take an in-session message that came from this endpoint; statements are the mesh's."""
        self.roamed(source, now)
        if isinstance(message, Probe):
            size = message.size if message.full_reply else 0
            reply = ProbeReply(message.id, message.sent, stamp, now, message.size, size)
            self._seal(reply.encode(), source, now, exact=True)
        elif isinstance(message, ProbeReply):
            self._replied(message, source, now, stamp)
        elif isinstance(message, Hello):
            self._hello(message, now)
        self._port.touch(self)

    def _replied(self, reply: ProbeReply, source: Endpoint, now: float, stamp: float) -> None:
        if self.pings.replied(reply.id, stamp):
            return
        path = self.paths.replied(reply, source, stamp, now)
        if path is None:
            self._port.dropped["unasked-probe-reply"] += 1
            return
        if path.state is State.PROVEN and isinstance(path.endpoint, UdpEndpoint):
            self.last_good = path.endpoint
            if self.punch.phase is not Phase.DONE:
                self.punch.done()

    def _hello(self, hello: Hello, now: float) -> None:
        session = self.session
        if session is None:
            return
        exchange = self.hello
        if exchange is None or exchange.keypair.local_index != hello.receiver:
            current = session.current
            if current is None or current.local_index != hello.receiver:
                self._port.dropped["hello-of-another-keypair"] += 1
                return
            exchange = self.hello = self._port.new_hello(current, now)
        aead = exchange.receive(hello, now)
        if aead is None:
            return
        exchange.keypair.enable_superframes(aead)
        if exchange.heard:
            self.link.allow_superframes(exchange.keypair, gso_types(hello.gso), hello.largest_chunk)
            self._flush()

    # --- Traffic ----------------------------------------------------------------------------------------

    def on_data_sent(self, now: float, size: int) -> None:
        """Note that the data path sent a batch."""
        if not size:
            return
        self._traffic(now)
        if self.direct_at is None and self.direct is not None:
            self.direct_at = now
            if self.wanted_at is not None:
                self.time_to_direct = now - self.wanted_at
                self._port.emit(Direct(self.name, self.time_to_direct))

    def on_data_received(self, now: float, size: int) -> None:
        """Note that the data path opened a batch; `size` 0: nothing of it was for the pods."""
        self.last_heard = now
        if size:
            if self.wanted_at is None:
                self.wanted_at = now
            self._traffic(now)

    def on_rotated(self) -> None:
        """Note that another keypair is in use."""
        self._port.touch(self)

    def _traffic(self, now: float) -> None:
        if not self.lively(now):
            self._port.touch(self)
        self.last_data = now

    def ping(self, number: int, now: float) -> None:
        """Probe the way that data takes, for a person; opens the session first where there is none."""
        self.pings.ask(number, now)
        if not self.up(now) or not self.link.endpoints:
            self.want(now)
        self._port.touch(self)

    # --- The pump ---------------------------------------------------------------------------------------

    def handle_timeout(self, now: float) -> None:
        """Do what is due, then pump."""
        session = self.session
        if session is not None:
            session.handle_timeout(now)
            if session.current is None and now - self._last_use() >= ACTIVE_TIME and not self._opening():
                self.close("failed")
            elif now - self._last_use() >= SESSION_IDLE:
                self.close("idle")
        self.pump(now)

    def _last_use(self) -> float:
        return max(self.last_data or NEVER, self.opened_at or NEVER)

    def _opening(self) -> bool:
        return bool(self.session is not None and self.session.initiation is not None and self.link.queue)

    def pump(self, now: float) -> None:
        """Send what is due and choose the way again; called after everything that happened to the peer."""
        session = self.session
        if session is None:
            self._punch(now)
            self._user_pings(now)
            return
        self._session_events(session, now)
        self.paths.handle_timeout(now)
        if self.up(now):
            self._probe(now)
            self._say_hello(now)
            self._state(now)
        self._punch(now)
        self._watch(session, now)
        while (datagram := session.poll_transmit()) is not None:
            self._send_session(datagram, now)
        self._session_events(session, now)
        self._choose(now)
        self._user_pings(now)

    def deadline(self, now: float) -> float | None:
        """Return when `handle_timeout` has something to do."""
        times = [when for when in (self.paths.deadline(), self.punch.deadline()) if when is not None]
        session = self.session
        if session is not None:
            when = session.next_deadline()
            if when is not None:
                times.append(when)
            if self.hello is not None and self.hello.due is not None and self.up(now):
                times.append(self.hello.due)
            if self.last_data is not None:
                times += [self.last_data + ACTIVE_TIME] if self.lively(now) else []
                if self.lively(now) and self.up(now):
                    times.append(max((self.last_heard or now) + SILENT, self._silent_tried + SILENT_AGAIN))
            times.append(self._last_use() + (SESSION_IDLE if session.current is not None else ACTIVE_TIME))
            if self.up(now):
                times += self._statements[:1]
        when = self.pings.deadline()
        if when is not None:
            times.append(when)
        return min((when for when in times if when > NEVER), default=None)

    def _session_events(self, session: Session, now: float) -> None:
        while (event := session.poll_event()) is not None:
            match event:
                case SessionUp(keypair):
                    self._on_up(keypair, now)
                case KeypairRotated(keypair):
                    self.hello = self._port.new_hello(keypair, now)
                case SessionExpired():
                    self._port.emit(SessionChanged(self.name, "expired"))
                case HandshakeFailed():
                    self._port.emit(SessionChanged(self.name, "failed"))

    def _on_up(self, keypair: Keypair, now: float) -> None:
        self.up_at = now
        self.last_heard = now
        self.hello = self._port.new_hello(keypair, now)
        self._statements = [now]
        for path in self.paths:
            if path.relay or path.consented or path.last_heard is not None:
                path.prove(now)
        self._port.emit(SessionChanged(self.name, "up"))

    def _probe(self, now: float) -> None:
        for path, probe in self.paths.probes(now):
            endpoint = path.endpoint
            unpaid = isinstance(endpoint, UdpEndpoint) and not path.consented
            if unpaid and isinstance(endpoint, UdpEndpoint) and not self._port.spend(self, endpoint, now):
                continue
            self._seal(probe.encode(), endpoint, now, exact=True)

    def _say_hello(self, now: float) -> None:
        exchange = self.hello
        if exchange is None or exchange.due is None or now < exchange.due:
            return
        session = self.session
        if session is None or exchange.keypair is not session.current:
            self.hello = None
            return
        self._say(exchange.message(now).encode(), now)

    def _state(self, now: float) -> None:
        if self._statements and now >= self._statements[0]:
            self._statements = [when for when in self._statements if when > now]
            self._say(self._port.statement(now), now)

    def _say(self, plaintext: bytes, now: float) -> None:
        """Send an in-session message the way that data goes, or while there is none by every relay."""
        endpoints = self.link.endpoints or tuple(path.endpoint for path in self.paths.relays())
        if not endpoints:
            endpoints = tuple(self.paths.consented()[:2])
        for endpoint in endpoints:
            self._seal(plaintext, endpoint, now)

    def _seal(self, plaintext: bytes, endpoint: Endpoint, now: float, *, exact: bool = False) -> None:
        session = self.session
        if session is None or session.current is None or not session.usable(now):
            return
        try:
            datagram = seal_transport(session.current, plaintext, pad=not exact)
        except CounterExhaustedError:
            return
        session.data_sent(now, 0)
        self._port.send(endpoint, datagram)

    def _punch(self, now: float) -> None:
        for shot in self.punch.take(now):
            self._port.send_ping(self, shot, now)
        call = self.punch.handle_timeout(now)
        if call is None:
            return
        if not self.lively(now):
            self.punch.reset()
            return
        self._port.call(self, call.attempt, now)
        self.punch.synchronise(self.offers.candidates(), call.attempt, self.relay_rtt(), now, called=False)
        for shot in self.punch.take(now):
            self._port.send_ping(self, shot, now)

    def _watch(self, session: Session, now: float) -> None:
        """Notice, while there is traffic, that direct paths died or that the peer fell silent."""
        if not self.lively(now) or not self.up(now):
            return
        directs = self.paths.directs()
        if (
            not any(path.state is State.PROVEN for path in directs)
            and self.punch.phase in (Phase.IDLE, Phase.DONE)
            and now - self._doubt_tried >= DOUBT_AGAIN
        ):
            self._port.rebind(self, now)
            self.recall(now)
        heard = self.last_heard if self.last_heard is not None else now
        if now - heard >= SILENT and now - self._silent_tried >= SILENT_AGAIN:
            self._silent_tried = now
            session.initiate(now, urgent=True)

    def _send_session(self, datagram: bytes, now: float) -> None:
        """Send what the session made: handshakes wherever they may arrive, keepalives the way data goes."""
        if datagram[0] == 4:
            for endpoint in self.link.endpoints or tuple(path.endpoint for path in self.paths.relays()[:1]):
                self._port.send(endpoint, datagram)
            return
        for endpoint in self.handshake_endpoints(now):
            self._port.send(endpoint, datagram)

    def handshake_endpoints(self, now: float) -> list[Endpoint]:
        """Return where a handshake goes: through every relay and to all who agreed.

        Where there is neither and no call can help, to the candidates themselves, paid from the budget.
        """
        relays: list[Endpoint] = [path.endpoint for path in self.paths.relays()]
        agreed: list[Endpoint] = [*self.paths.consented()]
        if relays or agreed:
            return relays + agreed
        tried = [] if self.last_good is None else [self.last_good]
        if not self._called or now - (self.opened_at or now) >= SPRAY_AFTER:
            tried += [endpoint for endpoint in self.offers.candidates() if endpoint != self.last_good]
        return [endpoint for endpoint in tried if self._port.spend(self, endpoint, now)]

    def _choose(self, now: float) -> None:
        if not self.up(now):
            if self.session is not None and self.session.current is None:
                self._set_path((), 0, "no session")
            return
        before = self.paths.current
        endpoints, size = self.paths.select(now, lively=self.lively(now))
        if self.paths.current is not before and self.paths.current is not None:
            reason = "relayed" if self.paths.current.relay else "direct"
        else:
            reason = "in doubt" if len(endpoints) > 1 else "proven"
        self._set_path(endpoints, size, reason)
        for path in self.paths:
            path.keepalive = self.keepalive

    def _set_path(self, endpoints: tuple[Endpoint, ...], size: int, reason: str) -> None:
        old = self.link.endpoints
        if endpoints == old and (not endpoints or size - self.link.overhead == self.link.datagram_size):
            self._flush()
            return
        self.link.set_path(endpoints, size)
        if endpoints != old:
            self._port.emit(PathChanged(self.name, old, endpoints, reason))
        self._flush()

    def _user_pings(self, now: float) -> None:
        endpoints = self.link.endpoints if self.up(now) else ()
        for number in self.pings.waiting if endpoints else ():
            identity = self.paths.take_id()
            self.pings.sent(number, identity, endpoints[0], now)
            self._seal(Probe(identity, now).encode(), endpoints[0], now, exact=True)
        self.pings.handle_timeout(now)
        while self.pings.results:
            self._port.emit(self.pings.results.popleft())

    def _flush(self) -> None:
        if self.link.queue and self.link.endpoints:
            self._port.emit(LinkReady(self.link))
