"""Whom to measure, and when: what is spent on pairs without traffic has a bound, whatever the mesh's size.

All pairs while the mesh is small. Beyond `ALL_PAIRS` members a node chooses `CHOSEN` by rendezvous hashing
(Thaler and Ravishankar, 1998): for each of so many slots the member whose hash with our own id is the least,
so members that come and go change nothing else; each slot draws anew every `ROTATION`. To them come the
`NEAR` members that are nearest by coordinates. A session serves both of its ends, so a pair is due at its two
ends at different times and costs one session, not two.

A scheduler that sees all groups may name a few members more (`ask`): at most `MEDOIDS` in all, let go when it
has not named them for `ASKED_FOR` seconds.

The interval grows with the number of pairs that a node takes part in, so the bytes per second do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2s
from heapq import heapify, heappop, heappush, nsmallest
from typing import Final

from crossedge.latency.report import Coordinates

ALL_PAIRS: Final = 63  # other members up to which every pair is measured
CHOSEN: Final = 16
NEAR: Final = 4
MEDOIDS: Final = 2  # at a scheduler's wish
ASKERS: Final = 4  # schedulers whose wishes are kept
ASKED_FOR: Final = 3600.0  # seconds; a scheduler repeats its wish with every full report
ROTATION: Final = 6 * 3600.0  # seconds for which a slot keeps its draw
IN_FLIGHT: Final = 32  # bursts at a time
PACE: Final = 0.2  # seconds between the starts of two bursts
INTERVAL_PER_PAIR: Final = 10.0  # seconds, times the pairs of a node: what keeps the cost under its bound
INTERVAL_MIN: Final = 60.0
INTERVAL_CHOSEN: Final = 720.0  # seconds beyond `ALL_PAIRS`: some are chosen by half as many again as others
JITTER: Final = 0.2  # the part of an interval that is random
FIRST_WITHIN: Final = 1.0  # seconds, times the targets: when a pair that is new is measured
FIRST_MAX: Final = 60.0
TRIES: Final = 2  # failures in a row that make a pair unreachable
RETRY: Final = (15.0, 30.0)  # seconds after a first failure
PLACES_MAX: Final = 256  # members whose place is remembered
UNDRAWN: Final = -1
NEAR_AGAIN: Final = 600.0  # seconds between choices of the nearest
NEARER: Final = 0.7  # of the distance of one that is measured already, at which another takes its place


@dataclass(slots=True)
class _Target:
    due: float
    tries: int = 0
    busy: bool = False


@dataclass(slots=True)
class _Slot:
    draw: int
    score: bytes
    winner: bytes | None


class Prober:
    """The measurements of one node."""

    def __init__(self, own: bytes, random: Callable[[int], bytes], now: float) -> None:
        """`own` is our node id; `random` returns that many random bytes."""
        self._own = own
        self._random = random
        self._members: dict[bytes, None] = {}
        self._places: dict[bytes, Coordinates] = {}
        self._slots = [_Slot(UNDRAWN, b"", None) for _ in range(CHOSEN)]
        self._near: list[bytes] = []
        self._near_at = now
        self._asked: dict[str, tuple[float, tuple[bytes, ...]]] = {}
        self._offset = self._share() * ROTATION
        self._targets: dict[bytes, _Target] = {}
        self._heap: list[tuple[float, bytes]] = []
        self._stale = False
        self._next_start = now
        self.in_flight = 0
        """Bursts that run now."""

    def _share(self) -> float:
        return int.from_bytes(self._random(4), "big") / 2**32

    # --- Whom -------------------------------------------------------------------------------------------

    @property
    def targets(self) -> frozenset[bytes]:
        """The members that are measured from here."""
        return frozenset(self._targets)

    @property
    def interval(self) -> float:
        """Seconds between measurements of a pair."""
        if len(self._members) > ALL_PAIRS:
            return INTERVAL_CHOSEN
        return max(INTERVAL_PER_PAIR * len(self._members), INTERVAL_MIN)

    def add(self, peer: bytes) -> None:
        """Take a new member."""
        if peer in self._members or peer == self._own:
            return
        self._members[peer] = None
        for number, slot in enumerate(self._slots):
            if slot.draw == UNDRAWN:
                break
            score = self._scorer(number, slot.draw)(peer)
            if slot.winner is None or score < slot.score:
                slot.winner, slot.score = peer, score
        self._stale = True

    def remove(self, peer: bytes) -> None:
        """Let go of a member."""
        if peer not in self._members:
            return
        del self._members[peer]
        self._places.pop(peer, None)
        self._near = [near for near in self._near if near != peer]
        for number, slot in enumerate(self._slots):
            if slot.winner == peer:
                self._draw(number, slot.draw)
        self._stale = True

    def hear(self, peer: bytes, place: Coordinates) -> None:
        """Remember where a member is said to be; who is nothing of ours is ignored."""
        if peer not in self._members:
            return
        self._places.pop(peer, None)
        self._places[peer] = place
        if len(self._places) > PLACES_MAX:
            del self._places[next(iter(self._places))]

    def ask(self, asker: str, peers: Iterable[bytes], now: float) -> int:
        """Measure these members, too, instead of those that the same asker named before.

        Return how many were ignored: who is no member, or one too many.
        """
        named = list(peers)
        members = dict.fromkeys(peer for peer in named if peer in self._members)
        taken = tuple(members)[:MEDOIDS]
        self._asked.pop(asker, None)
        if taken:
            self._asked[asker] = now + ASKED_FOR, taken
            if len(self._asked) > ASKERS:
                del self._asked[next(iter(self._asked))]
        self._stale = True
        return len(named) - len(taken)

    def _medoids(self) -> set[bytes]:
        named = dict.fromkeys(peer for _, peers in self._asked.values() for peer in peers)
        return set([peer for peer in named if peer in self._members][:MEDOIDS])

    def _from(self, here: Coordinates, peer: bytes) -> float:
        """Return how far a member is, heights apart: else all would choose the few with the best access."""
        return math.dist(here.point, self._places[peer].point) * (NEARER if peer in self._near else 1.0)

    def _scorer(self, slot: int, draw: int) -> Callable[[bytes], bytes]:
        keyed = blake2s(
            self._own + slot.to_bytes(1, "big") + draw.to_bytes(8, "big"), digest_size=8, person=b"probe"
        )

        def score(peer: bytes) -> bytes:
            state = keyed.copy()
            state.update(peer)
            return state.digest()

        return score

    def _draw(self, number: int, draw: int) -> None:
        score_of = self._scorer(number, draw)
        scored = ((score_of(peer), peer) for peer in self._members)
        score, winner = min(scored, default=(b"", None))
        self._slots[number] = _Slot(draw, score, winner)

    def refresh(self, here: Coordinates, now: float) -> None:
        """Choose anew where it is time to; `here` is where we are."""
        for number, slot in enumerate(self._slots):
            draw = int((now + self._offset) / ROTATION + number / CHOSEN)
            if draw != slot.draw:
                self._draw(number, draw)
                self._stale = True
        if now - self._near_at >= NEAR_AGAIN:
            self._near_at = now
            near = nsmallest(NEAR, self._places, key=lambda peer: self._from(here, peer))
            self._stale |= set(near) != set(self._near)
            self._near = near
        for asker in [asker for asker, (until, _) in self._asked.items() if now >= until]:
            del self._asked[asker]
            self._stale = True
        if self._stale:
            self._stale = False
            self._retarget(now)

    def _retarget(self, now: float) -> None:
        if len(self._members) <= ALL_PAIRS:
            wanted = set(self._members)
        else:
            wanted = {slot.winner for slot in self._slots if slot.winner is not None} | set(self._near)
            wanted |= self._medoids()
        for peer in self._targets.keys() - wanted:
            if self._targets.pop(peer).busy:
                self.in_flight -= 1
        fresh = wanted - self._targets.keys()
        span = min(FIRST_WITHIN * len(wanted), FIRST_MAX)
        for peer in sorted(fresh):
            self._targets[peer] = _Target(now)
            self._set(peer, now + span * self._share())

    # --- When -------------------------------------------------------------------------------------------

    def _set(self, peer: bytes, due: float) -> None:
        self._targets[peer].due = due
        heappush(self._heap, (due, peer))
        if len(self._heap) > 4 * len(self._targets) + 64:
            self._heap = [(target.due, peer) for peer, target in self._targets.items() if not target.busy]
            heapify(self._heap)

    def _first(self) -> bytes | None:
        while self._heap:
            due, peer = self._heap[0]
            target = self._targets.get(peer)
            if target is not None and not target.busy and target.due == due:
                return peer
            heappop(self._heap)
        return None

    def take(self, now: float) -> bytes | None:
        """Return a member to be measured now, or None; `answered` or `failed` must follow."""
        peer = self._first()
        if peer is None or self.in_flight >= IN_FLIGHT:
            return None
        target = self._targets[peer]
        if now < target.due or now < self._next_start:
            return None
        target.busy = True
        self.in_flight += 1
        self._next_start = now + PACE * (0.5 + self._share())
        heappop(self._heap)
        return peer

    def answered(self, peer: bytes, now: float) -> None:
        """Note that a pair was measured, whoever began."""
        target = self._targets.get(peer)
        if target is None:
            return
        self._idle(target)
        target.tries = 0
        self._set(peer, now + self.interval * (1.0 - JITTER * self._share()))

    def failed(self, peer: bytes, now: float) -> bool:
        """Note that nothing answered; True where the pair counts as unreachable from now on."""
        target = self._targets.get(peer)
        if target is None:
            return False
        self._idle(target)
        target.tries += 1
        if target.tries < TRIES:
            self._set(peer, now + RETRY[0] + (RETRY[1] - RETRY[0]) * self._share())
            return False
        self._set(peer, now + self.interval * (1.0 - JITTER * self._share()))
        return True

    def _idle(self, target: _Target) -> None:
        if target.busy:
            target.busy = False
            self.in_flight -= 1

    def restart(self, now: float) -> None:
        """Measure every pair soon: this node is elsewhere now."""
        span = min(FIRST_WITHIN * len(self._targets), FIRST_MAX)
        for peer, target in self._targets.items():
            target.tries = 0
            if not target.busy:
                self._set(peer, now + span * self._share())

    def next_deadline(self) -> float:
        """Return when `refresh` and `take` have something to do."""
        again = self._near_at + NEAR_AGAIN
        peer = self._first()
        if peer is None or self.in_flight >= IN_FLIGHT:
            return again
        return min(again, max(self._targets[peer].due, self._next_start))
