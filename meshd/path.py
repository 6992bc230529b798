"""One way to reach a peer: its state, its proofs, its size, what it costs.

A path is proven on the data plane: a probe inside the session, as large as data may be, came back as large
the same way. So a one-way path is never proven, and one that lets only small packets through is not either.
A small ping that was answered only shows that somebody agreed to be probed (consent).

                  probed                 proved
    UNPROVEN ---------------> PROBING -----------> PROVEN <--------+
        ^                        |   ^                | doubted,   | proved
        |                gave up |   | probed         | moved      |
        |                        v   |                v            |
        +---- never -----       LOST -+ <---------- SUSPECT -------+
                                          gave up

PROVEN is not yet trust: trust ends TRUST seconds after the last proof. While a path that carries traffic is
not trusted, data goes over it and another one at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Final

from crossedge.latency.estimator import Estimator, round_trip
from crossedge.meshd.inner import PROBE_MIN, Probe, ProbeReply
from crossedge.meshd.outstanding import Outstanding, Sent
from crossedge.meshd.pathmtu import SizeSearch
from crossedge.wire.endpoint import Endpoint, RelayEndpoint, remote_of

HEARTBEAT: Final = 0.7  # seconds between probes of a path that carries traffic
HEARTBEAT_SIZE: Final = 2 * PROBE_MIN  # bytes: from a new source it pays for the answer and for a challenge
TRUST: Final = 2.0  # seconds after the last proof
STANDBY_INTERVAL: Final = 10.0  # seconds between probes of a path that is kept warm
KEEPALIVE_INTERVAL: Final = 20.0  # of an idle path, where the lifetimes of both NATs were not measured
KEEPALIVE_MAX: Final = 100.0  # where they were
JITTER: Final = 0.1  # the part of an interval that is random
OVERDUE_MIN: Final = 0.1  # seconds before a probe may count as overdue: hosts stall for a moment
MISSES: Final = 3  # probes overdue in a row that make a path suspect before trust ends by itself
RETRY: Final = 0.15  # seconds between probes while one is overdue
SUSPECT_FAST: Final = 2.0  # seconds for which a suspect path is probed quickly
SUSPECT_INTERVAL: Final = 0.25
GIVE_UP: Final = 10.0  # seconds in doubt after which a path is lost
PROVE_INTERVALS: Final = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between the full-size probes of a new path
BURST_GAP: Final = 0.08  # seconds between the probes of a burst, more or less by half
FIRST_COST: Final = 0.5  # seconds: what a path costs that was never measured
RELAY_EXTRA: Final = 0.1  # seconds: a relay costs others money and has a queue
RELAY_FACTOR: Final = 2.0
PRIVATE_FACTOR: Final = 0.9  # a path inside a LAN does not depend on a router's mapping
LOSS_POWER: Final = 4  # cost grows with (1 - loss) to the minus this
BETTER: Final = 0.9  # another path must cost less than this share of the current one
BETTER_BY: Final = 0.0005  # and be cheaper by this many seconds
DWELL: Final = 5.0  # seconds that a choice stands while its path is trusted


PRIVATE: Final = tuple(map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))


@lru_cache(maxsize=1024)
def is_private(host: str) -> bool:
    """Tell whether an address belongs to somebody's LAN (RFC 1918, RFC 4193)."""
    address = ip_address(host)
    return any(address in network for network in PRIVATE)


class State(Enum):
    """Where a path stands."""

    UNPROVEN = "unproven"
    PROBING = "probing"
    PROVEN = "proven"
    SUSPECT = "suspect"
    LOST = "lost"


class Cause(Enum):
    """Why a path's state changes."""

    PROBED = "probed"
    PROVED = "proved"
    DOUBTED = "doubted"
    GAVE_UP = "gave up"


TRANSITIONS: Final[dict[tuple[State, Cause], State]] = {
    (State.UNPROVEN, Cause.PROBED): State.PROBING,
    (State.LOST, Cause.PROBED): State.PROBING,
    (State.PROBING, Cause.PROVED): State.PROVEN,
    (State.PROBING, Cause.GAVE_UP): State.LOST,
    (State.PROVEN, Cause.DOUBTED): State.SUSPECT,
    (State.SUSPECT, Cause.PROVED): State.PROVEN,
    (State.SUSPECT, Cause.GAVE_UP): State.LOST,
}
"""Every other pair changes nothing."""


class Role(Enum):
    """What a path is kept for; it decides how often the path is probed once it is proven."""

    OFF = "off"
    IDLE = "idle"
    STANDBY = "standby"
    LIVE = "live"


