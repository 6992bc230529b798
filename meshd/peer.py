"""One member of the mesh as this node deals with it: session, paths, punch, hello, traffic.

    cold       no session; the first packet that wants one makes the call
    opening    called: pings go to the candidates, the handshake through the relay and wherever a ping was
               answered
    up         data flows, through the relay until a direct path is proven; `Paths` says which way
    idle       no traffic for ACTIVE_TIME: only keepalives
    parting    after SESSION_IDLE it says Bye, and no more; what the peer sent before it heard that still
               arrives, and makes it up again; then the session is closed (`Farewell`): cold

What it sends goes through its `Port`, which is the mesh: that one seals, pays from the budget and knows the
rendezvous. Whatever happened, `pump` follows: it sends what is due and chooses the way again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from crossedge.latency.readings import Reading
from crossedge.meshd.directory import Peer as Member
from crossedge.meshd.events import Direct, SessionChanged
from crossedge.meshd.farewell import Farewell
from crossedge.meshd.handshaking import NEVER, Handshaking
from crossedge.meshd.inner import Inner
from crossedge.meshd.latertries import LaterTries
from crossedge.meshd.link import Link
from crossedge.meshd.liveness import Liveness
from crossedge.meshd.measuring import Measuring
from crossedge.meshd.natplan import Nature, Plan, nature, plan
from crossedge.meshd.offers import Offers
from crossedge.meshd.path import State
from crossedge.meshd.paths import Paths
from crossedge.meshd.peerport import Gate, Port
from crossedge.meshd.punch import Phase, Punch, Volley
from crossedge.meshd.session import HandshakeFailed, KeypairRotated, Session, SessionExpired, SessionUp
from crossedge.meshd.sources import Sources
from crossedge.meshd.talk import Talk
from crossedge.meshd.way import Way
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, UdpEndpoint

ACTIVE_TIME: Final = 20.0  # seconds after the last packet for which a pair counts as having traffic
SESSION_IDLE: Final = 300.0  # seconds without traffic after which a session is closed


class MeshPeer:
    """One member of the mesh."""

    def __init__(
        self, member: Member, port: Port, random: Callable[[int], bytes], *, leads: bool, now: float
    ) -> None:
        """`leads`: our node id is the lower one."""
        self.member = member
        self.session: Session | None = None
        self.link = Link(member.name, Gate(self))
        self.sources = Sources(self, port)
        self.way = Way(self, port)
        self.paths = Paths(random, int.from_bytes(random(2), "big") / 65536)
        self.punch = Punch()
        self.later = LaterTries(self, port)
        self.seen_at = ""
        """The address at which a rendezvous says it saw the peer call us: a hint."""
        self.offers = Offers(member.record, port.usable)
        self.talk = Talk(self, port)
        self.farewell = Farewell(self, port)
        self.liveness = Liveness(self, port)
        self.handshaking = Handshaking(self, port)
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
        self.proved_at: float | None = None
        """When the peer was last reached and we by it: a probe was answered, or a handshake was."""
        self.measuring = Measuring(self, port)
        self.reading: Reading | None = None
        """What was measured of the pair; None while it never had a path."""
        self.accepted = False
        """Whether the session is one that the peer opened."""
        self._port = port
        self._leads = leads
        self._plan = Plan()
        self._pictured: object = None

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

    @property
    def parting(self) -> bool:
        """Whether we have let go of the session, which is there only for what is on its way."""
        return bool(self.farewell.why)

    def lively(self, now: float) -> bool:
        """Tell whether the pair has traffic."""
        return self.last_data is not None and now - self.last_data < ACTIVE_TIME

    def up(self, now: float) -> bool:
        """Tell whether data can be sealed."""
        return self.session is not None and self.session.usable(now)

    def plan(self, *, anew: bool = False) -> Plan:
        """Return how the pair is punched; `anew`: by what is known of both NATs now."""
        if anew or self.punch.phase is Phase.IDLE:
            self._plan = plan(self._port.verdict(), self._port.verdict_of(self), leads=self._leads)
            self._pictured = self._port.picture()
        return self._plan

    # --- Opening and closing ----------------------------------------------------------------------------

    def want(self, now: float) -> None:
        """Open the session because a packet wants it, or note that there is traffic."""
        if self.session is None or self.parting or (self.wanted_at is None and not self.session.usable(now)):
            self.wanted_at = now
        self._want(now)

    def check(self, now: float) -> None:
        """Reach the peer: see `proved_at`.

        A way that holds is asked once, which is no traffic; where that is not answered, or there is none, all
        is done that traffic would do.
        """
        proven = [path for path in self.paths if path.state is State.PROVEN]
        if self.up(now) and proven and (self.proved_at or NEVER) >= max(path.scouted for path in proven):
            for path in proven:
                path.scout(now)
            self._port.touch(self)
            return
        if self.up(now) and not proven:
            self._port.rebind(self, now)
            for path in self.paths:
                if path.relay or path.consented:
                    path.prove(now)  # whatever punching waits for
        self._want(now)

    def _want(self, now: float) -> None:
        self.last_data = now
        self.measuring.in_earnest(now)
        if self.session is None or self.parting:
            self.open(now)
        elif not self.session.usable(now):
            self.session.initiate(now)
        self._port.touch(self)

    def open(self, now: float) -> None:
        """Start a handshake, call and punch."""
        if not self._ensure_session(now) or self.session is None:
            return
        self.opened_at = self.handshaking.since = now
        self.session.initiate(now)
        self.recall(now)

    def reopen(self, last_good: UdpEndpoint | None, now: float) -> None:
        """Open the session that an earlier life of this daemon had."""
        self.last_good = last_good
        if self.session is None:
            self.open(now)

    def rendezvous_reachable(self, server: UdpEndpoint, now: float, *, anew: bool) -> None:
        """Call where a rendezvous that has us now leads nowhere; `anew`: it forgot us, and its channels."""
        relay = self.paths.relay_at(server)
        if relay is not None and anew:
            self.paths.remove(relay.endpoint)
            self._port.touch(self)
            relay = None
        if self.session is not None and not self.up(now) and not self.parting:
            self.recall(now)
        elif self.lively(now) and relay is None:
            self._port.call(self, 0, now)

    def relay_bound(self, relay: RelayEndpoint, now: float) -> None:
        """Prove a channel again that leads to us again, and let the peer know what changed here."""
        path = self.paths.get(relay)
        if path is not None and path.state is State.SUSPECT:
            path.nudge(now)
            self.talk.state(now, firmly=True)
            self._port.touch(self)

    def relay_gone(self, relay: RelayEndpoint, now: float) -> None:
        """Forget a channel, and ask for another one while there is traffic."""
        self.paths.remove(relay)
        if self.lively(now):
            self._port.call(self, 0, now)
        self._port.touch(self)

    def _ensure_session(self, now: float) -> bool:
        if self.session is None or self.parting:
            self.session = self.session or self._port.new_session(self, now)
            self.opened_at = self.handshaking.since = now
            self.farewell.call_off()
        return self.session is not None

    def accept(self, now: float) -> Session | None:
        """Return the session for a handshake that comes in, a new one if need be."""
        self.accepted |= self.session is None
        self._ensure_session(now)
        return self.session

    def refuse(self) -> None:
        """Let go of the session that `accept` made: the handshake was not the peer's, or not a new one."""
        if self.session is not None:
            self.session.close()
        self.session = None
        self.measuring.only = self.accepted = False
        self.opened_at = None
        self.handshaking.since = NEVER

    def recall(self, now: float) -> None:
        """Call again: a rendezvous is in reach now, or something of ours changed that the peer must know."""
        if self.session is None:
            return
        self.liveness.called(now)
        self.later.end()
        self.handshaking.called = self._port.call(self, 1, now)
        self.punch.start(self.offers.candidates(), now, self.plan(anew=True).first_time)
        self._port.touch(self)

    def close(self, state: str) -> None:
        """Let go of keys and paths; `state` says why."""
        if self.session is None:
            return
        told = (self.up_at is not None or self.wanted_at is not None) and not self.measuring.only
        self.measuring.stop()
        self.measuring.only = self.accepted = False
        self.session.close()
        self.session = None
        self.talk.clear()
        self.link.agreed = None
        self.way.set((), 0, state)
        self.paths.clear()
        self.punch.reset()
        self.later.end()
        self.sources.free_sockets()
        self.offers.clear()
        self.wanted_at = self.opened_at = self.up_at = self.direct_at = None
        self.handshaking.called = False
        self.farewell.call_off()
        if told:
            self._port.emit(SessionChanged(self.name, state))

    def replace(self, member: Member, now: float) -> None:
        """Take a newer record, perhaps under a newer certificate."""
        old, self.member = self.member, member
        hosts, verdict = {endpoint.host for endpoint in old.record.endpoints}, old.record.verdict
        fresh = self.offers.replace(member.record)
        if member.certificate.x25519 != old.certificate.x25519:
            self.close("rekeyed")
            return
        easy = nature(member.record.verdict) is Nature.EASY
        if (
            any(easy or endpoint.host not in hosts for endpoint in fresh)
            or member.record.verdict.mapping is not verdict.mapping
        ):
            self.liveness.try_again()
        if not self.active or not fresh:
            return
        used = None if self.paths.current is None else self.paths.current.endpoint
        if used in old.record.endpoints and used not in self.offers:
            self.paths.doubt(now)
        for endpoint in fresh:
            self.punch.add(endpoint, now)
        self._port.touch(self)

    def moved(self, now: float) -> None:
        """Prove everything again: an address of ours changed. Without traffic the next packet calls."""
        if not self.active:
            return
        self.paths.doubt(now, relays=True)
        self.talk.state(now, firmly=True)
        if self.lively(now):
            self._port.rebind(self, now)
            self.recall(now)
        self._port.touch(self)

    def restated(self, now: float) -> None:
        """Tell the peer our newest record inside the session."""
        if self.up(now):
            self.talk.state(now)
            self._port.touch(self)
        if self.active and self._port.picture() != self._pictured:
            self.liveness.try_again()

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
        if attempt > 1:
            if self.punch.phase is not Phase.TRYING or self.punch.attempt != attempt:
                self.plan(anew=True)
            self.later.called(attempt, self.offers.add_fresh(offered, observed_by), now)
        else:
            self.offers.add(offered, observed_by)
        if attempt == 1:
            self.later.end()
            self.punch.called(self.offers.candidates(), now, self.plan(anew=True).first_time)
        self._port.touch(self)

    def receive_inner(self, message: Inner, size: int, source: Endpoint, now: float, stamp: float) -> None:
        """Take an in-session message of `size` bytes that came from here; statements are the mesh's."""
        self.sources.roamed(source, size, now)
        self.talk.receive(message, source, now, stamp)
        self.way.flush()
        self._port.touch(self)

    # --- Traffic ----------------------------------------------------------------------------------------

    def on_data_sent(self, now: float, size: int) -> None:
        """Note that the data path sent a batch."""
        if not size:
            return
        self._traffic(now)
        if self.direct_at is None and self.way.direct is not None:
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
        if self.measuring.only:
            self.measuring.in_earnest(now)
        if self.last_data is None or now - self.last_data >= ACTIVE_TIME:
            self._port.touch(self)
        self.last_data = now

    # --- The pump ---------------------------------------------------------------------------------------

    def handle_timeout(self, now: float) -> None:
        """Do what is due, then pump."""
        session = self.session
        if session is not None:
            session.handle_timeout(now)
            if self.parting and session.current is None:
                if now >= self.farewell.until:
                    self.close(self.farewell.why)
            elif session.current is None and now >= self._last_use() + ACTIVE_TIME and not self._opening():
                self.close("failed")
            elif now >= self._last_use() + self._idle_time:
                self.farewell.bid("idle", now)
        self.pump(now)

    @property
    def _idle_time(self) -> float:
        return ACTIVE_TIME if self.measuring.only else SESSION_IDLE

    def _last_use(self) -> float:
        return max(self.last_data or NEVER, self.opened_at or NEVER)

    def _opening(self) -> bool:
        return bool(self.session is not None and self.session.initiation is not None and self.link.queue)

    def pump(self, now: float) -> None:
        """Send what is due and choose the way again; called after everything that happened to the peer."""
        session = self.session
        if session is None:
            self._punch(now)
            self.talk.pump_pings(now)
            return
        self._session_events(session, now)
        self.paths.handle_timeout(now)
        if self.up(now):
            self.talk.pump(now)
        self._punch(now)
        self.liveness.watch(session, now)
        while (datagram := session.poll_transmit()) is not None:
            self.handshaking.send(datagram, now)
        self._session_events(session, now)
        self.way.choose(now)
        self.talk.pump_pings(now)
        self.measuring.pump(now)

    def deadline(self, now: float) -> float | None:
        """Return when `handle_timeout` has something to do."""
        probes = self.paths.deadline() if self.up(now) else None  # without keys there are none
        times = [when for when in (probes, self.punch.deadline(), self.later.deadline()) if when is not None]
        session = self.session
        if session is not None:
            when = session.next_deadline()
            if when is not None:
                times.append(when)
            if self.last_data is not None:
                times += [self.last_data + ACTIVE_TIME] if self.lively(now) else []
                times += self.liveness.deadlines(now)
            if self.parting:
                times.append(self.farewell.until)
            else:
                patience = self._idle_time if session.current is not None else ACTIVE_TIME
                times.append(self._last_use() + patience)
            measuring = self.measuring.deadline()
            times += [] if measuring is None else [measuring]
        times += self.talk.deadlines(up=self.up(now))
        return min((when for when in times if when > NEVER), default=None)

    def _session_events(self, session: Session, now: float) -> None:
        while (event := session.poll_event()) is not None:
            match event:
                case SessionUp():
                    self._on_up(event, now)
                case KeypairRotated():
                    self.talk.begin(event.keypair, now, state=False)
                case SessionExpired() | HandshakeFailed():
                    ended = "expired" if isinstance(event, SessionExpired) else "failed"
                    self._port.emit(SessionChanged(self.name, ended))

    def _on_up(self, event: SessionUp, now: float) -> None:
        self.farewell.call_off()
        self.up_at = now
        self.last_heard = self.proved_at = now
        self.talk.begin(event.keypair, now, state=not self.measuring.only)
        if not self.measuring.only:
            self.sources.prove_all(now)
            self._port.emit(SessionChanged(self.name, "up"))
        self.measuring.up(now)

    def _punch(self, now: float) -> None:
        self._fire(now)
        trying = self.punch.phase is Phase.TRYING
        call = self.punch.handle_timeout(now, self._plan)
        if trying and (call is not None or self.punch.phase is not Phase.TRYING):
            self.later.end()
        if call is not None:
            if not self.lively(now):
                self.punch.reset()
            else:
                self.later.begin(call.attempt, now)
        self.later.handle_timeout(now)
        self._fire(now)
        self.sources.free_sockets()

    def _fire(self, now: float) -> None:
        for shot in self.punch.take(now):
            if isinstance(shot, Volley):
                self._port.send_volley(self, shot, now)
            else:
                self._port.send_ping(self, shot, now)
