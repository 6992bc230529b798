"""The client of one rendezvous: keeps us registered there, its directory pulled, and carries calls.

                 accepted                silent
    CONNECTING -----------> REGISTERED ----------> LOST
        |                     |     ^                |
        |                     |     +--- accepted ---+
        +------> REFUSED <----+      (REFUSED is tried again after a while)

A rendezvous forgets everything when it restarts, and any sign of that makes us register again at once: a new
epoch in whatever message, the code "unregistered", a cookie challenge where there was a lease. One that does
not answer is noticed at the next keepalive and then tried every 0.5 to 1 s, with the small message.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Final

from crossedge.meshd import client_events as events
from crossedge.meshd.client_channel import MAX_QUEUE, SealedChannel
from crossedge.meshd.client_events import ClientEvent, ClientState
from crossedge.meshd.client_pull import Puller
from crossedge.meshd.client_requests import Make, Request
from crossedge.meshd.client_sync import Known
from crossedge.meshd.sequence import Sequence
from crossedge.meshd.transmit import Transmit
from crossedge.wire import messages as m
from crossedge.wire.certificate import Certificate
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey
from crossedge.wire.errors import WireError
from crossedge.wire.identity import key_id
from crossedge.wire.record import Record

CONTACT_TRIES: Final = 3  # sends of a keepalive or registration until the rendezvous counts as lost
CONTACT_MIN: Final = 0.3  # seconds between the first of them: a hiccup of the network is no loss
RETRY_MIN: Final = 0.5  # seconds between tries at a rendezvous that does not answer, with as much jitter
KEEPALIVE_MIN: Final = 1.0  # seconds: what a rendezvous may ask for
KEEPALIVE_MAX: Final = 60.0
TRIES: Final = 5  # sends of any other question
DEBOUNCE: Final = 0.05  # seconds in which further changes join a re-registration
SPACING: Final = 1.0  # seconds between registrations because something changed, or somebody says so
REFUSED_RETRY: Final = (5.0, 10.0, 20.0, 30.0)
STALE_LIMIT: Final = 4  # stale answers in a row after which it is a refusal

MakeRecord = Callable[[int, float], tuple[bytes, bytes]]


class Timer(Enum):
    """What a client waits for, apart from answers."""

    KEEPALIVE = "keepalive"
    REGISTER = "register"
    RENEW = "renew before the record ends"


class RendezvousClient:
    """One rendezvous. Core: bytes and the time in; datagrams, events and the next deadline out."""

    def __init__(
        self,
        public_key: bytes,
        endpoint: UdpEndpoint,
        control_key: ControlKey,
        sequence: Sequence,
        make_record: MakeRecord,
        known: Known,
        random: Callable[[int], bytes],
        now: float,
    ) -> None:
        """Begin to register at once.

        Args:
            public_key: of the rendezvous.
            endpoint: where it is, resolved.
            control_key: ours.
            sequence: the node's one source of numbers, shared with all that uses the control key.
            make_record: returns our (record, certificate) for a registration, given a number above all that
                were used, and the time. One that was made before and still says the truth will do.
            known: returns (node id, sequence number) of every record that is held, sorted.
            random: returns that many random bytes.
            now: seconds.
        """
        self.server = key_id(public_key)
        self.state = ClientState.CONNECTING
        self.observed: UdpEndpoint | None = None
        self.keepalive = KEEPALIVE_MIN
        self._sequence = sequence
        self._make_record = make_record
        self._random = random
        self._channel = SealedChannel(
            public_key, endpoint, control_key, random, self._on_message, self._on_challenge
        )
        self.dropped = self._channel.dropped
        """What was dropped, by reason."""
        self.sent = self._channel.sent
        """What was sent, by name of the message."""
        self._puller = Puller(self.server, self._channel, known, self._emit, self._uniform)
        self._contact: Request | None = None
        self._own: tuple[bytes, bytes] = (b"", b"")
        self._unsettled = True  # what we registered last was not accepted yet
        self._registered_key = b""
        self._stale = 0
        self._refusals = 0
        self._asked_at = now - SPACING
        self._timers: dict[Timer, float] = {Timer.REGISTER: now}
        self._events: deque[ClientEvent] = deque()

    # --- What is known --------------------------------------------------------------------------------

    @property
    def public_key(self) -> bytes:
        """The control key of the rendezvous."""
        return self._channel.public_key

    @property
    def endpoint(self) -> UdpEndpoint:
        """Where the rendezvous is."""
        return self._channel.endpoint

    @property
    def rtt(self) -> float | None:
        """Smoothed round trip time in seconds."""
        return self._channel.round_trip.smoothed

    @property
    def epoch(self) -> int:
        """The epoch of the rendezvous' directory, 0 before the first answer."""
        return self._puller.sync.seen_epoch

    @property
    def version(self) -> int:
        """The version of its directory up to which everything arrived."""
        return self._puller.sync.version

    @property
    def last_heard(self) -> float | None:
        """When anything authentic came last."""
        return self._channel.last_heard

    # --- What one can ask for -------------------------------------------------------------------------

    def call(self, target: bytes, sealed: bytes, now: float) -> int | None:
        """Hand `sealed` (a `CallBody` for the target's control key) to a node; ends in `CallAnswered`.

        Returns the request's id; None while not registered, or where too much is outstanding.
        """
        return self._ask(
            m.Call,
            lambda id_, at: m.Call(id=id_, seq=self._sequence.next(at), target=target, sealed=sealed),
            m.CallReply,
            target,
            now,
        )

    def find_address(self, address: bytes, now: float) -> int | None:
        """Ask whose prefixes have an address (4 or 16 bytes); ends in `Found`."""
        return self._ask(m.Find, lambda id_, _: m.Find(id=id_, address=address), m.Found, address, now)

    def find_node(self, node_id: bytes, now: float) -> int | None:
        """Ask for the newest record of a node, with its certificate; ends in `Found`."""
        return self._ask(m.Find, lambda id_, _: m.Find(id=id_, node=node_id), m.Found, node_id, now)

    def bind(self, channel: int, now: float) -> int | None:
        """Tell that our side of a relay channel is where this comes from; ends in `Bound`."""
        return self._ask(
            m.Bind,
            lambda id_, at: m.Bind(id=id_, seq=self._sequence.next(at), channel=channel),
            m.Bound,
            channel.to_bytes(6, "big"),
            now,
        )

    def fetch_blocklist(self, held: int, now: float) -> None:
        """Ask for a blocklist of a higher serial than `held`; ends in `BlocklistArrived` if there is one."""
        if self.state is ClientState.REGISTERED:
            self._puller.fetch_blocklist(held, now)

    def record_changed(self, now: float) -> None:
        """Register again soon: what our record says is no longer true."""
        self._set(Timer.REGISTER, max(now + DEBOUNCE, self._asked_at + SPACING))

    def network_changed(self, now: float) -> None:
        """Ask at once where we are seen: addresses or routes have changed."""
        if self.state is ClientState.REGISTERED:
            self._send_keepalive(now)
        elif self.state is not ClientState.REFUSED:
            self._try_again(now)

    def set_endpoint(self, endpoint: UdpEndpoint, now: float) -> None:
        """Take another address of the same rendezvous (its name resolves to a new one)."""
        if endpoint != self.endpoint:
            self._channel.set_endpoint(endpoint)
            self._register(now)

    def set_control_key(self, control_key: ControlKey, now: float) -> None:
        """Take our new control key, and register under it at once; answers to the old one are still read."""
        self._channel.set_control_key(control_key)
        self._register(now)

    # --- In and out -----------------------------------------------------------------------------------

    def receive(self, datagram: bytes, source: UdpEndpoint, now: float) -> bool:  # noqa: ARG002 - see below
        """Take an untrusted control datagram (CE 01); return whether it is from this rendezvous.

        Where it came from does not matter: what counts is the key, and nothing is ever sent to `source`.
        """
        return self._channel.receive(datagram, now)

    def poll_transmit(self) -> Transmit | None:
        """Return the next datagram to send."""
        return self._channel.poll_transmit()

    def poll_event(self) -> ClientEvent | None:
        """Return the next thing that happened."""
        return self._events.popleft() if self._events else None

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do."""
        deadlines = [*self._timers.values(), self._channel.requests.next_deadline(), self._puller.due]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        for request in self._channel.requests.due(now):
            if self._channel.requests.get(request.id) is request:
                self._on_no_answer(request, now)
        for timer, action in ACTIONS.items():
            if self._timers.get(timer, now + 1) <= now:
                del self._timers[timer]
                action(self, now)
        if self._puller.due is not None and self._puller.due <= now:
            self._puller.begin(now)

    def _on_message(self, request: Request | None, message: m.Message, now: float) -> None:
        if request is None:
            if isinstance(message, m.Notify):
                self._on_notify(message, now)
            elif isinstance(message, m.Called):
                self._emit(events.Called.of(self.server, message))
            else:
                self.dropped["unexpected-message"] += 1
        elif isinstance(message, m.Page):
            self._puller.on_page(request, message, self.keepalive, now)
        else:
            self._channel.requests.close(request)
            if request is self._contact:
                self._contact = None
            if isinstance(message, m.Error):
                self._on_error(request, message, now)
            else:
                ANSWERS[type(message)](self, request, message, now)

    def _on_challenge(self, request: Request, now: float) -> bool:
        """A keepalive is challenged where there is no lease any more, or where our address is new."""
        if request is self._contact and request.question is m.Keepalive:
            self._register(now)
            return True
        return False

    # --- Contact: Register and Keepalive --------------------------------------------------------------

    def _register(self, now: float) -> None:
        """Register, in place of whatever contact was being made."""
        self._timers.pop(Timer.REGISTER, None)
        self._timers.pop(Timer.KEEPALIVE, None)
        self._asked_at = now
        self._own = self._make_record(self._sequence.next(now), now)
        self._unsettled = True
        self._timers[Timer.RENEW] = now + _lifetime(self._own[0]) / 2
        self._make_contact(m.Register, self._make_register, m.Registered, now)

    def _register_soon(self, now: float) -> None:
        """Register because somebody says that it is needed: at once, but not time and again."""
        if now - self._asked_at >= SPACING:
            self._register(now)
        else:
            self._set(Timer.REGISTER, self._asked_at + SPACING)

    def _make_register(self, id_: int, now: float) -> m.Message:
        record, certificate = self._own
        return m.Register(id=id_, seq=self._sequence.next(now), record=record, certificate=certificate)

    def _send_keepalive(self, now: float) -> None:
        self._timers.pop(Timer.KEEPALIVE, None)
        if self._contact is None or self._contact.question is m.Keepalive:
            self._make_contact(m.Keepalive, self._make_keepalive, m.KeepaliveReply, now)

    def _make_keepalive(self, id_: int, now: float) -> m.Message:
        seq, sync = self._sequence.next(now), self._puller.sync
        return m.Keepalive(id=id_, seq=seq, epoch=sync.epoch, version=sync.version)

    def _make_contact(
        self, question: type[m.Message], make: Make, answer: type[m.Message], now: float
    ) -> None:
        self._end_contact()
        self._contact = self._channel.ask(
            question, make, answer, now, tries=0, interval=self._contact_interval
        )
        if self._contact is None:  # our own questions fill the table; they end soon
            self._set(Timer.REGISTER, now + RETRY_MIN)

    def _end_contact(self) -> None:
        self._channel.requests.close(self._contact)
        self._contact = None

    def _contact_interval(self, sent: int) -> float:
        if self.state is ClientState.REGISTERED and sent < CONTACT_TRIES:
            return max(self._channel.round_trip.timeout(sent), CONTACT_MIN * sent)
        return RETRY_MIN * (1.0 + self._uniform())

    def _try_again(self, now: float) -> None:
        """Try a rendezvous that was silent: with a keepalive where it may know us, as that costs least."""
        self._end_contact()
        if self._registered_key == self._channel.control_key:
            self._send_keepalive(now)
        else:
            self._register(now)

    def _on_no_answer(self, request: Request, now: float) -> None:
        if self._puller.on_silence(request, now):
            return
        if request is not self._contact:
            if request.sent < request.tries:
                self._channel.send(request, now)
            else:
                self._channel.requests.close(request)
                self._failed(request, "timeout", now)
        elif request.sent < CONTACT_TRIES:
            self._channel.send(request, now)
        else:
            self._enter(ClientState.LOST, f"no answer from {self.endpoint}")
            if request.question is m.Register and self._registered_key == self._channel.control_key:
                self._try_again(now)
            else:
                self._channel.send(request, now)

    def _on_registered(self, _: Request, message: m.Registered, now: float) -> None:
        self._stale = self._refusals = 0
        self._unsettled = False
        self._registered_key = self._channel.control_key
        self._accepted(message.keepalive, message.observed, now, "registered")
        self._emit(events.Registered.of(self.server, message))
        self._puller.heard(message.epoch, message.version, self.keepalive, now)

    def _on_keepalive_reply(self, _: Request, message: m.KeepaliveReply, now: float) -> None:
        moved = message.observed != self.observed
        self._accepted(message.keepalive, message.observed, now, "answers again")
        if self._unsettled or message.epoch != self.epoch:
            self._register(now)
            return
        if moved:
            self.record_changed(now)
        self._puller.heard(message.epoch, message.version, self.keepalive, now)

    def _accepted(self, keepalive: float, observed: UdpEndpoint, now: float, why: str) -> None:
        self._enter(ClientState.REGISTERED, why)
        self.keepalive = min(max(keepalive, KEEPALIVE_MIN), KEEPALIVE_MAX)
        self._timers[Timer.KEEPALIVE] = now + self.keepalive * (0.9 + 0.1 * self._uniform())
        if observed != self.observed:
            self.observed = observed
            self._emit(events.Observed(self.server, self.endpoint.host, observed))

    # --- What comes by itself, and other answers -------------------------------------------------------

    def _on_notify(self, message: m.Notify, now: float) -> None:
        if message.epoch == self.epoch:
            self._puller.heard(message.epoch, message.version, self.keepalive, now)
        elif self._puller.is_past(message.epoch):
            self.dropped["old-epoch"] += 1
        else:  # it restarted; the epoch counts once it has registered us
            self._register_soon(now)

    def _ask(
        self, question: type[m.Message], make: Make, answer: type[m.Message], subject: bytes, now: float
    ) -> int | None:
        if self.state is not ClientState.REGISTERED:
            return None
        request = self._channel.ask(question, make, answer, now, tries=TRIES, context=subject)
        return None if request is None else request.id

    def _on_call_reply(self, request: Request, message: m.CallReply, _: float) -> None:
        self._emit(events.CallAnswered.of(self.server, request.id, request.context, message))

    def _on_found(self, request: Request, message: m.Found, _: float) -> None:
        self._emit(events.Found.of(self.server, request.id, request.context, message))

    def _on_bound(self, request: Request, message: m.Bound, _: float) -> None:
        self._emit(events.Bound.of(self.server, request.id, message))

    # --- What goes wrong ------------------------------------------------------------------------------

    def _on_error(self, request: Request, message: m.Error, now: float) -> None:
        is_contact = request.question in (m.Register, m.Keepalive)
        if message.code == "stale-sequence":
            self._on_stale(request, message.record, is_contact, now)
        elif request.question is m.Register:
            self._refused(message.code, message.detail, now)
        elif is_contact:
            self._register(now)
        else:
            self._failed(request, message.code, now)
            if message.code == "unregistered":
                self._register_soon(now)

    def _on_stale(self, request: Request, newest: bytes, is_contact: bool, now: float) -> None:
        """Raise our numbers above those of our newest record, if that is indeed ours, and register again."""
        seq = self._newest_of_ours(newest)
        if seq is not None:
            # Numbers that were used after the record was made are above its own by its lifetime at most.
            self._sequence.raise_to(seq + (int(_lifetime(newest) * 1e6) if self._stale else 0))
            self._emit(events.StaleSequence(self.server, seq))
        if not is_contact:  # it was overtaken on its way
            self._failed(request, "stale-sequence", now)
            return
        self._stale += 1
        if self._stale > STALE_LIMIT:
            self._refused("stale-sequence", "our numbers do not reach those of an earlier life", now)
        else:
            self._register(now)

    def _newest_of_ours(self, encoded: bytes) -> int | None:
        try:
            record = Record.decode(encoded)
            record.check_signature(Certificate.decode(self._own[1]).ed25519)
        except WireError as error:
            self.dropped[f"stale-{error.reason}"] += 1
            return None
        return record.seq

    def _refused(self, code: str, detail: str, now: float) -> None:
        self._enter(ClientState.REFUSED, f"{code}: {detail}" if detail else code)
        self._timers.clear()
        self._end_contact()
        self._puller.stop()
        wait = REFUSED_RETRY[min(self._refusals, len(REFUSED_RETRY) - 1)]
        self._refusals += 1
        self._stale = 0
        self._set(Timer.REGISTER, now + wait * (0.9 + 0.2 * self._uniform()))

    def _failed(self, request: Request, code: str, now: float) -> None:
        if not self._puller.on_failure(request, code, now) and isinstance(request.context, bytes):
            kind = request.question.__name__
            self._emit(events.RequestFailed(self.server, request.id, kind, code, request.context))

    # --- Inside ---------------------------------------------------------------------------------------

    def _emit(self, event: ClientEvent) -> None:
        if len(self._events) >= MAX_QUEUE:
            self.dropped["event-queue"] += 1
            return
        self._events.append(event)

    def _enter(self, state: ClientState, why: str) -> None:
        if state is not self.state:
            old, self.state = self.state, state
            self._emit(events.StateChanged(self.server, old, state, why))

    def _set(self, timer: Timer, due: float) -> None:
        """Set a timer, or bring it forward."""
        self._timers[timer] = min(due, self._timers.get(timer, due))

    def _uniform(self) -> float:
        return int.from_bytes(self._random(2), "big") / 65_536


def _lifetime(record: bytes) -> float:
    """Return for how long a record of ours was made to hold, in seconds."""
    decoded = Record.decode(record)
    return float(decoded.expires - decoded.issued)


ACTIONS: Final[dict[Timer, Callable[[RendezvousClient, float], None]]] = {
    Timer.REGISTER: RendezvousClient._register,
    Timer.RENEW: RendezvousClient.record_changed,
    Timer.KEEPALIVE: RendezvousClient._send_keepalive,
}

ANSWERS: Final[dict[type[m.Message], Callable[..., None]]] = {
    m.Registered: RendezvousClient._on_registered,
    m.KeepaliveReply: RendezvousClient._on_keepalive_reply,
    m.Found: RendezvousClient._on_found,
    m.CallReply: RendezvousClient._on_call_reply,
    m.Bound: RendezvousClient._on_bound,
    m.BlocklistPart: lambda client, request, message, now: client._puller.on_part(request, message, now),
}
