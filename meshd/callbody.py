"""The body of a call: what a caller tells the called, as large as a call may carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ENVELOPE_OVERHEAD
from crossedge.wire.limits import MAX_CANDIDATES
from crossedge.wire.messages import MAX_SEALED, CallBody, encode

BODY_MAX: Final = MAX_SEALED - ENVELOPE_OVERHEAD
RTT_MAX: Final = 60.0  # seconds


def call_body(
    seq: Callable[[], int],
    attempt: int,
    candidates: Sequence[UdpEndpoint],
    observed_by: Sequence[tuple[bytes, UdpEndpoint]],
    rtt: float,
    initiation: bytes,
    *,
    measure: bool = False,
) -> CallBody:
    """Return the largest body that a call can carry; candidates that do not fit are left out, last first."""
    number = seq()
    for count in range(min(len(candidates), MAX_CANDIDATES), -1, -1):
        body = CallBody(
            seq=number,
            attempt=attempt,
            candidates=tuple(candidates[:count]),
            observed_by=tuple(observed_by),
            rtt=min(max(rtt, 0.0), RTT_MAX),
            initiation=initiation,
            measure=measure,
        )
        if len(encode(body)) <= BODY_MAX:
            break
    return body
