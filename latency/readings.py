"""What a node measured of one pair, kept while sessions and paths come and go."""

from __future__ import annotations

from typing import Final

from crossedge.latency.estimator import LOSS_MINIMUM, Estimator
from crossedge.latency.report import AGE_MAX, RTT_MAX, Pair, PairState

WINDOW: Final = 900.0  # seconds of which the minimum is reported: more than one round of probing
DIRECT_RECENTLY: Final = 5.0  # seconds for which a direct path counts beside a relay that answered later


class Reading:
    """One pair, direct and relayed apart: a path that ends must not lend its distance to another one."""

    __slots__ = ("direct", "relayed", "silent_since")

    def __init__(self) -> None:
        self.direct = Estimator(WINDOW)
        self.relayed = Estimator(WINDOW)
        self.silent_since: float | None = None
        """When it was found that nothing answers, in seconds of `now`; an answer since then undoes it."""

    @property
    def updated(self) -> float | None:
        """When something answered last, in seconds of `now`."""
        times = [each.updated for each in (self.direct, self.relayed) if each.updated is not None]
        return max(times, default=None)

    @property
    def best(self) -> Estimator | None:
        """The estimator that speaks for the pair; None where nothing was measured."""
        direct, relayed = self.direct.updated, self.relayed.updated
        if direct is not None and (relayed is None or relayed - direct <= DIRECT_RECENTLY):
            return self.direct
        return None if relayed is None else self.relayed

    def restart(self) -> None:
        """Forget everything: this node is elsewhere now."""
        self.direct.restart()
        self.relayed.restart()
        self.silent_since = None

    def silent(self, now: float) -> None:
        """Note that the pair was tried and nothing answers."""
        if not self._is_silent:
            self.silent_since = now

    @property
    def _is_silent(self) -> bool:
        since, updated = self.silent_since, self.updated
        return since is not None and (updated is None or updated < since)

    def pair(self, peer: bytes, now: float) -> Pair | None:
        """Return what there is to report, None where the pair is unmeasured."""
        best = self.best
        if self._is_silent and self.silent_since is not None:
            loss, samples = (None, 0) if best is None else (_loss(best), best.samples)
            age = min(max(0.0, now - self.silent_since), AGE_MAX)
            return Pair(peer, PairState.UNREACHABLE, loss=loss, samples=samples, age=age)
        if best is None or best.updated is None or best.smoothed is None:
            return None
        least = best.minimum(best.updated)
        if least is None or not 0.0 < max(least, best.smoothed, best.deviation) <= RTT_MAX:
            return None
        return Pair(
            peer,
            PairState.DIRECT if best is self.direct else PairState.RELAYED,
            least,
            best.smoothed,
            best.deviation,
            _loss(best),
            best.samples,
            min(max(0.0, now - best.updated), AGE_MAX),
        )


def _loss(estimator: Estimator) -> float | None:
    return estimator.loss if estimator.samples >= LOSS_MINIMUM else None
