"""Whether this node reaches anybody, for the pods that run here: proof is looked for before it is missed.

A node is cut off when it has peers and none of them was reached within `window` seconds. Proofs are what
comes back: answers to probes, by relay or direct, and handshakes. A mesh with sessions proves itself, as the
keepalives of idle paths are answered. Where half the window has passed without a proof, the peer that was
reached last is checked, and when that fails a few at a time: that one, always, and the others in turn. So
silence alone makes no verdict; silence and a check that failed does, also after the host slept.

The turn goes by the distance of node ids (exclusive or): every node begins with another peer, and who is next
to me has me next to it, so that idle nodes pair up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

CHECKS: Final = 4
"""Most peers that are checked at a time."""
CHECK_TIME: Final = 6.0
"""Seconds that a peer has to answer: a call, a handshake through the relay, and all of it tried again; less
where the window is short, so that some peers are tried within it."""
LOOK: Final = 0.5
"""Seconds between looks while proof is missing."""
NEVER: Final = float("-inf")


class Reachable(Protocol):
    """What is needed of a peer."""

    proved_at: float | None
    """When it was last reached, in seconds of `now`."""

    def check(self, now: float) -> None:
        """Have it reached again, by all that traffic would do."""


class Reach:
    """The verdict on one node, and the checks that it stands on."""

    __slots__ = (
        "_checks",
        "_failed",
        "_own",
        "_patience",
        "_since",
        "_tried",
        "cut_off",
        "deadline",
        "window",
    )

    def __init__(self, own: bytes, window: float, now: float) -> None:
        """`own`: our node id. `window`: seconds without a proof after which the node is cut off."""
        self._own = int.from_bytes(own, "big")
        self.window = window
        self._patience = min(CHECK_TIME, window / 8)
        self.cut_off = False
        self.deadline = now + window / 2
        """When `look` has something to do."""
        self._since: float | None = None
        self._failed = False
        self._checks: dict[bytes, float] = {}
        self._tried: set[bytes] = set()

    def appeared(self, now: float) -> None:
        """Note that there is a peer: from now on somebody should be reached."""
        if self._since is None:
            self._since = now
            self.deadline = now + self.window / 2

    def look(self, peers: Mapping[bytes, Reachable], heard: float | None, now: float) -> bool:
        """Check peers where proof is missing; return whether `cut_off` is another one.

        `heard`: when anybody else was heard who is as good as a peer, a stock one.
        """
        before = self.cut_off
        if not peers:
            self._since = None
            self._rest(now)
            return before
        if self._since is None:
            self._since = now
        proved = max(map(_proved, peers.values()))
        last = max(self._since, NEVER if heard is None else heard, proved)
        if now < last + self.window / 2:
            self._rest(last)
            return before
        self._check(peers, now)
        self.cut_off = self._failed and now >= last + self.window
        self.deadline = now + LOOK
        return self.cut_off is not before

    def _rest(self, last: float) -> None:
        self.cut_off = self._failed = False
        self._checks.clear()
        self._tried.clear()
        self.deadline = last + self.window / 2

    def _check(self, peers: Mapping[bytes, Reachable], now: float) -> None:
        for node_id, started in list(self._checks.items()):
            if node_id not in peers or now - started >= self._patience:
                del self._checks[node_id]
                self._failed = True
        most = CHECKS if self._failed else 1
        if len(self._checks) >= most:
            return

        def rank(node_id: bytes) -> tuple[float, int]:
            return -_proved(peers[node_id]), int.from_bytes(node_id, "big") ^ self._own

        ranked = sorted(peers, key=rank)
        if self._tried.issuperset(ranked):
            self._tried.clear()
        for node_id in [ranked[0], *(each for each in ranked if each not in self._tried)]:
            if node_id in self._checks:
                continue
            self._checks[node_id] = now
            self._tried.add(node_id)
            peers[node_id].check(now)
            if len(self._checks) >= most:
                return


def _proved(peer: Reachable) -> float:
    return NEVER if peer.proved_at is None else peer.proved_at
