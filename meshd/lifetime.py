"""How long an idle mapping of the NAT before us lives (RFC 5780, 4.6), measured once for each network.

    sockets 1..4   ask a STUN server, and once more after 3 s: a NAT may give a flow that goes on more time
    socket 0       after 13, 28, 58, 118 s asks that server to answer to the mapping of one of them
    socket n       hears that answer as long as its mapping lives

Nothing else goes over the mappings meanwhile, and each is tested once, because a packet from outside may
refresh it. The longest time that a mapping survived, and all shorter ones did, is the result.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

from crossedge.meshd.stunclient import StunAnswer, StunClient, StunRefused
from crossedge.wire import stun
from crossedge.wire.endpoint import SocketEndpoint, UdpEndpoint
from crossedge.wire.errors import WireError

LADDER: Final = (13.0, 28.0, 58.0, 118.0)  # seconds: two less than what timeouts are usually set to
SHORTEST: Final = 6.0  # seconds, where not even the first was survived
SOCKETS: Final = 1 + len(LADDER)
SETTLE: Final = 3.0  # seconds after which a flow that is answered counts as a stream (Linux: 2)
OPEN_TIME: Final = 4.0  # seconds for an answer to each of the first two questions
QUESTIONS: Final = (0.0, 0.4, 0.8)  # seconds at which a mapping's test is sent: one answer is enough
VERDICT_AFTER: Final = 2.0  # seconds after the first of them


class _Step(Enum):
    OPENING = "first question"
    SETTLING = "second question"
    IDLE = "left alone"
    TESTING = "tested"
    OVER = "over"


class _Mapping:
    """One socket and the time that its mapping is left alone."""

    __slots__ = ("asked", "due", "idle", "local", "mapped", "step", "survived", "transaction")

    def __init__(self, local: int, idle: float, transaction: bytes, due: float) -> None:
        self.local = local
        self.idle = idle
        self.transaction = transaction
        self.mapped: UdpEndpoint | None = None
        self.step = _Step.OPENING
        self.survived: bool | None = None
        self.asked = 0
        self.due = due


class LifetimeCheck:
    """One measurement. Core: bytes and the time in; datagrams and the next deadline out."""

    def __init__(
        self, server: UdpEndpoint, sockets: Sequence[int], random: Callable[[int], bytes], now: float
    ) -> None:
        """Begin at once, with a STUN server that serves RESPONSE-PORT and `SOCKETS` fresh sockets."""
        self.done = False
        self.lifetime: int | None = None
        """Seconds; None while it is not known, or where it could not be measured."""
        self.why = "being measured"
        self._server = server
        self._asker, *locals_ = sockets
        self._stun = StunClient(random)
        self._outer: str | None = None  # address at which the asker is seen
        self._transmits: deque[tuple[SocketEndpoint, bytes]] = deque()
        self._mappings = [
            _Mapping(local, idle, random(stun.TRANSACTION), now + OPEN_TIME)
            for local, idle in zip(locals_, LADDER, strict=True)
        ]
        self._stun.ask(server, now, tag=None, local=self._asker)
        for mapping in self._mappings:
            self._stun.ask(server, now, tag=mapping, local=mapping.local)

    def receive(self, datagram: bytes, source: SocketEndpoint, now: float) -> bool:
        """Take an untrusted STUN datagram; return whether it is of this check."""
        for mapping in self._mappings:
            if datagram[8 : stun.HEADER] == mapping.transaction:
                self._tested(mapping, datagram, source)
                return True
        mine = self._stun.receive(datagram, source.remote, source.local, now)
        while (event := self._stun.poll_event()) is not None:
            if isinstance(event, StunAnswer):
                self._answered(event, now)
        return mine

    def _answered(self, answer: StunAnswer, now: float) -> None:
        mapping = answer.tag
        if not isinstance(mapping, _Mapping):
            self._outer = answer.mapped.host
        elif mapping.step is _Step.OPENING:
            mapping.step, mapping.due = _Step.SETTLING, now + SETTLE
        elif mapping.step is _Step.SETTLING:
            mapping.mapped = answer.mapped
            mapping.step, mapping.due = _Step.IDLE, now + mapping.idle

    def _tested(self, mapping: _Mapping, datagram: bytes, source: SocketEndpoint) -> None:
        try:
            message = stun.decode(datagram)
        except WireError:
            return
        if isinstance(message, stun.Failure) and source.local == self._asker:
            self._finish(None, f"{self._server} does not answer to another port")
        elif isinstance(message, stun.Success) and source.local == mapping.local:
            mapping.survived, mapping.step = True, _Step.OVER
            self._judge()

    def poll_transmit(self) -> tuple[SocketEndpoint, bytes] | None:
        """Return the next datagram and where it goes."""
        if self._transmits:
            return self._transmits.popleft()
        item = None if self.done else self._stun.poll_transmit()
        if item is None or not isinstance(item.destination, UdpEndpoint):
            return None
        return SocketEndpoint(item.destination, item.local), item.datagram

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do; None once it is done."""
        if self.done:
            return None
        times = [mapping.due for mapping in self._mappings if mapping.step is not _Step.OVER]
        again = self._stun.next_deadline()
        return min([*times, again] if again is not None else times, default=None)

    def handle_timeout(self, now: float) -> None:
        """Go on."""
        if self.done:
            return
        self._stun.handle_timeout(now)
        while (event := self._stun.poll_event()) is not None:
            if isinstance(event, StunRefused):
                self._finish(None, f"{self._server} refuses to answer")
                return
        for mapping in self._mappings:
            if mapping.step is not _Step.OVER and mapping.due <= now:
                self._go_on(mapping, now)
        self._judge()

    def _go_on(self, mapping: _Mapping, now: float) -> None:
        if mapping.step is _Step.SETTLING and mapping.mapped is None and not mapping.asked:
            mapping.asked = 1
            mapping.due = now + OPEN_TIME
            self._stun.ask(self._server, now, tag=mapping, local=mapping.local)
        elif mapping.step is _Step.IDLE:
            mapping.step, mapping.asked = _Step.TESTING, 0
            self._test(mapping, now)
        elif mapping.step is _Step.TESTING and mapping.asked < len(QUESTIONS):
            self._test(mapping, now)
        else:  # no answer came in time
            mapping.survived = False if mapping.step is _Step.TESTING else None
            mapping.step = _Step.OVER

    def _test(self, mapping: _Mapping, now: float) -> None:
        if mapping.mapped is None or mapping.mapped.host != self._outer:
            mapping.step = _Step.OVER  # another outer address: no answer to its port can be had
            return
        datagram = stun.encode_request(mapping.transaction, response_port=mapping.mapped.port)
        self._transmits.append((SocketEndpoint(self._server, self._asker), datagram))
        mapping.asked += 1
        last = mapping.asked == len(QUESTIONS)
        wait = (
            VERDICT_AFTER - QUESTIONS[-1] if last else QUESTIONS[mapping.asked] - QUESTIONS[mapping.asked - 1]
        )
        mapping.due = now + wait

    def _judge(self) -> None:
        """Finish as soon as nothing that is still to come can change the result."""
        best: float | None = None
        for mapping in self._mappings:
            if mapping.step is not _Step.OVER:
                return
            if mapping.survived:
                best = mapping.idle
            elif mapping.survived is False:
                seconds = SHORTEST if best is None else best
                self._finish(seconds, f"a mapping was gone after {mapping.idle:.0f} s")
                return
        if best is None:
            self._finish(None, "no mapping could be tested")
        else:
            self._finish(best, f"a mapping was there after {best:.0f} s")

    def _finish(self, seconds: float | None, why: str) -> None:
        if not self.done:
            self.done = True
            self.lifetime = None if seconds is None else int(seconds)
            self.why = why
