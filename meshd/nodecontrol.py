"""Sealed control messages between nodes: keys per pair, replay protection, rotation of our own key.

What a stranger can cost: one keyed hash (mac1), then a look-up. X25519 happens once for each pair of control
keys, and only for a key that a verified record names; so no cookies are needed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple

from crossedge.meshd.seqwindow import SequenceWindow
from crossedge.wire.envelope import ControlKey, PairKeys, Sealed, seal
from crossedge.wire.errors import WireError
from crossedge.wire.messages import Message, decode, encode, padded

PING_SHORT: Final = 96  # bytes of the plaintext of a ping that answers one: no less than a pong has
PING_LONG: Final = 240  # of one that opens: it pays for its pong and for a short ping back
PAIRS_MAX: Final = 16_384  # as many as the directory has members
NONCE: Final = 24
KEY_LIFE: Final = 86_400.0  # seconds after which our control key is replaced
OLD_KEY_LIFE: Final = 3_600.0  # seconds for which the one before is still understood


class _Pair(NamedTuple):
    keys: PairKeys
    window: SequenceWindow


class NodeControl:
    """The control messages of one node to and from other nodes."""

    def __init__(self, key: ControlKey, random: Callable[[int], bytes], now: float) -> None:
        self.key = key
        self.dropped: Counter[str] = Counter()
        self._random = random
        self._made = now
        self._old: ControlKey | None = None
        self._pairs: dict[tuple[bytes, bytes], _Pair] = {}

    def rotate(self, key: ControlKey, now: float) -> None:
        """Use another key from now on; the one before is understood for a while."""
        self._old, self.key, self._made = self.key, key, now

    def next_rotation(self) -> float:
        """Return when the key is due to be replaced, in seconds of `now`."""
        return self._made + KEY_LIFE

    def seal(self, message: Message, other: bytes, size: int = 0) -> bytes | None:
        """Return the datagram (or the sealed body of a call) for the node with this control key.

        The plaintext is padded to at least `size` bytes.
        """
        return self._seal(padded(message, size) if size else encode(message), other)

    def _seal(self, plaintext: bytes, other: bytes) -> bytes | None:
        try:
            pair = self._pair(self.key, other)
        except WireError as error:
            self.dropped[error.reason] += 1
            return None
        return seal(plaintext, pair.keys, self._random(NONCE))

    def parse(self, datagram: bytes, now: float) -> tuple[Sealed, ControlKey] | None:
        """Return a sealed message and which of our keys it is for; None (counted) where it is for none."""
        try:
            sealed = Sealed.parse(datagram)
        except WireError as error:
            self.dropped[error.reason] += 1
            return None
        if sealed.check_mac1(self.key.public):
            return sealed, self.key
        if self._old is not None:
            if now - self._made >= OLD_KEY_LIFE:
                self._old = None
            elif sealed.check_mac1(self._old.public):
                return sealed, self._old
        self.dropped["mac1"] += 1
        return None

    def open(self, sealed: Sealed, own: ControlKey) -> Message | None:
        """Return the message of a sender that the caller knows; None (counted) where it is no good."""
        try:
            return decode(sealed.open(self._pair(own, sealed.sender).keys))
        except WireError as error:
            self.dropped[error.reason] += 1
            return None

    def fresh(self, sealed: Sealed, own: ControlKey, seq: int) -> bool:
        """Tell, once for each message that was opened, whether its number is new; else it is counted."""
        if self._pair(own, sealed.sender).window.accept(seq):
            return True
        self.dropped["replayed-control"] += 1
        return False

    def forget(self, other: bytes) -> None:
        """Forget the keys shared with a control key that is no longer in use."""
        for own, theirs in list(self._pairs):
            if theirs == other:
                del self._pairs[own, theirs]

    def _pair(self, own: ControlKey, other: bytes) -> _Pair:
        pair = self._pairs.get((own.public, other))
        if pair is None:
            if len(self._pairs) >= PAIRS_MAX:
                # Never a pair of the current key while one of an old key is left: its window guards replays.
                stale = next((name for name in self._pairs if name[0] != self.key.public), None)
                del self._pairs[stale or next(iter(self._pairs))]
            pair = self._pairs[own.public, other] = _Pair(PairKeys.derive(own, other), SequenceWindow())
        return pair
