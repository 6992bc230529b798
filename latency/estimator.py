"""What the probes of one path say: window minimum, smoothed RTT and deviation, loss, age.

The minimum over a window is the distance (for placement), the deviation the jitter; the smoothed values and
the timeout are those of RFC 6298, section 2. A probe that was answered by retry never comes here, because
each probe has a number of its own. Everything has a fixed size.
"""

from __future__ import annotations

GAIN = 1 / 8  # RFC 6298, 2.3: alpha
DEVIATION_GAIN = 1 / 4  # RFC 6298, 2.3: beta
BUCKETS = 6  # parts of the window; the oldest is forgotten as a whole
LOSS_PROBES = 64  # the last probes that the loss speaks of
LOSS_MINIMUM = 8  # fewer outcomes than this say nothing of loss
TIMEOUT_INITIAL = 1.0  # seconds; RFC 6298, 2.1
TIMEOUT_MIN = 0.05  # seconds: the other end is a process that may be scheduled late
TIMEOUT_MAX = 3.0  # seconds


def round_trip(sent: float, reflected_in: float, reflected_out: float, received: float) -> float:
    """Return the RTT in seconds of four timestamps, less the reflector's residence time (RFC 8762).

    Args:
        sent: when the probe left, by our clock.
        reflected_in: when the reflector got it, by the reflector's clock.
        reflected_out: when the reflector answered, by the reflector's clock.
        received: when the answer came, by our clock.

    A residence that cannot be (negative, or longer than the whole) is not subtracted: a peer may be able to
    make itself look farther away, never nearer than it is by more than it could by answering at once.
    """
    elapsed = max(0.0, received - sent)
    residence = reflected_out - reflected_in
    return elapsed - residence if 0.0 <= residence <= elapsed else elapsed


class Estimator:
    """The probes of one path."""

    __slots__ = (
        "_bucket_span",
        "_buckets",
        "_outcomes",
        "_total",
        "answers",
        "deviation",
        "latest",
        "smoothed",
        "updated",
    )

    def __init__(self, window: float = 60.0) -> None:
        """Take the span of the minimum in seconds."""
        self._bucket_span = window / BUCKETS
        self.restart()

    def restart(self) -> None:
        """Forget everything."""
        self._buckets: list[tuple[int, float]] = []
        self._outcomes = 0
        self._total = 0
        self.answers = 0
        """How many probes were answered in all."""
        self.latest: float | None = None
        self.smoothed: float | None = None
        self.deviation = 0.0
        self.updated: float | None = None

    def add(self, rtt: float, now: float, *, outcome: bool = True) -> None:
        """Count an answered probe; `rtt` in seconds, `outcome` whether the loss speaks of it too."""
        if self.smoothed is None:
            self.smoothed = rtt
            self.deviation = rtt / 2
        else:
            self.deviation += DEVIATION_GAIN * (abs(self.smoothed - rtt) - self.deviation)
            self.smoothed += GAIN * (rtt - self.smoothed)
        self.latest = rtt
        self.updated = now
        self.answers += 1
        if outcome:
            self._outcome(lost=False)
        number = int(now // self._bucket_span)
        buckets = [item for item in self._buckets if number - item[0] < BUCKETS]
        if buckets and buckets[-1][0] == number:
            buckets[-1] = (number, min(buckets[-1][1], rtt))
        else:
            buckets.append((number, rtt))
        self._buckets = buckets

    def lost(self) -> None:
        """Count a probe that was never answered."""
        self._outcome(lost=True)

    def _outcome(self, *, lost: bool) -> None:
        self._outcomes = (self._outcomes << 1 | lost) & ((1 << LOSS_PROBES) - 1)
        self._total = min(self._total + 1, LOSS_PROBES)

    def minimum(self, now: float) -> float | None:
        """Return the least RTT of the window in seconds, None where nothing was answered in it."""
        number = int(now // self._bucket_span)
        return min((rtt for bucket, rtt in self._buckets if number - bucket < BUCKETS), default=None)

    @property
    def samples(self) -> int:
        """How many outcomes, at most 64, the loss is made of."""
        return self._total

    @property
    def loss(self) -> float:
        """The share of probes without an answer among the last 64; 0 while there are fewer than 8."""
        return self._outcomes.bit_count() / self._total if self._total >= LOSS_MINIMUM else 0.0

    @property
    def timeout(self) -> float:
        """How long to wait for an answer before it counts as overdue, in seconds (RFC 6298, 2.3)."""
        if self.smoothed is None:
            return TIMEOUT_INITIAL
        return min(max(self.smoothed + max(4 * self.deviation, 0.02), TIMEOUT_MIN), TIMEOUT_MAX)
