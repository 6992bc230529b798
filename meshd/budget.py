"""How much may be sent to addresses that have not agreed to be sent anything.

A candidate is only somebody's word. So everything that goes to an endpoint which has not answered an
authenticated challenge is paid from three purses: one per destination address over all peers, one for the
whole daemon (home routers break under thousands of new sessions), and for a reflexive endpoint that a single
observer saw, a few packets in all. A rendezvous that lies can therefore aim nothing worth the name at a
stranger, and the packets that a mesh wastes on dead candidates are bounded.

A birthday spray has purses of its own, again one per destination address and one for our own router, which
pays with an entry of its table for each packet. They refill within hours: enough for two tries, then no more.
"""

from __future__ import annotations

from typing import Final

from crossedge.wire.endpoint import UdpEndpoint

ADDRESS_BURST: Final = 64  # packets to one address at once
ADDRESS_RATE: Final = 4.0  # packets per second to one address after that
DAEMON_BURST: Final = 1024  # packets to all unproven addresses at once
DAEMON_RATE: Final = 256.0  # packets per second after that
SINGLE_OBSERVER_PACKETS: Final = 10  # packets to an endpoint that only one observer saw
SINGLE_OBSERVER_TIME: Final = 600.0  # seconds without a packet after which it may be tried as often again
SPRAY_BURST: Final = 3_200.0  # packets of sprays to one address, and through our own router, at once
SPRAY_RATE: Final = 0.5  # packets per second after that: a spray is possible again after 45 minutes
SPRAY_TABLE: Final = 256  # addresses that were sprayed and are remembered
TABLE: Final = 4096  # addresses, and endpoints, that are remembered


class Bucket:
    """A token bucket that starts full."""

    __slots__ = ("tokens", "when")

    def __init__(self, burst: float, now: float) -> None:
        self.tokens = burst
        self.when = now

    def refill(self, burst: float, rate: float, now: float) -> float:
        """Add what has accrued and return the tokens there are."""
        self.tokens = min(burst, self.tokens + max(0.0, now - self.when) * rate)
        self.when = max(self.when, now)
        return self.tokens


class Budget:
    """The purses of one daemon. `take` says why a packet may not go, or None and it is paid for."""

    __slots__ = ("_addresses", "_confirmed", "_daemon", "_single", "_spray_router", "_sprayed")

    def __init__(self, now: float) -> None:
        self._daemon = Bucket(DAEMON_BURST, now)
        self._addresses: dict[str, Bucket] = {}
        self._single: dict[UdpEndpoint, tuple[int, float]] = {}
        self._confirmed: dict[UdpEndpoint, None] = {}
        self._spray_router = Bucket(SPRAY_BURST, now)
        self._sprayed: dict[str, Bucket] = {}

    def confirm(self, endpoint: UdpEndpoint) -> None:
        """Note that a second observer saw the endpoint, or we did, by an authenticated datagram from it."""
        self._confirmed.pop(endpoint, None)
        if len(self._confirmed) >= TABLE:
            del self._confirmed[next(iter(self._confirmed))]
        self._confirmed[endpoint] = None
        self._single.pop(endpoint, None)

    def take(self, endpoint: UdpEndpoint, now: float, *, single_observer: bool = False) -> str | None:
        """Pay for one packet to an endpoint that has not agreed yet, or return the reason why not.

        `single_observer` says that the endpoint is reflexive and that nobody else vouched for it.
        """
        spent = 0
        if single_observer and endpoint not in self._confirmed:
            spent, last = self._single.get(endpoint, (0, now))
            if now - last >= SINGLE_OBSERVER_TIME:
                spent = 0
            if spent >= SINGLE_OBSERVER_PACKETS:
                return "budget-single-observer"
            if endpoint not in self._single and len(self._single) >= TABLE:
                self._forget_single(now)
                if len(self._single) >= TABLE:
                    return "budget-table"
            spent += 1
        bucket = self._bucket(endpoint.host, now)
        if bucket is None:
            return "budget-table"
        if bucket.refill(ADDRESS_BURST, ADDRESS_RATE, now) < 1.0:
            return "budget-address"
        if self._daemon.refill(DAEMON_BURST, DAEMON_RATE, now) < 1.0:
            return "budget-daemon"
        bucket.tokens -= 1.0
        self._daemon.tokens -= 1.0
        if spent:
            self._single[endpoint] = (spent, now)
        return None

    def spray(self, host: str, count: int, neighbours: int, now: float) -> int:
        """Pay for a volley to one address; return how many of its `count` packets may go.

        `neighbours` members share our public address with us, and its router with it: each gets its part.
        """
        bucket = self._sprayed.get(host)
        if bucket is None:
            if len(self._sprayed) >= SPRAY_TABLE:
                self._sprayed = {
                    key: kept
                    for key, kept in self._sprayed.items()
                    if kept.refill(SPRAY_BURST, SPRAY_RATE, now) < SPRAY_BURST
                }
                if len(self._sprayed) >= SPRAY_TABLE:
                    return 0
            bucket = self._sprayed[host] = Bucket(SPRAY_BURST, now)
        share = SPRAY_BURST / (1 + neighbours)
        ours = self._spray_router.refill(SPRAY_BURST, SPRAY_RATE / (1 + neighbours), now) - (
            SPRAY_BURST - share
        )
        allowed = max(0, int(min(count, bucket.refill(SPRAY_BURST, SPRAY_RATE, now), ours)))
        bucket.tokens -= allowed
        self._spray_router.tokens -= allowed
        return allowed

    def _bucket(self, host: str, now: float) -> Bucket | None:
        bucket = self._addresses.get(host)
        if bucket is None:
            if len(self._addresses) >= TABLE:
                self._forget_full(now)
                if len(self._addresses) >= TABLE:
                    return None
            bucket = self._addresses[host] = Bucket(ADDRESS_BURST, now)
        return bucket

    def _forget_full(self, now: float) -> None:
        """Forget the addresses whose buckets are full again: a new bucket is full too."""
        self._addresses = {
            host: bucket
            for host, bucket in self._addresses.items()
            if bucket.refill(ADDRESS_BURST, ADDRESS_RATE, now) < ADDRESS_BURST
        }

    def _forget_single(self, now: float) -> None:
        self._single = {
            endpoint: entry
            for endpoint, entry in self._single.items()
            if now - entry[1] < SINGLE_OBSERVER_TIME
        }
