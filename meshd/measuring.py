"""One measurement of one pair: open what is missing, find the path, send a burst, let go.

    OFF --begin--> OPENING --session up--> SCOUTING --a path answers--> BURST --answered--> LINGER --> OFF
          `joined`, where the peer opened ----^            nothing in time: failed

A session that is opened only to measure proves no path at full size and says no more than it must; the first
packet of a pod makes an ordinary one of it. Scouts, single small probes, go to every direct endpoint that met
a challenge; the burst takes the nearest, or a relay where there is none. The other end measures as well while
the session is there, and then both wait before they ask again.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from crossedge.meshd.path import Path, State
from crossedge.meshd.peerport import Port
from crossedge.meshd.punch import Phase as Punching

if TYPE_CHECKING:
    from crossedge.meshd.peer import MeshPeer

BURST: Final = 5  # probes
OPEN_TIME: Final = 8.0  # seconds that a session may take to come up
DIRECT_TIME: Final = 2.2  # seconds after that for which a direct path may appear: the first try of a punch
CHOICE_TIME: Final = 0.15  # seconds that the others get once one direct path has answered
ANSWER_TIME: Final = 4.0  # seconds that a burst may take in all
LINGER: Final = 0.7  # seconds for which a session waits for the other end's burst
LOOK: Final = 0.1  # seconds between looks at what only shows by itself


class Phase(Enum):
    """How far a measurement is."""

    OFF = "off"
    OPENING = "opening"
    SCOUTING = "scouting"
    BURST = "burst"
    LINGER = "linger"


class Measuring:
    """The measurements of one pair, one after the other."""

    __slots__ = ("_opener", "_path", "_peer", "_port", "_since", "_until", "only", "phase")

    def __init__(self, peer: MeshPeer, port: Port) -> None:
        self._peer = peer
        self._port = port
        self._opener = False
        self._path: Path | None = None
        self._since = 0.0
        self._until = 0.0
        self.phase = Phase.OFF
        self.only = False
        """Whether the session is there for a measurement alone, so far."""

    def begin(self, now: float) -> None:
        """Measure the pair, opening a session if there is none."""
        self._opener = True
        if self.phase is not Phase.OFF:
            return
        if self._peer.up(now):
            self._scout(now)
        else:
            self.phase, self._until = Phase.OPENING, now + OPEN_TIME
            self._open(now)
            if self._peer.session is None:
                self.stop()

    def up(self, now: float) -> None:
        """Note that the session came up; one that the peer opened is used as well."""
        if self.phase is Phase.OPENING:
            self._scout(now)
        elif self.phase is Phase.OFF and self._port.measurement_due(self._peer, now):
            self._opener = False
            self._scout(now)

    def called(self, now: float, *, measure: bool) -> None:
        """Note what a call, authentic and fresh, is for, before the peer takes it."""
        peer = self._peer
        if not measure:
            self.in_earnest(now)
        elif peer.session is None or (peer.accepted and peer.up_at is None and not peer.lively(now)):
            self.only = True  # the handshake may have been faster than the call

    def in_earnest(self, now: float) -> None:
        """Make an ordinary session of one that was there for a measurement."""
        if not self.only:
            return
        self.only = False
        if self._peer.up(now):
            self._peer.talk.state(now)
            self._peer.sources.prove_all(now)
            self._port.touch(self._peer)

    def stop(self) -> None:
        """Note that the session is closed."""
        phase, self.phase = self.phase, Phase.OFF
        path, self._path = self._path, None
        if phase is Phase.BURST and path is not None and (path.answered or 0.0) >= self._since:
            self._port.measured(self._peer, answered=True)
        elif phase in (Phase.OPENING, Phase.SCOUTING, Phase.BURST) and self._opener:
            self._port.measured(self._peer, answered=False)

    def deadline(self) -> float | None:
        """Return when `pump` has something to do."""
        return None if self.phase is Phase.OFF else self._until

    def pump(self, now: float) -> None:
        """Go on as far as it is possible now."""
        if self.phase is Phase.OPENING and now >= self._until:
            self._fail(now)
        if self.phase is Phase.SCOUTING:
            self._choose(now)
        if self.phase is Phase.BURST:
            self._watch(now)
        if self.phase is Phase.LINGER and now >= self._until:
            self.phase = Phase.OFF
            if self._opener:
                self._enough(now)

    def _scout(self, now: float) -> None:
        self.phase, self._since, self._until = Phase.SCOUTING, now, now
        self._port.touch(self._peer)

    def _choose(self, now: float) -> None:
        peer = self._peer
        current = peer.paths.current
        if current is not None and current.trusted(now):
            self._burst(current, now)
            return
        directs = [path for path in peer.paths.directs() if path.consented and path.state is not State.LOST]
        for path in directs:
            if path.scouted < self._since:
                path.scout(now)
                self._port.touch(self._peer)
        answered = [path for path in directs if (path.answered or 0.0) >= self._since]
        if answered:
            first = min(path.answered or now for path in answered)
            if now < first + CHOICE_TIME and len(answered) < len(directs):
                self._until = first + CHOICE_TIME
                return
            peer.punch.done()
            self._burst(min(answered, key=lambda path: path.rtt.latest or 0.0), now)
            return
        waited = now - self._since
        hopeless = peer.punch.phase is not Punching.TRYING and not directs
        relay = next(iter(peer.paths.relays()), None)
        if relay is not None and (waited >= DIRECT_TIME or (hopeless and waited >= CHOICE_TIME)):
            self._burst(relay, now)
        elif waited >= OPEN_TIME:
            self._fail(now)
        else:
            self._until = now + LOOK

    def _burst(self, path: Path, now: float) -> None:
        path.burst(BURST, now)
        self._port.tell_place(self._peer, now)
        self.phase, self._path, self._since, self._until = Phase.BURST, path, now, now + LOOK
        self._port.touch(self._peer)

    def _watch(self, now: float) -> None:
        path = self._path
        if path is None or (path.bursting and now - self._since < ANSWER_TIME):
            self._until = now + LOOK
            return
        path.end_burst()
        if (path.answered or 0.0) < self._since:
            self._fail(now)
            return
        self.phase, self._path, self._until = Phase.LINGER, None, now + LINGER
        self._port.measured(self._peer, answered=True)

    def _fail(self, now: float) -> None:
        self.phase, self._path = Phase.OFF, None
        if self._opener:
            self._port.measured(self._peer, answered=False)
            self._enough(now)

    def _open(self, now: float) -> None:
        """Open the session, or renew its keys."""
        session = self._peer.session
        if session is None or self._peer.parting:
            self.only = True
            self._peer.open(now)
        else:
            session.initiate(now)

    def _enough(self, now: float) -> None:
        """Let go of a session that nothing but a measurement wanted."""
        if self.only and self._peer.session is not None:
            self._peer.farewell.bid("measured", now)
