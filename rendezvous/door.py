"""The door: which sealed messages come in, what it may cost to look at them, and how large an answer may be.

The order of work: whether the sender is known, then mac1. Who has no lease must show a cookie before any
X25519; who has one is opened with cached keys. Whatever the message, no answer to a source that showed no
cookie is larger than what it sent: a cookie reply goes out in its place. So does it where a known sender
comes from a new address: only a proven address changes a lease or a channel.

In a flood nearly all are strangers for whom there is no cookie left: they are looked at least, so that what
nodes with a lease send does not wait behind them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from crossedge.rendezvous.cookies import CookieJar
from crossedge.rendezvous.limits import Bucket, BucketTable, prefix_key
from crossedge.rendezvous.registry import Lease, Registry
from crossedge.rendezvous.settings import SourceLimits
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import MAC2, NO_MAC, SENDER, ControlKey, PairKeys, Sealed, seal, seal_cookie
from crossedge.wire.errors import WireError
from crossedge.wire.messages import NEEDS_COOKIE, Message, Register, decode, encode

TRANSMIT_QUEUE = 8192
"""Datagrams that wait for the shell; it drains them after each batch."""
REGISTER_COST = 10.0
"""Messages that a `Register` counts for: it may verify two signatures and be told to the whole network."""
PAIR_CACHE = 4096
"""Derived keys of senders without a lease that are kept."""


class Transmit(NamedTuple):
    """A datagram to send from one of our locals."""

    datagram: bytes
    destination: UdpEndpoint
    local: int


@dataclass(slots=True)
class Asker:
    """Who sent a sealed message, and from where."""

    sealed: Sealed
    pair: PairKeys
    source: UdpEndpoint
    local: int
    size: int
    """Bytes of the datagram."""
    lease: Lease | None
    proven: bool | None
    """Whether it carries a valid cookie; None until somebody asked."""


class Door:
    """Opens what comes in and seals what goes out."""

    def __init__(
        self,
        key: ControlKey,
        registry: Registry,
        limits: SourceLimits,
        random: Callable[[int], bytes],
        now: float,
    ) -> None:
        self._key = key
        self._registry = registry
        self._random = random
        self._cookies = CookieJar(random, now)
        self._pairs: OrderedDict[bytes, PairKeys] = OrderedDict()
        self._cookie_rate = BucketTable(limits.slots, limits.cookie_rate, limits.cookie_rate, random)
        self._cookie_total = Bucket(limits.cookie_total, limits.cookie_total / 5, now)
        self._stranger_rate = BucketTable(
            limits.slots, limits.stranger_rate, 2 * limits.stranger_rate, random
        )
        self._stranger_total = Bucket(limits.stranger_total, limits.stranger_total, now)
        self._node_rate = BucketTable(limits.slots, limits.node_rate, 2 * limits.node_rate, random)
        self._transmits: deque[Transmit] = deque()
        self.dropped: Counter[str] = Counter()
        self.cookies = 0
        """Cookie replies given."""
        self.agreements = 0
        """X25519 operations done."""

    def open(
        self, datagram: bytes, source: UdpEndpoint, local: int, now: float
    ) -> tuple[Asker, Message] | None:
        """Return an untrusted sealed datagram's sender and message, None where it goes no further."""
        if (
            datagram[SENDER] not in self._registry.leases
            and datagram[MAC2] == NO_MAC
            and not self._cookie_total.has(now)
        ):
            self.dropped["cookie-total"] += 1
            return None
        try:
            sealed = Sealed.parse(datagram)
        except WireError as error:
            self.dropped[error.reason] += 1
            return None
        lease = self._registry.leases.get(sealed.sender)
        proven = None
        if lease is None or lease.endpoint != source:
            proven = self._shows_cookie(sealed, source, now)
            if not proven and not self._cookie_total.has(now):
                self.dropped["cookie-total"] += 1
                return None
        if not sealed.check_mac1(self._key.public):
            self.dropped["bad-mac1"] += 1
            return None
        if proven is False:
            self._give_cookie(sealed, source, local, now)
            return None
        pair = lease.pair if lease is not None else self._pair_of_stranger(sealed.sender, source, now)
        if pair is None:
            return None
        try:
            message = decode(sealed.open(pair))
        except WireError as error:
            self.dropped[error.reason] += 1
            return None
        cost = REGISTER_COST if type(message) is Register else 1.0
        if lease is not None and not self._node_rate.take(lease.node.key, now, cost):
            self.dropped["node-rate"] += 1
            return None
        asker = Asker(sealed, pair, source, local, len(datagram), lease, proven)
        if type(message) in NEEDS_COOKIE and not self._is_proven(asker, now):
            self._give_cookie(sealed, source, local, now)
            return None
        return asker, message

    def answer(self, asker: Asker, message: Message, now: float) -> None:
        """Send an answer, or a cookie where it would be larger than what an unproven source sent."""
        datagram = seal(encode(message), asker.pair, self._random(24))
        if len(datagram) > asker.size and not self._is_proven(asker, now):
            self._give_cookie(asker.sealed, asker.source, asker.local, now)
            return
        self.transmit(datagram, asker.source, asker.local)

    def push(self, lease: Lease, message: Message) -> None:
        """Send a message that was not asked for to the proven endpoint of a lease."""
        self.transmit(seal(encode(message), lease.pair, self._random(24)), lease.endpoint, lease.local)

    def tell(self, control_key: bytes, endpoint: UdpEndpoint, local: int, message: Message) -> None:
        """Send a message to a control key without a lease: costs an X25519, so the caller paces it."""
        pair = self._pairs.get(control_key) or self._derive(control_key)
        if pair is not None:
            self.transmit(seal(encode(message), pair, self._random(24)), endpoint, local)

    def forget(self, control_key: bytes) -> None:
        """Drop the cached keys of a stranger: it has a lease now, which keeps them."""
        self._pairs.pop(control_key, None)

    def transmit(self, datagram: bytes, destination: UdpEndpoint, local: int) -> None:
        """Queue a datagram for the shell."""
        if len(self._transmits) >= TRANSMIT_QUEUE:
            self.dropped["transmit-queue"] += 1
            return
        self._transmits.append(Transmit(datagram, destination, local))

    def poll_transmit(self) -> Transmit | None:
        """Return the next datagram to send, None where there is none."""
        return self._transmits.popleft() if self._transmits else None

    def _is_proven(self, asker: Asker, now: float) -> bool:
        if asker.proven is None:
            asker.proven = self._shows_cookie(asker.sealed, asker.source, now)
        return asker.proven

    def _shows_cookie(self, sealed: Sealed, source: UdpEndpoint, now: float) -> bool:
        return sealed.has_mac2 and any(
            map(sealed.check_mac2, self._cookies.accepted(source, sealed.sender, now))
        )

    def _give_cookie(self, sealed: Sealed, source: UdpEndpoint, local: int, now: float) -> None:
        if not self._cookie_rate.take(prefix_key(source.host), now):
            self.dropped["cookie-rate"] += 1
            return
        if not self._cookie_total.take(now):
            self.dropped["cookie-total"] += 1
            return
        self.cookies += 1
        cookie = self._cookies.give(source, sealed.sender, now)
        self.transmit(seal_cookie(sealed, self._key.public, self._random(24), cookie), source, local)

    def _pair_of_stranger(self, sender: bytes, source: UdpEndpoint, now: float) -> PairKeys | None:
        # Not the X25519 alone: behind it wait the seal and two signatures.
        if not self._stranger_rate.take(prefix_key(source.host), now):
            self.dropped["stranger-rate"] += 1
            return None
        if not self._stranger_total.take(now):
            self.dropped["stranger-total"] += 1
            return None
        return self._pairs.get(sender) or self._derive(sender)

    def _derive(self, sender: bytes) -> PairKeys | None:
        self.agreements += 1
        try:
            pair = PairKeys.derive(self._key, sender)
        except WireError as error:
            self.dropped[error.reason] += 1
            return None
        self._pairs[sender] = pair
        if len(self._pairs) > PAIR_CACHE:
            self._pairs.popitem(last=False)
        return pair
