"""The door for handshake messages from anywhere: MACs, load, rate limits, then the session they belong to.

What an unknown sender can cost is small and bounded: one keyed hash for a message without a valid mac1, and
no reply; under load one more and a cookie reply, which is smaller than the message. X25519 comes after that.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable

from crossedge.meshd.constants import (
    LOAD_BURST,
    LOAD_RATE,
    LOAD_TIME,
    SOURCE_BURST,
    SOURCE_RATE,
    SOURCES_MAX,
    TRANSPORT_OVERHEAD,
    MessageType,
)
from crossedge.meshd.device import Device
from crossedge.meshd.keypair import Keypair, open_transport
from crossedge.meshd.noise import NoiseError, Responder
from crossedge.meshd.session import Session
from crossedge.meshd.wireguard import (
    INITIATION_NOISE,
    MacChecker,
    handshake_type,
    receiver_index,
    sender_index,
)
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, pack_address, remote_of

REPLIES_MAX = 256


class SourceLimits:
    """A token bucket per source, in a table of bounded size that refuses new sources when it is full."""

    __slots__ = ("_buckets", "_swept")

    def __init__(self) -> None:
        self._buckets: dict[Hashable, tuple[float, float]] = {}  # tokens, when
        self._swept = float("-inf")

    def allow(self, source: Hashable, now: float) -> bool:
        """Take one token of a source; False where it has none."""
        if now - self._swept >= SOURCE_BURST / SOURCE_RATE:
            self._sweep(now)
        tokens, when = self._buckets.get(source, (SOURCE_BURST, now))
        if source not in self._buckets and len(self._buckets) >= SOURCES_MAX:
            return False
        tokens = min(SOURCE_BURST, tokens + (now - when) * SOURCE_RATE)
        allowed = tokens >= 1.0
        self._buckets[source] = (tokens - 1.0 if allowed else tokens, now)
        return allowed

    def _sweep(self, now: float) -> None:
        """Forget the sources whose buckets are full again."""
        self._swept = now
        full = SOURCE_BURST / SOURCE_RATE
        self._buckets = {source: bucket for source, bucket in self._buckets.items() if now - bucket[1] < full}


class Handshakes:
    """Everything that WireGuard does before a session is known. Replies come out of `poll_transmit`."""

    __slots__ = (
        "_checker",
        "_limits",
        "_load_ends",
        "_load_tokens",
        "_load_when",
        "_lookup",
        "_replies",
        "device",
    )

    def __init__(self, device: Device, lookup: Callable[[bytes], Session | None]) -> None:
        """Find the session of a peer by its static public key with `lookup`; None refuses the peer.

        `lookup` runs before the initiation is proven to be the peer's: it must change nothing that matters.
        """
        self.device = device
        self._lookup = lookup
        self._checker = MacChecker(device.static.public, device.random)
        self._limits = SourceLimits()
        self._load_tokens = LOAD_BURST
        self._load_when = float("-inf")
        self._load_ends = float("-inf")
        self._replies: deque[tuple[bytes, Endpoint]] = deque()

    @property
    def dropped(self) -> Counter[str]:
        """What was dropped, by reason; shared by all sessions of the device."""
        return self.device.dropped

    def receive(self, datagram: bytes, source: Endpoint, now: float) -> Session | None:
        """Take an initiation, a response or a cookie reply.

        Returns the session whose peer wrote this datagram: an initiation that was answered, or the response.
        Else None, and the reason was counted. A response proves that the peer is at `source` now; an
        initiation may be a replay from before our start, so on its own it moves no path of a mesh.
        """
        match handshake_type(datagram):
            case MessageType.INITIATION:
                return self._initiation(datagram, source, now)
            case MessageType.RESPONSE:
                return self._response(datagram, source, now)
            case MessageType.COOKIE:
                self._cookie(datagram, now)
            case _:
                self.dropped["malformed"] += 1
        return None

    def open_transport(self, datagram: bytes, now: float) -> tuple[Session, Keypair, bytes] | None:
        """Open one transport message and follow all rules of its arrival; None (counted) where it is no good.

        The plaintext is empty for a keepalive and may end with padding zeros. For control use; the data plane
        opens its trains itself.
        """
        if len(datagram) < TRANSPORT_OVERHEAD or datagram[:4] != b"\4\0\0\0":
            self.dropped["malformed"] += 1
            return None
        found = self.device.indices.get(receiver_index(datagram))
        if found is None:
            self.dropped["unknown-index"] += 1
            return None
        session, keypair = found
        if not keypair.alive(now):
            self.dropped["expired"] += 1
            return None
        plaintext = open_transport(keypair, datagram)
        if plaintext is None:
            self.dropped["transport"] += 1
            return None
        session.data_received(now, len(plaintext), keypair)
        return session, keypair, plaintext

    def poll_transmit(self) -> tuple[bytes, Endpoint] | None:
        """Return the next response or cookie reply and the source it answers, or None."""
        return self._replies.popleft() if self._replies else None

    def under_load(self, now: float) -> bool:
        """Tell whether only senders with a cookie are heard."""
        return now < self._load_ends

    def _initiation(self, datagram: bytes, source: Endpoint, now: float) -> Session | None:
        if not self._admit(datagram, source, now):
            return None
        responder = Responder(self.device.static)
        try:
            session = self._lookup(responder.read_static(datagram[INITIATION_NOISE]))
            if session is None:
                self.dropped["unknown-peer"] += 1
                return None
            timestamp = responder.read_payload(session.static_static)
            response = session.answer(responder, timestamp, sender_index(datagram), now)
        except NoiseError:
            self.dropped["forged-initiation"] += 1
            return None
        if response is None:
            return None
        self._reply(response, source)
        return session

    def _response(self, datagram: bytes, source: Endpoint, now: float) -> Session | None:
        session = self.device.waiting.get(receiver_index(datagram))
        if session is None:
            self.dropped["unknown-index"] += 1
            return None
        if not self._admit(datagram, source, now) or not session.take_response(datagram, now):
            return None
        return session

    def _cookie(self, datagram: bytes, now: float) -> None:
        index = receiver_index(datagram)
        session = self.device.waiting.get(index)
        if session is None and index in self.device.indices:
            session = self.device.indices[index][0]
        if session is None:
            self.dropped["unknown-index"] += 1
        else:
            session.take_cookie(datagram, now)

    def _admit(self, datagram: bytes, source: Endpoint, now: float) -> bool:
        """Check the MACs; under load answer what has no valid mac2 with a cookie, and limit the rest."""
        if not self._checker.mac1_holds(datagram):
            self.dropped["mac1"] += 1
            return False
        self._count_load(now)
        if not self.under_load(now):
            return True
        packed = _source_bytes(source)
        if not self._checker.mac2_holds(datagram, packed, now):
            self.dropped["no-cookie"] += 1
            self._reply(self._checker.cookie_reply(datagram, packed, now), source)
            return False
        if not self._limits.allow(_source_group(source), now):
            self.dropped["source-rate"] += 1
            return False
        return True

    def _count_load(self, now: float) -> None:
        self._load_tokens = min(LOAD_BURST, self._load_tokens + (now - self._load_when) * LOAD_RATE)
        self._load_when = now
        if self._load_tokens < 1.0:
            self._load_ends = now + LOAD_TIME
        else:
            self._load_tokens -= 1.0

    def _reply(self, datagram: bytes, source: Endpoint) -> None:
        if len(self._replies) >= REPLIES_MAX:
            self.dropped["replies-full"] += 1
            return
        self._replies.append((datagram, source))


def _source_bytes(source: Endpoint) -> bytes:
    """Return what a cookie is bound to: address and port, of a relay channel its server's and its number."""
    if isinstance(source, RelayEndpoint):
        server, channel = source
        return pack_address(server.host) + server.port.to_bytes(2, "big") + channel.to_bytes(8, "big")
    host, port = remote_of(source)
    return pack_address(host) + port.to_bytes(2, "big")


def _source_group(source: Endpoint) -> bytes:
    """Return what is limited as one source: an IPv4 address, an IPv6 /64, a relay channel."""
    if isinstance(source, RelayEndpoint):
        return _source_bytes(source)
    return pack_address(remote_of(source).host)[:8]
