"""What this node says to one peer inside the session: probes, hellos, statements, pings for people."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from crossedge.meshd.constants import PADDING, TRANSPORT_OVERHEAD
from crossedge.meshd.hello import HelloExchange, gso_types
from crossedge.meshd.inner import (
    REPLY_MIN,
    BlocklistAsk,
    BlocklistPart,
    Bye,
    Hello,
    Inner,
    Place,
    Probe,
    ProbeReply,
    Report,
)
from crossedge.meshd.keypair import CounterExhaustedError, Keypair, seal_transport
from crossedge.meshd.peerport import Port
from crossedge.meshd.userping import UserPings
from crossedge.wire.endpoint import Endpoint, RelayEndpoint

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

SEAL_STEP: Final = 2e-6  # seconds by which the time that sealing takes is believed to have grown at once
SEAL_MAX: Final = 2e-4
STATEMENTS: Final = (0.0, 0.3, 1.0)  # seconds after a change of ours at which a peer is told


class Talk:
    """Everything in-session with one peer."""

    __slots__ = ("_peer", "_port", "_statements", "hello", "pings")

    def __init__(self, peer: MeshPeer, port: Port) -> None:
        self._peer = peer
        self._port = port
        self._statements: list[float] = []
        self.hello: HelloExchange | None = None
        self.pings = UserPings(peer.name)

    def begin(self, keypair: Keypair, now: float, *, state: bool) -> None:
        """Say hello under a new keypair; `state`: and who we are, because the session is new."""
        if self.hello is None or self.hello.keypair is not keypair:
            self.hello = self._port.new_hello(keypair, now)
        self._peer.paths.forgive()  # perhaps it restarted
        if state:
            self._statements = [now]

    def clear(self) -> None:
        """Fall silent: the session is closed."""
        self.hello = None
        self._statements.clear()

    def state(self, now: float, *, firmly: bool = False) -> None:
        """Tell the peer our newest record soon; `firmly`: more than once, as the way to it may be bad."""
        if firmly:
            self._statements = [now + delay for delay in STATEMENTS]
        elif not self._statements:
            self._statements = [now]

    # --- Saying -----------------------------------------------------------------------------------------

    def seal(self, plaintext: bytes, endpoint: Endpoint, now: float, *, exact: bool = False) -> None:
        """Send one in-session message; `exact`: without padding, so that the datagram has its very size."""
        session = self._peer.session
        if session is None or session.current is None or not session.usable(now):
            return
        size = len(plaintext) + TRANSPORT_OVERHEAD + (0 if exact else -len(plaintext) % PADDING)
        if not self._peer.sources.pays(endpoint, size):
            return
        try:
            datagram = seal_transport(session.current, plaintext, pad=not exact)
        except CounterExhaustedError:
            return
        session.data_sent(now, 0)
        self._port.send(endpoint, datagram)

    def seal_late(
        self, size: int, message: Callable[[float], Probe | ProbeReply], endpoint: Endpoint, now: float
    ) -> None:
        """Send a probe or an answer of `size` bytes that is made, and sealed, when it leaves.

        So what this daemon has to do between, and whoever takes the processor from it, is not read as
        distance.
        """
        session = self._peer.session
        if session is None or session.current is None or not session.usable(now):
            return
        if not self._peer.sources.pays(endpoint, size):
            return
        keypair = session.current
        session.data_sent(now, 0)

        def make(clock: Callable[[], float]) -> bytes | None:
            port, start = self._port, clock()
            with contextlib.suppress(CounterExhaustedError):
                datagram = seal_transport(keypair, message(start + port.seal_time).encode(), pad=False)
                # The least that was seen lately: an interruption of one is not expected of the next.
                port.seal_time = min(clock() - start, port.seal_time + SEAL_STEP, SEAL_MAX)
                return datagram
            return None

        self._port.send_late(endpoint, make)

    def say(self, plaintext: bytes, now: float) -> None:
        """Send an in-session message the way that data goes, or while there is none by every relay."""
        endpoints = self._peer.link.endpoints or tuple(path.endpoint for path in self._peer.paths.relays())
        for endpoint in endpoints or tuple(self._peer.paths.consented()[:2]):
            self.seal(plaintext, endpoint, now)

    def pump(self, now: float) -> None:
        """Send what is due; the session is usable."""
        for path, probe in self._peer.paths.probes(now):
            endpoint = path.endpoint
            paid = (
                path.consented
                or isinstance(endpoint, RelayEndpoint)
                or self._port.spend(self._peer, endpoint, now)
            )
            if paid:
                self.seal_late(probe.size, partial(path.leaves, probe), endpoint, now)
        exchange = self.hello
        if exchange is not None and exchange.due is not None and now >= exchange.due:
            session = self._peer.session
            if session is None or exchange.keypair is not session.current:
                self.hello = None
            else:
                self.say(exchange.message(now).encode(), now)
        if self._statements and now >= self._statements[0]:
            self._statements = [when for when in self._statements if when > now]
            self.say(self._port.statement(now), now)

    def ping(self, number: int, now: float) -> None:
        """Probe the way that data takes, for a person; opens the session first where there is none."""
        self.pings.ask(number, now)
        if not self._peer.up(now) or not self._peer.link.endpoints:
            self._peer.want(now)
        self._port.touch(self._peer)

    def pump_pings(self, now: float) -> None:
        """Send the pings that people wait for, once there is a way; report their results."""
        endpoints = self._peer.link.endpoints if self._peer.up(now) else ()
        for number in self.pings.waiting if endpoints else ():
            identity = self._peer.paths.take_id()
            self.pings.sent(number, identity, endpoints[0], now)
            probe = Probe(identity, now)
            self.seal_late(probe.size, partial(self.pings.leaves, probe), endpoints[0], now)
        self.pings.handle_timeout(now)
        while self.pings.results:
            self._port.emit(self.pings.results.popleft())

    def deadlines(self, *, up: bool) -> list[float]:
        """Return when something is due; `up`: the session is usable."""
        times = self._statements[:1] if up else []
        if up and self.hello is not None and self.hello.due is not None:
            times.append(self.hello.due)
        pings = self.pings.deadline()
        return times if pings is None else [*times, pings]

    # --- Hearing ----------------------------------------------------------------------------------------

    def receive(self, message: Inner, source: Endpoint, now: float, stamp: float) -> None:
        """Take a message that came from this endpoint."""
        match message:
            case Probe():
                size = message.size if message.full_reply else REPLY_MIN
                reply = ProbeReply(message.id, message.sent, stamp, now, message.size, size)
                self.seal_late(size, lambda leaves: replace(reply, answered=leaves), source, now)
            case ProbeReply():
                if self.pings.replied(message, stamp):
                    self._peer.proved_at = now
                else:
                    self._peer.sources.replied(message, source, now, stamp)
            case Hello():
                self._hear_hello(message, now)
            case BlocklistAsk():
                part = self._port.blocklist_part(message)
                if part is not None:
                    self.seal(part.encode(), source, now)
            case BlocklistPart():
                self._port.blocklist_arrived(self._peer, message, now)
            case Place():
                self._port.place_heard(self._peer, message, now)
            case Report(receiver=receiver, end=end, opened=opened):
                self._hear_report(receiver, end, opened, now)
            case Bye(receiver=receiver):
                self._peer.farewell.heard(receiver, now)

    def _hear_report(self, receiver: int, end: int, opened: int, now: float) -> None:
        """Let records grow or shrink by what the peer received of those under the current keypair."""
        current = None if self._peer.session is None else self._peer.session.current
        if (
            current is not None
            and current.remote_index == receiver
            and opened <= end <= current.chunk_counter
        ):
            self._peer.link.growth.report(receiver, end, opened, now)

    def _hear_hello(self, hello: Hello, now: float) -> None:
        session = self._peer.session
        if session is None:
            return
        ours = session.follow(hello.receiver, now)
        current, exchange = session.current, self.hello
        if current is None:
            self._port.dropped["hello-of-another-keypair"] += 1
            return
        if exchange is None or exchange.keypair is not current:
            exchange = self.hello = self._port.new_hello(current, now)
        if not ours:
            self._port.dropped["hello-of-another-keypair"] += 1
            if session.leads:  # the peer follows once it hears with which keypair we send
                exchange.due = now
            return
        aead = exchange.receive(hello, now)
        if aead is None:
            return
        exchange.keypair.enable_superframes(aead)
        if exchange.heard:
            self._peer.link.allow_superframes(exchange.keypair, gso_types(hello.gso), hello.largest_chunk)
