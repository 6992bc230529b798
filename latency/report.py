"""Reports: what one node measured of its pairs, signed by the node itself, coded as changes.

A report carries the node's certificate, so that whoever holds the authority's public key can verify it
with nothing else. `base` 0 is a full report: the pairs that it does not name are forgotten. Any other `base`
is the number of an earlier report of the same instance; the report then names every pair that changed since
that one, with its present values, so it can be laid over the state after `base` or after any later report.

A pair has 36 bytes, all numbers big-endian:

     0                   1                   2                   3
     0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
    +---------------------------------------------------------------+
    |                  node id of the peer (16 bytes)               |
    +---------------+---------------+-------------------------------+
    |     state     |    samples    | loss in 1/10,000; FFFF unknown|
    +---------------+---------------+-------------------------------+
    |              window minimum of the RTT in microseconds        |
    +---------------------------------------------------------------+
    |              smoothed RTT in microseconds                     |
    +---------------------------------------------------------------+
    |              deviation in microseconds                        |
    +---------------------------------------------------------------+
    |              age at `issued` in milliseconds                  |
    +---------------------------------------------------------------+

States: 1 measured directly, 2 measured through a relay, 3 unreachable, 4 forgotten. A pair that is
unreachable or forgotten has no RTT: its three fields are 0 and anything else there is malformed.

Coordinates (Vivaldi) are ten IEEE 754 singles: eight dimensions, height and error; milliseconds, but the
error, which is a share.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field, InstanceOf, model_validator

from crossedge.wire.certificate import Certificate
from crossedge.wire.codec import U64, Bytes8, Key
from crossedge.wire.errors import IdentityError, WireError
from crossedge.wire.identity import Signed

CONTENT_TYPE: Final = "application/vnd.crossedge.report+msgpack"
PATH: Final = "/v1/reports"
MAX_PAIRS: Final = 1024
MAX_REPORT: Final = 40_000
"""Bytes of an encoded report: 1,024 pairs, a certificate and a kilobyte to grow."""
RTT_MAX: Final = 60.0
"""Seconds; no path of this planet answers later, so more is a fault of the report."""
AGE_MAX: Final = 7 * 86400.0
"""Seconds; an older measurement is forgotten by who made it."""
DIMENSIONS: Final = 8
COORDINATE_MAX: Final = 1e5
"""Milliseconds; beyond this a coordinate is no place on any network."""
ERROR_MAX: Final = 1.5

_PAIR = struct.Struct(">16sBBHIIII")
_COORDINATES = struct.Struct(">10f")
COORDINATES_SIZE: Final = _COORDINATES.size
_MICRO = 1_000_000
_LOSS_UNIT = 10_000
_LOSS_UNKNOWN = 0xFFFF
_SAMPLES_MAX = 64


class PairState(IntEnum):
    """What a node says of a pair. A pair that it never probed is not in its reports at all."""

    DIRECT = 1
    """Measured over a direct path."""
    RELAYED = 2
    """Measured through a relay."""
    UNREACHABLE = 3
    """Probed, and nothing answers."""
    FORGOTTEN = 4
    """Not probed any more: from now on unmeasured. Only in a report with a base."""

    @property
    def measured(self) -> bool:
        """Whether there is an RTT."""
        return self in (PairState.DIRECT, PairState.RELAYED)


@dataclass(frozen=True, slots=True)
class Pair:
    """What was measured towards one peer. Times in seconds; None wherever there is no number."""

    peer: bytes
    """Node id, 16 bytes."""
    state: PairState
    minimum: float | None = None
    """Least RTT of the window: the distance, for placement."""
    smoothed: float | None = None
    deviation: float | None = None
    loss: float | None = None
    """Share of the last probes without an answer, 0 to 1; None while there are too few."""
    samples: int = 0
    """How many outcomes, at most 64, the loss is made of."""
    age: float = 0.0
    """Since the last answer (unreachable: since the silence was found), when the report was issued."""


@dataclass(frozen=True, slots=True)
class Coordinates:
    """Where a node sees itself: Vivaldi (Dabek and others, 2004), in milliseconds."""

    point: tuple[float, ...]
    """8 dimensions."""
    height: float
    error: float
    """Relative error of its own estimates, 0 to 1.5."""


def _micro(seconds: float | None) -> int:
    return 0 if seconds is None else max(1, round(seconds * _MICRO))


def pack_pairs(pairs: Sequence[Pair]) -> bytes:
    """Return pairs as one run of bytes."""
    return b"".join(
        _PAIR.pack(
            pair.peer,
            pair.state,
            pair.samples,
            _LOSS_UNKNOWN if pair.loss is None else round(pair.loss * _LOSS_UNIT),
            _micro(pair.minimum),
            _micro(pair.smoothed),
            0 if pair.deviation is None else round(pair.deviation * _MICRO),
            round(min(pair.age, AGE_MAX) * 1000),
        )
        for pair in pairs
    )


def unpack_pairs(run: object) -> tuple[Pair, ...]:
    """Return the pairs in an untrusted run of bytes; raises only `WireError`."""
    if type(run) is not bytes or len(run) % _PAIR.size:
        raise WireError("malformed", f"pairs are not a run of {_PAIR.size}-byte values")
    if len(run) > MAX_PAIRS * _PAIR.size:
        raise WireError("too-many-pairs", f"{len(run) // _PAIR.size}, {MAX_PAIRS} are allowed")
    pairs = tuple(_unpack_pair(*fields) for fields in _PAIR.iter_unpack(run))
    if len({pair.peer for pair in pairs}) != len(pairs):
        raise WireError("malformed", "a peer comes twice")
    return pairs


def _unpack_pair(
    peer: bytes, code: int, samples: int, lost: int, minimum: int, smoothed: int, deviation: int, age: int
) -> Pair:
    try:
        state = PairState(code)
    except ValueError:
        raise WireError("malformed", f"state {code} of a pair") from None
    if samples > _SAMPLES_MAX or (lost > _LOSS_UNIT and lost != _LOSS_UNKNOWN):
        raise WireError("malformed", "loss of a pair")
    loss = None if lost == _LOSS_UNKNOWN else lost / _LOSS_UNIT
    if age > AGE_MAX * 1000:
        raise WireError("absurd-age", f"{age / 1000:g} s, at most {AGE_MAX:g} are allowed")
    if not state.measured:
        if minimum or smoothed or deviation:
            raise WireError("malformed", f"a pair that is {state.name.lower()} has an RTT")
        return Pair(peer, state, None, None, None, loss, samples, age / 1000)
    if not minimum or not smoothed:
        raise WireError("malformed", "a pair that is measured has no RTT")
    if max(minimum, smoothed, deviation) > RTT_MAX * _MICRO:
        raise WireError("absurd-rtt", f"more than {RTT_MAX:g} s")
    return Pair(
        peer, state, minimum / _MICRO, smoothed / _MICRO, deviation / _MICRO, loss, samples, age / 1000
    )


def pack_coordinates(coordinates: Coordinates) -> bytes:
    """Return the 40 bytes of coordinates; what is out of bounds is brought to them."""
    point = (max(-COORDINATE_MAX, min(COORDINATE_MAX, at)) for at in coordinates.point)
    return _COORDINATES.pack(*point, min(coordinates.height, COORDINATE_MAX), coordinates.error)


def unpack_coordinates(packed: object) -> Coordinates:
    """Return the coordinates in 40 untrusted bytes; raises only `WireError`."""
    if type(packed) is not bytes or len(packed) != _COORDINATES.size:
        raise WireError("malformed", "coordinates")
    *point, height, error = _COORDINATES.unpack(packed)
    if not all(math.isfinite(value) and abs(value) <= COORDINATE_MAX for value in (*point, height, error)):
        raise WireError("malformed", "coordinates out of bounds")
    if height < 0 or not 0 <= error <= ERROR_MAX:
        raise WireError("malformed", "coordinates: height or error out of bounds")
    return Coordinates(tuple(point), height, error)


def _unpack_certificate(packed: Any) -> Certificate:
    if type(packed) is not bytes:
        raise WireError("malformed", "certificate")
    return Certificate.decode(packed)


class Report(Signed):
    """What one node says of its pairs."""

    DOMAIN: ClassVar[bytes] = b"crossedge/report/v1"
    LIMIT: ClassVar[int] = MAX_REPORT

    certificate: Annotated[InstanceOf[Certificate], Key("c", Certificate.encode, _unpack_certificate)]
    """Of the node whose signing key signs this; it names the network and the node."""
    epoch: Annotated[Bytes8, Key("e")]
    """Random at each start of the daemon."""
    seq: Annotated[Annotated[int, Field(ge=1, le=2**64 - 1)], Key("q")]
    """Grows with each report, restarts included (protocol, section 2)."""
    base: Annotated[U64, Key("b")] = 0
    """The report whose changes these are; 0: this is full."""
    issued: Annotated[U64, Key("i")]
    """Unix time in seconds."""
    interval: Annotated[Annotated[int, Field(ge=1, le=3600)], Key("w")] = 15
    """Seconds after which the next one is meant to come."""
    pairs: Annotated[tuple[InstanceOf[Pair], ...], Key("p", pack_pairs, unpack_pairs)] = ()
    coordinates: Annotated[InstanceOf[Coordinates] | None, Key("v", pack_coordinates, unpack_coordinates)] = (
        None
    )

    @model_validator(mode="after")
    def _consistent(self) -> Report:
        if self.base >= self.seq:
            raise ValueError("base is not below seq")
        if not self.base and any(pair.state is PairState.FORGOTTEN for pair in self.pairs):
            raise ValueError("a full report forgets by leaving out")
        own = self.node_id
        if any(pair.peer == own for pair in self.pairs):
            raise ValueError("a pair of the node with itself")
        return self

    @property
    def full(self) -> bool:
        """Whether it stands on its own."""
        return not self.base

    @property
    def network(self) -> bytes:
        """The 16-byte id of the network."""
        return self.certificate.network

    @property
    def node_id(self) -> bytes:
        """The 16-byte id of the node."""
        return self.certificate.node_id

    @property
    def name(self) -> str:
        """The node's name."""
        return self.certificate.name

    def verify(self, ca_public: bytes, unix: float, known: bytes = b"") -> None:
        """Check that a node of this authority's network, whose certificate holds now, signed this.

        `IdentityError` otherwise. Blocklists are for the caller to ask. `known` is the fingerprint of a
        certificate that was verified before, which is then not done again.
        """
        if self.certificate.fingerprint != known:
            self.certificate.verify(ca_public)
        if not self.certificate.valid_at(unix):
            raise IdentityError("expired", f"certificate of {self.name}")
        self.check_signature(self.certificate.ed25519)
