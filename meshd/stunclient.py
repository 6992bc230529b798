"""STUN Binding requests (RFC 8489): retransmission and matching, and servers asked again and again.

`StunClient` sends requests from numbered sockets and says what came back. `StunObservers` asks plain STUN
servers where they see our socket, as observers that are independent of the rendezvous.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

from crossedge.meshd.candidates import MAX_OBSERVERS, stun_observer
from crossedge.meshd.transmit import Transmit
from crossedge.wire import stun
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import WireError

RETRANSMIT: Final = (
    0.1,
    0.2,
    0.4,
    0.8,
    0.8,
    0.8,
)  # seconds until the next try; the last one: until giving up
MAX_EXCHANGES: Final = 64
REFRESH_MIN: Final = 20.0  # seconds between questions to the same observer: below what mappings live
REFRESH_SPREAD: Final = 6.0


@dataclass(frozen=True, slots=True)
class StunAnswer:
    """A success response."""

    tag: object
    local: int
    destination: UdpEndpoint
    """Where the request went."""
    source: UdpEndpoint
    """Where the response came from: another address or port if that was asked for and came through."""
    mapped: UdpEndpoint
    other: UdpEndpoint | None
    rtt: float | None
    """Seconds; None if the request was sent more than once."""


@dataclass(frozen=True, slots=True)
class StunRefused:
    """An error response: 420 where the server cannot answer from elsewhere."""

    tag: object
    local: int
    destination: UdpEndpoint
    code: int


@dataclass(frozen=True, slots=True)
class StunTimeout:
    """No response to any try."""

    tag: object
    local: int
    destination: UdpEndpoint


StunEvent: TypeAlias = StunAnswer | StunRefused | StunTimeout


@dataclass(slots=True)
class _Exchange:
    tag: object
    local: int
    destination: UdpEndpoint
    elsewhere: bool
    datagram: bytes
    sent: float
    tries: int
    due: float


class StunClient:
    """Requests under way. Core: bytes and the time in; datagrams, events and the next deadline out."""

    def __init__(self, random: Callable[[int], bytes]) -> None:
        self.dropped: Counter[str] = Counter()
        self._random = random
        self._exchanges: dict[bytes, _Exchange] = {}
        self._transmits: deque[Transmit] = deque()  # at most one for each exchange between two drains
        self._events: deque[StunEvent] = deque()  # likewise

    def __len__(self) -> int:
        return len(self._exchanges)

    def ask(
        self,
        destination: UdpEndpoint,
        now: float,
        *,
        tag: object = None,
        local: int = 0,
        change_ip: bool = False,
        change_port: bool = False,
    ) -> bool:
        """Send a Binding request from socket `local`; return False where too many are under way.

        `change_ip` and `change_port` ask for an answer from elsewhere (RFC 5780, 7.2). The answer's event
        carries `tag`.
        """
        if len(self._exchanges) >= MAX_EXCHANGES:
            self.dropped["stun-table-full"] += 1
            return False
        transaction = self._random(stun.TRANSACTION)
        datagram = stun.encode_request(transaction, change_ip, change_port)
        elsewhere = change_ip or change_port
        self._exchanges[transaction] = _Exchange(
            tag, local, destination, elsewhere, datagram, now, 1, now + RETRANSMIT[0]
        )
        self._transmits.append(Transmit(destination, datagram, None, local))
        return True

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> bool:
        """Take an untrusted STUN datagram; return whether it answers a request of ours."""
        exchange = self._exchanges.get(datagram[8 : stun.HEADER])
        if exchange is None:
            return False
        if local != exchange.local or (source != exchange.destination and not exchange.elsewhere):
            self.dropped["stun-wrong-way"] += 1
            return True
        try:
            message = stun.decode(datagram)
        except WireError as error:
            self.dropped[f"stun-{error.reason}"] += 1
            return True
        if isinstance(message, stun.Request):  # one of ours that came back
            self.dropped["stun-reflected"] += 1
            return True
        del self._exchanges[message.transaction]
        if isinstance(message, stun.Failure):
            self._events.append(StunRefused(exchange.tag, local, exchange.destination, message.code))
            return True
        rtt = now - exchange.sent if exchange.tries == 1 else None
        self._events.append(
            StunAnswer(exchange.tag, local, exchange.destination, source, message.mapped, message.other, rtt)
        )
        return True

    def poll_transmit(self) -> Transmit | None:
        """Return the next datagram to send."""
        return self._transmits.popleft() if self._transmits else None

    def poll_event(self) -> StunEvent | None:
        """Return the next thing that happened."""
        return self._events.popleft() if self._events else None

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do."""
        return min((exchange.due for exchange in self._exchanges.values()), default=None)

    def handle_timeout(self, now: float) -> None:
        """Send again what is due, give up what was tried often enough."""
        for transaction, exchange in list(self._exchanges.items()):
            if exchange.due > now:
                continue
            if exchange.tries == len(RETRANSMIT):
                del self._exchanges[transaction]
                self._events.append(StunTimeout(exchange.tag, exchange.local, exchange.destination))
                continue
            exchange.due = now + RETRANSMIT[exchange.tries]
            exchange.tries += 1
            self._transmits.append(Transmit(exchange.destination, exchange.datagram, None, exchange.local))


@dataclass(frozen=True, slots=True)
class StunObserved:
    """Where a STUN server sees our socket, told when that is new."""

    observer: bytes
    """The server's 8-byte observer id."""
    host: str
    """The server's address."""
    endpoint: UdpEndpoint


class StunObservers:
    """Plain STUN servers that are asked every 20 to 26 s. Core."""

    def __init__(self, servers: Iterable[UdpEndpoint], random: Callable[[int], bytes], now: float) -> None:
        """Ask each of `servers`, at most 8, from socket 0, beginning at once."""
        self._random = random
        self._client = StunClient(random)
        self._due = dict.fromkeys(islice(dict.fromkeys(servers), MAX_OBSERVERS), now)
        self._seen: dict[UdpEndpoint, UdpEndpoint] = {}
        self._events: deque[StunObserved] = deque()

    def receive(self, datagram: bytes, source: UdpEndpoint, now: float) -> bool:
        """Take an untrusted STUN datagram; return whether it answers a request of ours."""
        mine = self._client.receive(datagram, source, 0, now)
        for event in iter(self._client.poll_event, None):
            if isinstance(event, StunAnswer) and self._seen.get(event.destination) != event.mapped:
                self._seen[event.destination] = event.mapped
                server = event.destination
                self._events.append(StunObserved(stun_observer(server), server.host, event.mapped))
        return mine

    def refresh(self, now: float) -> None:
        """Ask all servers now: the network has changed."""
        self._due = dict.fromkeys(self._due, now)

    def poll_transmit(self) -> Transmit | None:
        """Return the next datagram to send."""
        return self._client.poll_transmit()

    def poll_event(self) -> StunObserved | None:
        """Return the next observation."""
        return self._events.popleft() if self._events else None

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do."""
        deadlines = [*self._due.values(), self._client.next_deadline()]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def handle_timeout(self, now: float) -> None:
        """Ask who is due."""
        self._client.handle_timeout(now)
        while self._client.poll_event() is not None:
            pass  # No answer: it is asked again at its time.
        for server, due in self._due.items():
            if due <= now:
                self._due[server] = now + REFRESH_MIN + REFRESH_SPREAD * self._random(1)[0] / 255
                self._client.ask(server, now)
