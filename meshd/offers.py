"""Where a peer may be tried: what it signed, what its calls add, and who vouches for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Final

from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.record import CandidateKind, Record

OFFERED_MAX: Final = 12
VOUCHED_MAX: Final = 24


class Offers:
    """The candidates of one peer, all of them by its own authenticated word."""

    __slots__ = ("_fresh", "_offered", "_record", "_usable", "_vouched")

    def __init__(self, record: Record, usable: Callable[[UdpEndpoint], bool]) -> None:
        """`usable` tells whether an endpoint may be tried from here at all."""
        self._record = record
        self._usable = usable
        self._offered: dict[UdpEndpoint, None] = {}
        self._vouched: dict[str, None] = {}
        self._fresh: tuple[UdpEndpoint, ...] = ()

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
        self._vouch(observed_by)

    def add_fresh(
        self, endpoints: Iterable[UdpEndpoint], observed_by: Iterable[tuple[bytes, UdpEndpoint]]
    ) -> tuple[UdpEndpoint, ...]:
        """Take what a call for a later try names, in place of those of the one before; return the usable.

        They are opened for that try alone, so they are no candidates of any other.
        """
        self._fresh = tuple(islice((each for each in endpoints if self._usable(each)), OFFERED_MAX))
        self._vouch(observed_by)
        return self._fresh

    def _vouch(self, observed_by: Iterable[tuple[bytes, UdpEndpoint]]) -> None:
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
        self._fresh = ()

    def __contains__(self, endpoint: object) -> bool:
        known = endpoint in self._record.endpoints or endpoint in self._offered
        return known or endpoint in self._fresh

    def candidates(self) -> list[UdpEndpoint]:
        """Return where the peer may be tried from here, signed endpoints first."""
        known = dict.fromkeys(self._record.endpoints) | self._offered
        return [endpoint for endpoint in known if self._usable(endpoint)]

    def vouched(self, host: str) -> bool:
        """Tell whether two observers saw the peer at this address, as far as the peer is honest."""
        return host in self._vouched

    def signed(self, endpoint: UdpEndpoint) -> bool:
        """Tell whether the peer's record names this endpoint."""
        return endpoint in self._record.endpoints

    def single_observer(self, endpoint: UdpEndpoint) -> bool:
        """Tell whether nobody but one observer vouches for this endpoint, as far as we know."""
        if endpoint.host in self._vouched:
            return False
        for kind, signed in self._record.candidates:
            if signed == endpoint:
                return kind in (CandidateKind.REFLEXIVE, CandidateKind.OTHER)
        return True
