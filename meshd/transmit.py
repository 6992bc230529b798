"""What a core wants sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from crossedge.wire.endpoint import Endpoint

Make = Callable[[Callable[[], float]], bytes | None]


class Transmit(NamedTuple):
    """A datagram on its way out."""

    destination: Endpoint
    datagram: bytes
    ttl: int | None = None
    """IP time to live (hop limit), None for the usual."""
    local: int = 0
    """Number of the socket to send from, where the core has more than one."""


class Late(NamedTuple):
    """A datagram that says when it leaves, so that it is made at that moment."""

    destination: Endpoint
    make: Make
    """Returns the datagram, None where nothing can be sent any more; it is given the clock of `now`."""
