"""Sealed questions to one rendezvous and its sealed answers: keys, cookie, retries. Not what they mean."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any, Final

from crossedge.meshd.client_requests import MAX_CHALLENGES, Make, Request, Requests, RoundTrip
from crossedge.meshd.transmit import Transmit
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import (
    ControlKey,
    CookieReply,
    PairKeys,
    Sealed,
    is_cookie_reply,
    mac1_of,
    seal,
)
from crossedge.wire.errors import WireError
from crossedge.wire.messages import Error, Message, Page, decode, encode

COOKIE_TIME: Final = 120.0  # seconds for which a cookie is used (WireGuard paper, 5.4.7)
MAX_QUEUE: Final = 1024  # datagrams between two drains


class SealedChannel:
    """The way to one rendezvous. Core.

    `on_message(request or None, message, now)` gets what is authentic: the request that it answers, None for
    what the rendezvous sends by itself. `on_challenge(request, now)` is asked when a request got a cookie
    instead of an answer; True means that it was dealt with, else the request is sent again at once.
    """

    def __init__(
        self,
        public_key: bytes,
        endpoint: UdpEndpoint,
        control_key: ControlKey,
        random: Callable[[int], bytes],
        on_message: Callable[[Request | None, Message, float], None],
        on_challenge: Callable[[Request, float], bool],
    ) -> None:
        self.public_key = public_key
        self.endpoint = endpoint
        self.round_trip = RoundTrip()
        self.requests = Requests(int.from_bytes(random(4), "big"))
        self.last_heard: float | None = None
        self.dropped: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self._random = random
        self._on_message = on_message
        self._on_challenge = on_challenge
        self._pairs = [PairKeys.derive(control_key, public_key)]
        self._cookie: tuple[bytes, float] | None = None
        self._transmits: deque[Transmit] = deque()

    @property
    def control_key(self) -> bytes:
        """Our public control key in use."""
        return self._pairs[0].own

    def set_endpoint(self, endpoint: UdpEndpoint) -> None:
        """Send to another address from now on."""
        self.endpoint = endpoint
        self._cookie = None

    def set_control_key(self, control_key: ControlKey) -> None:
        """Seal with another key from now on; what was sealed for the one before is still opened."""
        self._pairs = [PairKeys.derive(control_key, self.public_key), self._pairs[0]]
        self._cookie = None

    def ask(
        self,
        question: type[Message],
        make: Make,
        answer: type[Message],
        now: float,
        *,
        tries: int,
        interval: Callable[[int], float] | None = None,
        context: Any = None,
    ) -> Request | None:
        """Send a new question; None, and counted, where too many are outstanding."""
        request = self.requests.add(
            question, make, answer, tries, interval or self.round_trip.timeout, context
        )
        if request is None:
            self.dropped["too-many-requests"] += 1
            return None
        self.send(request, now)
        return request

    def send(self, request: Request, now: float) -> None:
        """Send a question, for the first time or again, with the cookie that we may have."""
        message = request.make(request.id, now)
        if self._cookie is not None and now - self._cookie[1] >= COOKIE_TIME:
            self._cookie = None
        cookie = None if self._cookie is None else self._cookie[0]
        datagram = seal(encode(message), self._pairs[0], self._random(24), cookie)
        request.remember(mac1_of(datagram), now)
        if len(self._transmits) >= MAX_QUEUE:
            self.dropped["transmit-queue"] += 1
            return
        self.sent[request.question.__name__] += 1
        self._transmits.append(Transmit(self.endpoint, datagram))

    def poll_transmit(self) -> Transmit | None:
        """Return the next datagram to send."""
        return self._transmits.popleft() if self._transmits else None

    def receive(self, datagram: bytes, now: float) -> bool:
        """Take an untrusted control datagram (CE 01); return whether it is from this rendezvous."""
        try:
            if is_cookie_reply(datagram):
                return self._receive_cookie(datagram, now)
            if datagram[4:36] != self.public_key:
                return False
            message = self._open(datagram)
        except WireError as error:
            self.dropped[error.reason] += 1
            return True
        self.last_heard = now
        if not hasattr(message, "id"):
            self._on_message(None, message, now)
            return True
        request = self.requests.get(message.id)
        if request is None or not isinstance(message, (request.answer, Error)):
            self.dropped["unasked"] += 1
            return True
        if request.sent == 1 and not isinstance(message, Page):  # pages come many for one question
            self.round_trip.sample(now - request.sent_at)
        self._on_message(request, message, now)
        return True

    def _open(self, datagram: bytes) -> Message:
        sealed = Sealed.parse(datagram)
        pair = next((pair for pair in self._pairs if sealed.check_mac1(pair.own)), None)
        if pair is None:
            raise WireError("bad-mac1")
        return decode(sealed.open(pair))

    def _receive_cookie(self, datagram: bytes, now: float) -> bool:
        reply = CookieReply.parse(datagram)
        found = self.requests.take_mac(reply.mac1)
        if found is None:
            return False
        request, sent_at = found
        self._cookie = reply.open(self.public_key), now
        self.round_trip.sample(now - sent_at)
        request.challenges += 1
        if request.challenges > MAX_CHALLENGES:
            self.dropped["challenge-loop"] += 1
        elif not self._on_challenge(request, now):
            request.sent = 0
            self.send(request, now)
        return True
