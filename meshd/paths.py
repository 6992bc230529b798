"""All paths to one peer: which of them data takes, what each is kept for, and the probes they send.

Data goes over the cheapest trusted path. While none is trusted it goes over two at once where there are two:
the direct path that was good until now, and a relay, or two relays. A direct path that was never proven takes
nothing. A relay needs no proof to take the first packets, because data never waits: so it may be dead, and
they go through another one, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from crossedge.meshd.inner import Probe, ProbeReply
from crossedge.meshd.path import Path, Role, State, choose
from crossedge.meshd.pathmtu import BASE
from crossedge.wire.endpoint import DirectEndpoint, Endpoint, RelayEndpoint, UdpEndpoint
from crossedge.wire.relay import HEADER as RELAY_HEADER

MAX_DIRECT: Final = 20
MAX_RELAYS: Final = 4
WARM_DIRECT: Final = 2  # proven direct paths beside the one in use that are kept warm
WAS_GOOD: Final = (State.PROVEN, State.SUSPECT)


class Paths:
    """The paths to one peer."""

    __slots__ = ("_jitter", "_next_id", "_random", "_table", "current", "since")

    def __init__(self, random: Callable[[int], bytes], jitter: float) -> None:
        """`random` returns that many random bytes; `jitter`, 0 to 1, spreads probes of many peers."""
        self._table: dict[Endpoint, Path] = {}
        self._random = random
        self._next_id = 0
        self.take_id()
        self._jitter = jitter
        self.current: Path | None = None
        """The path that data takes, trusted when it was chosen; None before there was one."""
        self.since = float("-inf")
        """When it was chosen, in seconds of `now`."""

    def __iter__(self) -> Iterator[Path]:
        return iter(list(self._table.values()))

    def __len__(self) -> int:
        return len(self._table)

    def get(self, endpoint: Endpoint) -> Path | None:
        """Return the path to this endpoint, if there is one."""
        return self._table.get(endpoint)

    def add(self, endpoint: Endpoint, now: float) -> Path | None:
        """Return the path to this endpoint, a new one if need be; None where there is no room.

        A new channel of a relay takes the place of an older one at the same server. Room is made by
        forgetting a path that is lost or was never proven.
        """
        path = self._table.get(endpoint)
        if path is not None:
            return path
        relay = isinstance(endpoint, RelayEndpoint)
        if isinstance(endpoint, RelayEndpoint):
            other = self.relay_at(endpoint.server)
            if other is not None:
                self.remove(other.endpoint)
        same = [path for path in self._table.values() if path.relay is relay]
        if len(same) >= (MAX_RELAYS if relay else MAX_DIRECT) and not self._make_room(same):
            return None
        path = self._table[endpoint] = Path(endpoint, now, self._jitter)
        return path

    def _make_room(self, paths: list[Path]) -> bool:
        for states in ((State.LOST,), (State.UNPROVEN,), (State.PROBING,)):
            for path in paths:
                if path.state in states and path is not self.current:
                    self.remove(path.endpoint)
                    return True
        return False

    def remove(self, endpoint: Endpoint) -> None:
        """Forget a path."""
        path = self._table.pop(endpoint, None)
        if path is not None and path is self.current:
            self.current = None

    def clear(self) -> None:
        """Forget all paths: the session is closed."""
        self._table.clear()
        self.current = None

    def relays(self) -> list[Path]:
        """Return the paths through a rendezvous, the one to use first."""
        relays = [path for path in self._table.values() if path.relay]
        return sorted(relays, key=lambda path: (path.state is State.LOST, -(path.last_heard or 0.0)))

    def relay_at(self, server: UdpEndpoint) -> Path | None:
        """Return the path through this rendezvous; there is one at most."""
        for path in self._table.values():
            if isinstance(path.endpoint, RelayEndpoint) and path.endpoint.server == server:
                return path
        return None

    def relay_rtt(self) -> float:
        """Return the smoothed RTT through the best relay in seconds, 0 where none was measured."""
        return next((path.rtt.smoothed for path in self.relays() if path.rtt.smoothed is not None), 0.0)

    def directs(self) -> list[Path]:
        """Return the paths that need nobody."""
        return [path for path in self._table.values() if not path.relay]

    def consented(self) -> list[DirectEndpoint]:
        """Return the endpoints at which the peer answered a challenge and that are not known to be dead."""
        return [
            path.endpoint
            for path in self._table.values()
            if not isinstance(path.endpoint, RelayEndpoint)
            and path.consented
            and path.state is not State.LOST
        ]

    def heard(self) -> Iterator[Endpoint]:
        """Yield the endpoints that something authentic came from."""
        return (path.endpoint for path in self._table.values() if path.last_heard is not None)

    # --- Probes -----------------------------------------------------------------------------------------

    def handle_timeout(self, now: float) -> None:
        """Let every path do what is due."""
        for path in self._table.values():
            path.handle_timeout(now)

    def probes(self, now: float) -> list[tuple[Path, Probe]]:
        """Return the probes to send now."""
        due: list[tuple[Path, Probe]] = []
        for path in self._table.values():
            while (probe := path.probe(self._next_id, now)) is not None:
                self.take_id()
                due.append((path, probe))
        return due

    def take_id(self) -> int:
        """Return an id for a probe: random, as a peer that could guess it need not be where it was sent."""
        number = self._next_id
        self._next_id = int.from_bytes(self._random(4), "big")
        return number

    def replied(self, reply: ProbeReply, source: Endpoint, stamp: float, now: float) -> Path | None:
        """Take an answer; return the path whose probe it answers, or None.

        A direct probe's answer may come from another address of the peer (it proves the way there, and that
        some way leads back); an answer through a relay speaks of that relay only.
        """
        path = self._table.get(source)
        if path is not None and path.replied(reply, stamp, now):
            return path
        if isinstance(source, RelayEndpoint):
            return None
        for path in self._table.values():
            if not path.relay and path.replied(reply, stamp, now):
                return path
        return None

    def deadline(self) -> float | None:
        """Return when `handle_timeout` or `probes` has something to do."""
        times = [when for path in self._table.values() if (when := path.deadline()) is not None]
        return min(times, default=None)

    def doubt(self, now: float, *, relays: bool = False) -> None:
        """Doubt every direct path, and the relays if told to: an address of ours or the peer's changed."""
        for path in self._table.values():
            if relays or not path.relay:
                path.doubt(now)

    def forgive(self) -> None:
        """Hold no silence of the last moments against any path: it was the peer that was away."""
        for path in self._table.values():
            path.forgive()

    # --- Choice -----------------------------------------------------------------------------------------

    def select(self, now: float, *, lively: bool) -> tuple[tuple[Endpoint, ...], int]:
        """Choose again and give each path its role.

        Returns the endpoints that data is sent to now and the UDP payload in bytes, a relay's header
        included, that passes to all of them. `lively` says whether there is traffic: without it the proofs
        are too rare to choose by, and the first packet goes both ways.
        """
        best = choose(self._table.values(), self.current, self.since, now) if lively else None
        if best is not None and best.relay and self._resting(now):
            best = None
        if best is not None:
            if best is not self.current:
                self.current, self.since = best, now
            used = [best]
        else:
            used = self._in_doubt()
        self._assign(used, now, lively=lively, doubt=best is None)
        size = min((path.size + (RELAY_HEADER if path.relay else 0) for path in used), default=BASE)
        return tuple(path.endpoint for path in used), size

    def _resting(self, now: float) -> bool:
        """Tell whether the direct path in use is only untried for a while, because nothing went over it."""
        current = self.current
        if current is None or current.relay:
            return False
        return current.state is State.PROVEN and not current.trusted(now)

    def _in_doubt(self) -> list[Path]:
        """Return what to use while no path is trusted: at most two, a direct one and a relay if possible."""
        directs = [path for path in self._table.values() if not path.relay and path.state in WAS_GOOD]
        relays = self.relays()
        current = self.current
        if current is not None and current in directs:
            return [current, *relays[:1]]
        if directs:
            proven = [path for path in directs if path.state is State.PROVEN]
            return [min(proven or directs, key=lambda path: path.cost), *relays[:1]]
        if current is None or current not in relays or current.state is State.LOST:
            return relays[:2]
        return [current, *[relay for relay in relays if relay is not current][:1]]

    def _assign(self, used: list[Path], now: float, *, lively: bool, doubt: bool) -> None:
        warm = sorted(
            (path for path in self.directs() if path not in used and path.state is State.PROVEN),
            key=lambda path: path.cost,
        )[:WARM_DIRECT]
        for path in self._table.values():
            if path in used or (doubt and lively and path in warm):
                role = Role.LIVE if lively else Role.IDLE
            elif path.relay or path in warm:
                role = Role.STANDBY if lively else (Role.IDLE if path.relay else Role.OFF)
            else:
                role = Role.OFF
            path.set_role(role, now)
