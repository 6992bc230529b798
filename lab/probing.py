"""Many nodes that choose whom to measure, in virtual time: what it costs and which pairs come to be known.

The prober and the coordinates are the daemon's own cores; a measurement itself is an RTT from a table and a
number of bytes at each end, which whole nodes in the in-memory internet were seen to need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2s
from heapq import heappop, heappush, nsmallest
from typing import Final

from crossedge.lab.chance import Chance
from crossedge.latency.coordinates import Vivaldi
from crossedge.latency.prober import Prober
from crossedge.latency.report import Coordinates

MEASURE_TIME: Final = 2.5  # seconds that a measurement takes
FAIL_TIME: Final = 8.0  # seconds until one that nobody answers is given up
TOLD: Final = 4  # neighbours that each end tells the other of


@dataclass(slots=True)
class SimProber:
    """One node."""

    prober: Prober
    vivaldi: Vivaldi
    spent: float = 0.0
    """Bytes sent and received."""
    most_in_flight: int = 0
    measured: dict[int, float] = field(default_factory=dict)
    """Peer's number to when the pair was measured last."""
    silent: set[int] = field(default_factory=set)
    """Peers that count as unreachable."""
    places: dict[int, Coordinates] = field(default_factory=dict)


class ProbingSim:
    """A mesh of probers."""

    def __init__(
        self,
        rtt: Callable[[int, int], float | None],
        count: int,
        cost: Callable[[int, int], tuple[float, float]],
        seed: int = 1,
    ) -> None:
        """Start `count` nodes that all know each other.

        Args:
            rtt: returns milliseconds from one number to another, None where nothing answers.
            count: how many nodes there are.
            cost: returns the bytes that a measurement costs who began it and the other end.
            seed: of all that is random.
        """
        self.now = 0.0
        self._rtt = rtt
        self._cost = cost
        chance = Chance(seed)
        self.ids = [blake2s(number.to_bytes(4, "big"), digest_size=16).digest() for number in range(count)]
        self._numbers = {node: number for number, node in enumerate(self.ids)}
        self.nodes: list[SimProber] = []
        for number, own in enumerate(self.ids):
            token = chance.fork(f"{number}").token
            node = SimProber(Prober(own, token, 0.0), Vivaldi(token))
            for peer in self.ids:
                node.prober.add(peer)
            self.nodes.append(node)
        self._events: list[tuple[float, int, int, int]] = []
        self._serial = 0
        for number in range(count):
            self._at(0.0, number, -1)

    def _at(self, when: float, number: int, peer: int) -> None:
        self._serial += 1
        heappush(self._events, (when, self._serial, number, peer))

    def run(self, seconds: float) -> None:
        """Let so much time pass."""
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.now, _, number, peer = heappop(self._events)
            if peer < 0:
                self._wake(number)
            else:
                self._ended(number, peer)
        self.now = end

    def _wake(self, number: int) -> None:
        node, now = self.nodes[number], self.now
        node.prober.refresh(node.vivaldi.place, now)
        interval = node.prober.interval
        while (taken := node.prober.take(now)) is not None:
            peer = self._numbers[taken]
            if now - node.measured.get(peer, float("-inf")) < interval / 2:
                node.prober.answered(taken, now)
                continue
            takes = FAIL_TIME if self._rtt(number, peer) is None else MEASURE_TIME
            self._at(now + takes, number, peer)
        node.most_in_flight = max(node.most_in_flight, node.prober.in_flight)
        self._at(max(node.prober.next_deadline(), now + 0.01), number, -1)

    def _ended(self, number: int, peer: int) -> None:
        mine, other = self._cost(number, peer)
        self.nodes[number].spent += mine
        self.nodes[peer].spent += other
        rtt = self._rtt(number, peer)
        if rtt is None:
            if self.nodes[number].prober.failed(self.ids[peer], self.now):
                self.nodes[number].silent.add(peer)
            return
        places = self.nodes[number].vivaldi.place, self.nodes[peer].vivaldi.place
        for here, there, place in ((number, peer, places[1]), (peer, number, places[0])):
            node = self.nodes[here]
            node.measured[there] = self.now
            node.silent.discard(there)
            node.prober.answered(self.ids[there], self.now)
            node.vivaldi.update(rtt, place)
            node.places[there] = place
            node.prober.hear(self.ids[there], place)
            far = self.nodes[there].places
            for near in nsmallest(TOLD, far, key=lambda known: math.dist(place.point, far[known].point)):
                if near != here and near not in node.places:
                    node.prober.hear(self.ids[near], far[near])

    def pairs(self) -> list[tuple[int, int]]:
        """Return (node, peer) of everything that was measured."""
        return [(number, peer) for number, node in enumerate(self.nodes) for peer in node.measured]

    def silences(self) -> list[tuple[int, int]]:
        """Return (node, peer) of everything that counts as unreachable."""
        return [(number, peer) for number, node in enumerate(self.nodes) for peer in node.silent]


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which this share of all values is."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]
