"""Where a peer may be tried: what it signed, what its calls add, and who vouches for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.record import CandidateKind, Record

OFFERED_MAX: Final = 12
VOUCHED_MAX: Final = 24


class Offers:
    """The candidates of one peer, all of them by its own authenticated word."""

    __slots__ = ("_offered", "_record", "_usable", "_vouched")

    def __init__(self, record: Record, usable: Callable[[UdpEndpoint], bool]) -> None:
        """`usable` tells whether an endpoint may be tried from here at all."""
        self._record = record
        self._usable = usable
        self._offered: dict[UdpEndpoint, None] = {}
        self._vouched: dict[str, None] = {}

    def replace(self, record: Record) -> list[UdpEndpoint]:
        """Take a newer record; return the usable endpoints that are new in it."""
        old, self._record = self._record, record
        for endpoint in record.endpoints:
            self._offered.pop(endpoint, None)
        known = set(old.endpoints)
        return [endpoint for endpoint in record.endpoints if endpoint not in known and self._usable(endpoint)]

    def add(self, endpoints: Iterable[UdpEndpoint], observed_by: Iterable[tuple[bytes, UdpEndpoint]]) -> None:
        """Take what a call names: endpoints, and (observer, endpoint that it saw).

        An address that two observers saw is vouched for, as far as the caller is honest; the budgets bind it
        in any case.
        """
        for endpoint in endpoints:
            if endpoint in self._record.endpoints or not self._usable(endpoint):
                continue
            self._offered.pop(endpoint, None)
            if len(self._offered) >= OFFERED_MAX:
                del self._offered[next(iter(self._offered))]
            self._offered[endpoint] = None
        observers: dict[str, set[bytes]] = {}
        for observer, endpoint in observed_by:
            observers.setdefault(endpoint.host, set()).add(observer)
        for host, seen in observers.items():
            if len(seen) > 1 and len(self._vouched) < VOUCHED_MAX:
                self._vouched[host] = None

    def clear(self) -> None:
        """Forget what calls added."""
        self._offered.clear()
        self._vouched.clear()

    def __contains__(self, endpoint: object) -> bool:
        return endpoint in self._record.endpoints or endpoint in self._offered

    def candidates(self) -> list[UdpEndpoint]:
        """Return where the peer may be tried from here, signed endpoints first."""
        known = dict.fromkeys(self._record.endpoints) | self._offered
        return [endpoint for endpoint in known if self._usable(endpoint)]

    def single_observer(self, endpoint: UdpEndpoint) -> bool:
        """Tell whether nobody but one observer vouches for this endpoint, as far as we know."""
        if endpoint.host in self._vouched:
            return False
        for kind, signed in self._record.candidates:
            if signed == endpoint:
                return kind in (CandidateKind.REFLEXIVE, CandidateKind.OTHER)
        return True
