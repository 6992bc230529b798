"""Our own record: what this node says of itself, signed anew when that or the time has changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from crossedge.meshd.sequence import Sequence
from crossedge.meshd.wallclock import Wallclock
from crossedge.wire.certificate import Certificate
from crossedge.wire.identity import SigningKey
from crossedge.wire.record import Candidate, NatVerdict, Record

LIFETIME: Final = 3600.0  # seconds for which a record holds; a client renews it at half of that
REUSE: Final = LIFETIME / 4  # seconds for which one record is given to several rendezvous
CLOCK_STEP: Final = 60.0  # seconds by which the time may turn out to be wrong before a record is void


class OwnRecord:
    """Makes records. Core; `make` is what a `RendezvousClient` takes as its `make_record`."""

    def __init__(
        self,
        certificate: Certificate,
        signing_key: SigningKey,
        control_key: bytes,
        sequence: Sequence,
        clock: Wallclock,
    ) -> None:
        """Take who we are; `control_key` is the public half."""
        self._certificate = certificate
        self._signing_key = signing_key
        self._sequence = sequence
        self._clock = clock
        self._content: tuple[bytes, tuple[Candidate, ...], NatVerdict, tuple[bytes, ...], int] = (
            control_key,
            (),
            NatVerdict(),
            (),
            0,
        )
        self._made: tuple[Record, float] | None = None

    def update(
        self,
        *,
        control_key: bytes | None = None,
        candidates: Iterable[Candidate] | None = None,
        verdict: NatVerdict | None = None,
        servers: Iterable[bytes] | None = None,
        blocklist: int | None = None,
    ) -> bool:
        """Take what is to be said from now on (None: as before); return whether that is news.

        After news every client is to be told `record_changed`.
        """
        before = self._content
        self._content = (
            before[0] if control_key is None else control_key,
            before[1] if candidates is None else tuple(candidates),
            before[2] if verdict is None else verdict,
            before[3] if servers is None else tuple(servers),
            before[4] if blocklist is None else blocklist,
        )
        if self._content == before:
            return False
        self._made = None
        return True

    def is_off(self, now: float) -> bool:
        """Tell whether the record was made at what has turned out to be the wrong time."""
        if self._made is None:
            return False
        record, made = self._made
        return abs(self._clock.issuing(now) - (record.issued + now - made)) > CLOCK_STEP

    def make(self, seq: int, now: float) -> tuple[bytes, bytes]:
        """Return (record, certificate) bytes: the last record while it is good, else a new one."""
        made = self._made
        if made is None or now - made[1] >= REUSE or made[0].seq <= self._sequence.floor or self.is_off(now):
            control_key, candidates, verdict, servers, blocklist = self._content
            issued = int(self._clock.issuing(now))
            record = Record(
                node_id=self._certificate.node_id,
                certificate=self._certificate.fingerprint,
                control_key=control_key,
                seq=seq,
                issued=issued,
                expires=issued + int(LIFETIME),
                candidates=candidates,
                verdict=verdict,
                servers=servers,
                blocklist=blocklist,
            ).sign(self._signing_key)
            made = self._made = record, now
        return made[0].encode(), self._certificate.encode()