class Path:
    """One endpoint at which a peer may be reached."""

    __slots__ = (
        "_beats",
        "_burst_at",
        "_burst_left",
        "_changed",
        "_jitter",
        "_live_since",
        "_misses",
        "_next",
        "_outstanding",
        "_scout_due",
        "_tries",
        "answered",
        "consented",
        "created",
        "credit",
        "endpoint",
        "keepalive",
        "last_heard",
        "last_proof",
        "offered",
        "private",
        "record",
        "relay",
        "role",
        "rtt",
        "scouted",
        "search",
        "state",
    )

    def __init__(self, endpoint: Endpoint, now: float, jitter: float = 0.0) -> None:
        """Take the endpoint; `jitter`, 0 to 1, spreads the probes of many paths."""
        self.endpoint = endpoint
        self.relay = isinstance(endpoint, RelayEndpoint)
        host = (endpoint.server if isinstance(endpoint, RelayEndpoint) else remote_of(endpoint)).host
        self.private = not self.relay and is_private(host)
        self.search = SizeSearch(v6=":" in host, relay=self.relay)
        self.state = State.UNPROVEN
        self.role = Role.OFF
        self.rtt = Estimator()
        self.consented = False
        """Whether the peer answered a challenge from here; before that a budget counts what is sent."""
        self.offered = True
        """Whether the peer named this endpoint; else it gets small probes until it answers one."""
        self.credit = 0
        """Bytes that came from here less those that went there; all that a `limited` path may be sent."""
        self.created = now
        self.last_proof: float | None = None
        self.last_heard: float | None = None
        self.keepalive = KEEPALIVE_INTERVAL
        """Seconds between probes of the idle path: its NAT's measured lifetime less slack."""
        self._jitter = 1.0 - JITTER * jitter
        self._next: float | None = None
        self._tries = 0
        self._beats = 0
        self._misses = 0
        self._changed = now
        self._live_since = now
        self._outstanding = Outstanding()
        self.record: Estimator | None = None
        """What this path measures while it carries data, or for a burst, is put down here too."""
        self.answered: float | None = None
        """When a small probe was answered last."""
        self.scouted = float("-inf")
        """When one was sent by `scout`."""
        self._scout_due = False
        self._burst_left = 0
        self._burst_at = now

    # --- What it is -----------------------------------------------------------------------------------

    def trusted(self, now: float) -> bool:
        """Tell whether data may go over this path alone."""
        return self.state is State.PROVEN and self.last_proof is not None and now - self.last_proof <= TRUST

    @property
    def limited(self) -> bool:
        """Whether nobody vouches for this address but the source field of what came from it.

        It may be a stranger's, so no more goes there than came from there.
        """
        return not (self.relay or self.offered or self.consented)

    @property
    def size(self) -> int:
        """The largest UDP payload in bytes, less a relay's header, that was proven to pass."""
        return self.search.size

    @property
    def cost(self) -> float:
        """The path's score in seconds, less is better: smoothed RTT, more for loss and for a relay."""
        seconds = FIRST_COST if self.rtt.smoothed is None else self.rtt.smoothed
        seconds /= float(max(1.0 - self.rtt.loss, 0.1) ** LOSS_POWER)
        if self.relay:
            return (seconds + RELAY_EXTRA) * RELAY_FACTOR
        return seconds * PRIVATE_FACTOR if self.private else seconds

    def __repr__(self) -> str:
        return f"Path({self.endpoint}, {self.state.value})"

    # --- What happens to it ---------------------------------------------------------------------------

    def set_role(self, role: Role, now: float) -> None:
        """Keep the path for this from now on; one that starts to carry traffic is probed at once."""
        if role is self.role:
            return
        self.role = role
        if role is Role.LIVE:
            self._live_since = now
        if self.state is State.PROVEN:
            if role is Role.OFF:
                self._next = None
            elif role is Role.LIVE and not self.trusted(now):
                self._next = now
            else:
                due = (self.last_proof or now) + self._interval()
                self._next = due if self._next is None else min(self._next, due)

    def prove(self, now: float) -> None:
        """Start to prove a path that is new or was lost; a limited one once it has paid for a challenge."""
        if self.limited and self.credit < PROBE_MIN:
            return
        if self.state in (State.UNPROVEN, State.LOST):
            self.rtt = Estimator()
            self._change(Cause.PROBED, now)
            self._tries = 0
            self._next = now

    def heard(self, now: float) -> None:
        """Note that something authenticated came from there. It proves one direction only, so nothing."""
        self.last_heard = now

    def doubt(self, now: float) -> None:
        """Doubt a proven path: an address changed, or all else on it went silent."""
        if self.state is State.PROVEN:
            self._change(Cause.DOUBTED, now)
            self.search.restart(now)
            self._next = now

    def forgive(self) -> None:
        """Count no loss that is not counted yet: the peer was away, or had no keys for a moment."""
        self._outstanding.forgive()

    def nudge(self, now: float) -> None:
        """Probe at once: there is reason to believe that the path works again."""
        if self._next is not None:
            self._next = now

    def pays(self, size: int) -> bool:
        """Tell whether so many bytes may go there, and count them."""
        if not self.limited:
            return True
        if self.credit < size:
            return False
        self.credit -= size
        return True

    def too_big(self, size: int, now: float) -> None:
        """Take the kernel's word (EMSGSIZE) that `size` bytes (0: unknown) do not leave this host."""
        self.search.refused(size, now)

    def _interval(self) -> float:
        if self.role is Role.LIVE:
            return HEARTBEAT
        interval = STANDBY_INTERVAL if self.role is Role.STANDBY else min(self.keepalive, KEEPALIVE_MAX)
        return interval * self._jitter

    def _change(self, cause: Cause, now: float) -> None:
        new = TRANSITIONS.get((self.state, cause))
        if new is not None:
            self.state = new
            self._changed = now

    # --- Measuring without traffic ----------------------------------------------------------------------

    def scout(self, now: float) -> None:
        """Send one small probe: does it answer, and how far is it?"""
        self.scouted = now
        self._scout_due = True

    def burst(self, probes: int, now: float) -> None:
        """Send so many small probes, jittered, whatever the path is kept for."""
        self._burst_left, self._burst_at = probes, now

    @property
    def bursting(self) -> bool:
        """Whether probes of a burst are to be sent, or may still be answered in time."""
        return self._burst_left > 0 or self._outstanding.bursting

    def end_burst(self) -> None:
        """Count what was not answered as lost."""
        self._burst_left = 0
        for _ in range(self._outstanding.end_burst()):
            if self.record is not None:
                self.record.lost()

    def _records(self, sent: Sent) -> bool:
        used = sent.counts and self.role in (Role.LIVE, Role.IDLE)
        return sent.size <= HEARTBEAT_SIZE and (sent.burst or used)

    # --- Probing --------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """Return when `handle_timeout` and `probe` have something to do, in seconds of `now`."""
        times = self._outstanding.deadlines()
        if self._next is not None:
            times.append(self._next)
        if self._burst_left:
            times.append(self._burst_at)
        if self.state is State.SUSPECT:
            times.append(self._changed + GIVE_UP)
        elif self.state is State.PROVEN and self.role is Role.LIVE:
            times.append(self._trust_end())
            rung = self.search.deadline()
            if rung is not None:
                times.append(rung)
        return min(times, default=None)

    def handle_timeout(self, now: float) -> None:
        """Give up on probes and on the path where it is time to."""
        for sent in self._outstanding.overdue(now):
            if sent.rung:
                self.search.missed(sent.size, now)
            else:
                self._misses += 1
            if self.state is State.PROVEN and self.role is not Role.OFF:
                self._next = now if self._next is None else min(self._next, now)
        for sent in self._outstanding.gone(now, doubt=self.state is State.SUSPECT):
            if sent.counts:
                self.rtt.lost()
            if self.record is not None and self._records(sent):
                self.record.lost()
        if self.state is State.PROVEN:
            ended = self.role is Role.LIVE and now >= self._trust_end()
            if ended or self._misses >= MISSES:
                self.doubt(now)
            return
        waited = self.state is State.SUSPECT and now >= self._changed + GIVE_UP  # as in `deadline`
        tried = self.state is State.PROBING and self._tries > len(PROVE_INTERVALS) and self._due(now)
        if waited or tried:
            self._lose(now)

    def probe(self, number: int, now: float) -> Probe | None:
        """Return the probe that is to be sent now under this id, or None. Call again until it is None."""
        if self._scout_due:
            self._scout_due = False
            return self._note(Probe(number, now, PROBE_MIN), now)
        if self._burst_left and now >= self._burst_at:
            self._burst_left -= 1
            self._burst_at = now + BURST_GAP * (0.5 + (number & 0xFFFF) / 65536)
            return self._note(Probe(number, now, PROBE_MIN), now, burst=True)
        if self._due(now):
            if self.state is State.PROVEN:
                return self._heartbeat(number, now)
            if self.state in (State.PROBING, State.SUSPECT):
                return self._full(number, now)
            self._next = None
        if self.state is State.PROVEN and self.role is Role.LIVE:
            size = self.search.next(now)
            if size is not None:
                return self._note(Probe(number, now, size), now, rung=True)
        return None

    def _due(self, now: float) -> bool:
        return self._next is not None and now >= self._next

    def _full(self, number: int, now: float) -> Probe:
        if self.state is State.SUSPECT:
            fast = now - self._changed < SUSPECT_FAST
            self._next = now + (SUSPECT_INTERVAL if fast else HEARTBEAT)
        else:
            # A relay needs no haste, as it takes data unproven.
            step = PROVE_INTERVALS[min(self._tries + (2 if self.relay else 0), len(PROVE_INTERVALS) - 1)]
            self._tries += 1
            self._next = now + max(step, min(self.rtt.smoothed or 0.0, 0.3))
        if self.limited:
            return self._note(Probe(number, now, PROBE_MIN), now)
        return self._note(Probe(number, now, self.search.base, full_reply=True), now)

    def _heartbeat(self, number: int, now: float) -> Probe:
        self._beats += 1
        overdue = self._misses > 0
        self._next = now + (RETRY if overdue else self._interval())
        size = self.search.check(self._beats) if self.role is Role.LIVE and not overdue else None
        if size is not None:
            return self._note(Probe(number, now, size), now, rung=True)
        return self._note(Probe(number, now, HEARTBEAT_SIZE), now, again=overdue)

    def _note(
        self, probe: Probe, now: float, *, rung: bool = False, burst: bool = False, again: bool = False
    ) -> Probe:
        """Remember a probe that is sent now.

        The loss is that of probes sent at regular times. Not of those sent `again`, after a loss, when the
        path may be down for a moment: they would make many losses of one, or many answers once it is up.
        """
        overdue = now + max(self.rtt.timeout, OVERDUE_MIN)
        counts = self.state is State.PROVEN and not (rung or again)
        sent = Sent(now, probe.size, probe.full_reply, rung, burst, counts, overdue)
        self._outstanding.add(probe.id, sent)
        return probe

    def leaves(self, probe: Probe, now: float) -> Probe:
        """Return a probe of ours as it leaves now: its time counts from here."""
        self._outstanding.leaves(probe, now)
        return replace(probe, sent=now)

    def _trust_end(self) -> float:
        return max(self.last_proof or 0.0, self._live_since) + TRUST

    def _lose(self, now: float) -> None:
        self._change(Cause.GAVE_UP, now)
        self._next = None
        self._misses = 0
        self._outstanding.clear()

    def replied(self, reply: ProbeReply, stamp: float, now: float) -> bool:
        """Take an answer that came from this path's endpoint, or to its probe; True if the probe was ours.

        `stamp` is when the kernel received it, by the clock of `now`.
        """
        sent = self._outstanding.answered(reply.id)
        if sent is None:
            return False
        self.consented = True
        self.last_heard = now
        rtt = round_trip(sent.at, reply.arrived, reply.answered, stamp)
        self.rtt.add(rtt, now, outcome=sent.counts)
        if sent.size <= HEARTBEAT_SIZE:
            self.answered = now
            if self.record is not None and self._records(sent):
                self.record.add(rtt, now)
        self._misses = 0
        if reply.probe_size >= sent.size:
            self.search.passed(sent.size, now)
        full = sent.full and min(reply.size, reply.probe_size) >= self.search.base
        if self.state is State.PROVEN:
            self.last_proof = now
            if self.role is not Role.OFF and not sent.rung:
                self._next = max(sent.at + self._interval(), now)
        elif full:
            self._change(Cause.PROVED, now)
            self.last_proof = now
            self._live_since = now
            self._next = None if self.role is Role.OFF else now + self._interval()
            self.search.start(now)
        elif not sent.full and self.state is State.PROBING:
            self._next = now  # the challenge was met: prove the full size
        return True


def choose(paths: Iterable[Path], current: Path | None, since: float, now: float) -> Path | None:
    """Return the path that data should take: the cheapest trusted one, with hysteresis.

    `current` has been the choice since `since`; it stays unless it is no longer trusted, or stood for DWELL
    seconds and another is clearly cheaper. None where no path is trusted.
    """
    trusted = [path for path in paths if path.trusted(now)]
    best = min(trusted, key=lambda path: path.cost, default=None)
    if best is None or current is None or best is current or not current.trusted(now):
        return best
    if current.relay and not best.relay and best.cost < current.cost:
        return best
    cheaper = best.cost < current.cost * BETTER and best.cost < current.cost - BETTER_BY
    return best if cheaper and now - since >= DWELL else current
