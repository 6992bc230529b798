"""What the node knows of latency: whom it measures, what came of it, where it sees itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from crossedge.latency.coordinates import Vivaldi
from crossedge.latency.prober import Prober
from crossedge.latency.readings import Reading
from crossedge.latency.report import MAX_PAIRS, Coordinates, Pair, PairState
from crossedge.meshd.inner import Place

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

TOLD: Final = 4  # neighbours that a peer is told of
TOLD_AGAIN: Final = 30.0  # seconds within which a peer is not told again
SILENT: Final = 12.0  # seconds without an answer, with traffic, after which a pair is unreachable
FORGET: Final = 1800.0  # seconds after which the measurement of a pair that is no target is let go


class LatencyPlane:
    """The measurements of one node."""

    def __init__(
        self,
        own: bytes,
        members: Mapping[bytes, MeshPeer],
        random: Callable[[int], bytes],
        clock: Callable[[], float],
    ) -> None:
        """`own` is our node id; `members` is the mesh's table; `clock` returns its `now`."""
        self.prober = Prober(own, random, clock())
        self.vivaldi = Vivaldi(random)
        self._members = members
        self._places: dict[bytes, Coordinates] = {}
        self._told: dict[bytes, float] = {}
        self._clock = clock

    # --- Measuring --------------------------------------------------------------------------------------

    def next_deadline(self) -> float:
        """Return when `handle_timeout` has something to do."""
        return self.prober.next_deadline()

    def handle_timeout(self, now: float) -> None:
        """Begin the measurements that are due."""
        self.prober.refresh(self.vivaldi.place, now)
        while (node_id := self.prober.take(now)) is not None:
            peer = self._members.get(node_id)
            if peer is None:
                self.prober.remove(node_id)
            elif self._fresh(peer, now):
                self._answered(peer, now)
            else:
                peer.measuring.begin(now)

    def _fresh(self, peer: MeshPeer, now: float) -> bool:
        """Tell whether the pair was measured lately, by its traffic or because the peer asked for it."""
        updated = None if peer.reading is None else peer.reading.updated
        return updated is not None and now - updated < self.prober.interval / 2 and not peer.lively(now)

    def due(self, peer: MeshPeer, now: float) -> bool:
        """Tell whether the pair should be measured while its session is there."""
        return not peer.lively(now) and not self._fresh(peer, now)

    def measured(self, peer: MeshPeer, *, answered: bool) -> None:
        """Take note that a measurement has ended."""
        now = self._clock()
        if answered:
            self._answered(peer, now)
        elif self.prober.failed(peer.node_id, now):
            if peer.reading is None:
                peer.reading = Reading()
            peer.reading.silent(now)

    def asked(self, scheduler: str, nodes: Sequence[bytes]) -> int:
        """Measure the members that a scheduler names, too; return how many it named that are ignored."""
        return self.prober.ask(scheduler, nodes, self._clock())

    def moved(self, now: float) -> None:
        """Forget every distance, as this node is elsewhere now, and measure again."""
        for peer in self._members.values():
            if peer.reading is not None:
                peer.reading.restart()
        self.prober.restart(now)

    def _answered(self, peer: MeshPeer, now: float) -> None:
        self.prober.answered(peer.node_id, now)
        reading, place = peer.reading, self._places.get(peer.node_id)
        if reading is None:
            return
        best = reading.best
        least = None if best is None else best.minimum(now)
        if place is not None and least is not None:
            self.vivaldi.update(least * 1000, place)

    # --- Places -----------------------------------------------------------------------------------------

    def tell_place(self, peer: MeshPeer, now: float) -> None:
        """Tell the peer our coordinates and a few neighbours, unless it heard them a moment ago."""
        told = self._told.get(peer.node_id)
        if told is not None and now - told < TOLD_AGAIN:
            return
        self._told[peer.node_id] = now
        here = self.vivaldi.place
        near = sorted(self._places.items(), key=lambda item: math.dist(here.point, item[1].point))
        others = tuple((node, place) for node, place in near if node != peer.node_id)[:TOLD]
        peer.talk.say(Place(here, others).encode(), now)

    def place_heard(self, peer: MeshPeer, place: Place, now: float) -> None:
        """Take what a peer says of itself, and, for the choice of whom to measure, of others."""
        self._places[peer.node_id] = place.own
        self.prober.hear(peer.node_id, place.own)
        for node, where in place.neighbours:
            if node not in self._places:
                self.prober.hear(node, where)
        self.tell_place(peer, now)

    # --- What there is ----------------------------------------------------------------------------------

    def removed(self, node_id: bytes) -> None:
        """Let go of a member."""
        self.prober.remove(node_id)
        self._places.pop(node_id, None)
        self._told.pop(node_id, None)

    def pair(self, peer: MeshPeer, now: float) -> Pair | None:
        """Return what is known of a pair, None where it is unmeasured."""
        reading = peer.reading
        if reading is None:
            return None
        pair = reading.pair(peer.node_id, now)
        if pair is None or not pair.state.measured:
            return pair
        if peer.lively(now) and pair.age > SILENT:
            return Pair(peer.node_id, PairState.UNREACHABLE, None, None, None, pair.loss, pair.samples)
        if pair.age > FORGET and peer.node_id not in self.prober.targets:
            return None
        return pair

    def pairs(self, now: float) -> list[Pair]:
        """Return everything that there is to report, at most 1,024 pairs, the youngest."""
        found = [self.pair(peer, now) for peer in self._members.values()]
        known = [pair for pair in found if pair is not None]
        return sorted(known, key=lambda pair: pair.age)[:MAX_PAIRS]

    def rows(self, now: float) -> list[dict[str, Any]]:
        """Return what `crossedge latency` shows: one row per member, by name."""
        rows = []
        for peer in self._members.values():
            pair = self.pair(peer, now)
            best = (
                None if peer.reading is None or pair is None or not pair.state.measured else peer.reading.best
            )
            shown = {
                "name": peer.name,
                "state": "unmeasured" if pair is None else pair.state.name.lower(),
                "rtt_min_ms": None if pair is None else _ms(pair.minimum),
                "rtt_ms": None if pair is None else _ms(pair.smoothed),
                "rtt_latest_ms": None if best is None else _ms(best.latest),
                "jitter_ms": None if pair is None else _ms(pair.deviation),
                "loss_percent": None if pair is None or pair.loss is None else round(pair.loss * 100, 1),
                "age_s": None if pair is None else round(pair.age, 1),
                "answers": 0 if best is None else best.answers,
                "probed": peer.node_id in self.prober.targets,
            }
            rows.append(shown)
        return sorted(rows, key=lambda row: str(row["name"]))


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
