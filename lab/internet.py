"""An in-memory internet with a virtual clock and a seed: hosts behind NATs, without a socket or a task.

    net = Internet(seed=1)
    server = net.host("server", region="a")
    home = net.router("home", kind="port-restricted", region="b")
    alice = home.host("alice")
    server.attach(Server(), port=3478)
    alice.attach(Client(server.endpoint()), port=41820)
    net.run_for(2.0)

A protocol is anything with `receive(datagram, source, now)`, `poll_transmit()`, `next_deadline()` and
`handle_timeout(now)`; what it transmits has `destination` and `datagram`, and may have `ttl` and `local` (the
index of the host's socket). The same seed and the same calls give the same packets at the same times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from crossedge.lab.chance import Chance
from crossedge.lab.hosts import Host, Packet, Transmit
from crossedge.lab.links import Conditions, Lane, Link
from crossedge.lab.nat import NatKind, kind
from crossedge.lab.routers import Router

__all__ = ["Conditions", "Host", "Internet", "Link", "Packet", "Router", "Transmit"]

ACCESS_LINK = Conditions(delay=0.002, hops=1)
SAME_REGION = Conditions(delay=0.001, hops=2)
OTHER_REGION = Conditions(delay=0.0128, hops=6)  # with two access links and two LANs about 34 ms RTT


class Internet:
    """The public internet: regions with a backbone between them, a clock, and everything that is joined."""

    def __init__(self, seed: int = 1, start: float = 1_000.0) -> None:
        self.now = start
        self.chance = Chance(seed)
        self.hosts: dict[str, Host] = {}
        self.routers: dict[str, Router] = {}
        self.public: dict[str, Host | Router] = {}
        """Who answers to a public address."""
        self.failures: list[Callable[[Packet, Host], bool]] = []
        """Each is asked at delivery; a packet that any calls lost is dropped (see `cut`)."""
        self.watchers: list[Callable[[Packet, float], None]] = []
        """Each sees every packet that crosses the public internet."""
        self.sent = 0
        self.delivered = 0
        self.dropped: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self._regions: dict[str, int] = {}
        self._backbone: dict[tuple[str, str], Lane] = {}
        self._next: Counter[str] = Counter()
        self._links = self.chance.fork("links")

    def random(self, size: int) -> bytes:
        """Return seeded bytes: what a core takes as its `random`."""
        return self.chance.token(size)

    def host(self, name: str, *, region: str = "a", six: bool = False, addresses: int = 1) -> Host:
        """Put a host on the public internet, with one or more IPv4 addresses."""
        host = Host(self, name, region, None, Link(ACCESS_LINK))
        host.addresses = [self.next_address(region) for _ in range(addresses)]
        if six:
            host.addresses.append(f"{self.prefix6(host)}::1")
        self.hosts[name] = host
        self.public.update(dict.fromkeys(host.addresses, host))
        return host

    def router(
        self,
        name: str,
        kind: str | NatKind = "port-restricted",
        *,
        region: str = "a",
        lan: str | None = None,
        link: Conditions = ACCESS_LINK,
        addresses: int = 1,
        six: str = "firewall",
    ) -> Router:
        """Put a router on the public internet; `lan` is the first three bytes of its LAN, as "192.168.1"."""
        router = self.make_router(name, region, None, kind, lan, link, six)
        router.connect(tuple(self.next_address(region) for _ in range(addresses)))
        self.public.update(dict.fromkeys(router.addresses, router))
        return router

    def backbone(self, a: str, b: str, conditions: Conditions) -> None:
        """Set how packets go between two regions (or within one), both ways."""
        self._backbone[a, b] = Lane(conditions)
        if a != b:
            self._backbone[b, a] = Lane(conditions)

    def cut(self, a: str, b: str, *, one_way: bool = False) -> Callable[[], None]:
        """Lose what goes from host `a` to host `b` (and back); return the function that mends it."""

        def broken(packet: Packet, target: Host) -> bool:
            pair = (packet.origin.name, target.name)
            return pair == (a, b) or (not one_way and pair == (b, a))

        self.failures.append(broken)
        return lambda: self.failures.remove(broken)

    # Time

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Call `action(*args)` at that time."""
        self._serial += 1
        heappush(self._events, (when, self._serial, action, args))

    def step(self, until: float) -> bool:
        """Do the next event at or before `until`; return whether there was one."""
        if not self._events or self._events[0][0] > until:
            return False
        when, _, action, args = heappop(self._events)
        self.now = max(self.now, when)
        action(*args)
        return True

    def run_until(self, when: float) -> None:
        """Let everything happen up to that time; the clock stands there afterwards."""
        events = self._events
        while events and events[0][0] <= when:
            at, _, action, args = heappop(events)
            if at > self.now:
                self.now = at
            action(*args)
        self.now = max(self.now, when)

    def run_for(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self.run_until(self.now + seconds)

    def run_while(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Run as long as `condition()` holds; return False where it still holds after `timeout` seconds."""
        end = self.now + timeout
        while condition():
            if not self.step(end):
                self.now = end
                return not condition()
        return True

    # What hosts and routers use

    def carry(self, packet: Packet, lane: Lane, arrive: Callable[..., None], *args: Any) -> None:
        """Send a packet over one direction of a link; `arrive(packet, *args)` is called at its other end."""
        when = lane.admit(packet.size, self.now, self._links)
        hops = lane.conditions.hops
        if when.__class__ is str:
            self.drop(str(when), packet)
        elif packet.ttl <= hops:
            self.drop("ttl", packet)
        else:
            packet.ttl -= hops
            self._serial += 1
            heappush(self._events, (float(when), self._serial, arrive, (packet, *args)))

    def route(self, packet: Packet, region: str) -> None:
        """Carry a packet over the backbone to whom its destination belongs."""
        for watch in self.watchers:
            watch(packet, self.now)
        target = self.public.get(packet.destination[0])
        if target is None:
            self.drop("unroutable", packet)
            return
        pair = (region, target.region)
        lane = self._backbone.get(pair)
        if lane is None:
            lane = self._backbone[pair] = Lane(SAME_REGION if region == target.region else OTHER_REGION)
        self.carry(packet, lane, self._arrive)

    def drop(self, reason: str, packet: Packet) -> None:
        """Count a lost packet under a name, in all and for the host that sent it."""
        self.dropped[reason] += 1
        packet.origin.counters[f"lost: {reason}"] += 1

    def make_router(
        self,
        name: str,
        region: str,
        above: Router | None,
        nat: str | NatKind,
        lan: str | None,
        link: Conditions,
        six: str,
    ) -> Router:
        """Make a router that has no outer address yet."""
        self._next["lan"] += 1
        lan = lan or f"192.168.{self._next['lan'] % 256}"
        four = kind(nat) if isinstance(nat, str) else nat
        if not four.translates:
            raise ValueError(f"router {name}: {four.name} does not translate: use it for IPv6 only")
        router = Router(self, name, region, above, Link(link), lan, four, kind(six))
        self.routers[name] = router
        return router

    def next_address(self, region: str) -> str:
        """Return a fresh public IPv4 address of the region."""
        number = self._regions.setdefault(region, len(self._regions))
        self._next[region] += 1
        index = self._next[region]
        return f"5.{number}.{index // 250}.{index % 250 + 1}"

    def prefix6(self, owner: Host | Router) -> str:
        """Return the first 64 bits of the owner's IPv6 network."""
        number = self._regions.setdefault(owner.region, len(self._regions))
        names = [*self.routers, *self.hosts]
        index = names.index(owner.name) if owner.name in names else len(names)
        return f"2a00:{number + 1:x}:{'1' if isinstance(owner, Router) else '2'}:{index + 1:x}"

    def _arrive(self, packet: Packet) -> None:
        target = self.public.get(packet.destination[0])
        if target is None:
            self.drop("unroutable", packet)
        elif isinstance(target, Router):
            self.carry(packet, target.link.down, target.from_outside)
        else:
            self.carry(packet, target.link.down, target.deliver)
