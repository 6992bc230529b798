"""Network coordinates of one node, from its own measurements: Vivaldi with heights.

Dabek, Cox, Kaashoek, Morris: Vivaldi, a decentralized network coordinate system (SIGCOMM 2004), with its
adaptive timestep. A node believes its own RTTs and nobody's coordinates: what a peer says of itself moves us
by a bounded step, the less the worse it fits, so that liars cost accuracy and not the whole map.

All times are milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from crossedge.latency.report import DIMENSIONS, ERROR_MAX, RTT_MAX, Coordinates

CE: Final = 0.25  # Vivaldi, section 3.3: weight of a sample in our error
CC: Final = 0.25  # and in our place
HEIGHT_MIN: Final = 0.01  # ms
ERROR_MIN: Final = 0.05  # what a peer's claimed error counts for at least: nobody is certain
STEP_MAX: Final = 50.0  # ms that one sample may move us
MISFIT: Final = 1.0  # relative error from which on a sample counts less, for one who is certain of his place
MISFIT_UNCERTAIN: Final = 8.0  # and more by so much for each unit of our own error
TOGETHER: Final = 1e-6  # ms: closer points have no direction, so one is drawn


def distance(a: Coordinates, b: Coordinates) -> float:
    """Return the RTT between two places in milliseconds."""
    return math.dist(a.point, b.point) + a.height + b.height


class Vivaldi:
    """Where this node is."""

    __slots__ = ("_random", "place", "samples")

    def __init__(self, random: Callable[[int], bytes]) -> None:
        """`random` returns that many random bytes; it draws the direction where two places coincide."""
        self._random = random
        self.place = Coordinates((0.0,) * DIMENSIONS, HEIGHT_MIN, ERROR_MAX)
        self.samples = 0
        """How many measurements it is made of."""

    def update(self, rtt: float, peer: Coordinates) -> None:
        """Move by one measurement to a peer that says it is there; what is no RTT is ignored."""
        if not 0.0 < rtt <= RTT_MAX * 1000:
            return
        here = self.place
        apart = [mine - other for mine, other in zip(here.point, peer.point, strict=True)]
        flat = math.hypot(*apart)
        estimate = flat + here.height + peer.height
        error = abs(estimate - rtt) / rtt
        weight = here.error / (here.error + max(peer.error, ERROR_MIN))
        limit = MISFIT + MISFIT_UNCERTAIN * here.error
        if error > limit:
            weight *= (limit / error) ** 2  # redescending: what fits worst moves us least
        certain = min(error, ERROR_MAX) * CE * weight + here.error * (1.0 - CE * weight)
        step = max(-STEP_MAX, min(STEP_MAX, CC * weight * (rtt - estimate)))
        if flat < TOGETHER:
            apart = [byte - 127.5 for byte in self._random(DIMENSIONS)]
            flat = math.hypot(*apart)
        share = (estimate - here.height - peer.height) / estimate if estimate > TOGETHER else 1.0
        point = tuple(
            at + step * share * way / flat if share else at + step * way / flat
            for at, way in zip(here.point, apart, strict=True)
        )
        lift = (here.height + peer.height) / estimate if estimate > TOGETHER else 0.0
        height = max(HEIGHT_MIN, here.height + step * lift)
        self.place = Coordinates(point, height, min(max(certain, 0.0), ERROR_MAX))
        self.samples += 1
