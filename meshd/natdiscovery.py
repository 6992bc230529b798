"""What the node finds out about the NAT before it, by asking servers where they see its sockets.

    observers   STUN servers that are asked all along where our one socket is seen: candidates
    netcheck    what kind of NAT it is (RFC 5780), at start and when the network is another one
    lifetime    how long its mappings live, after each check
    scouts      where one of the further sockets is seen, for whoever opened it to punch

What comes out is the verdict, which our record tells everyone, and the report for people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from crossedge.meshd.candidates import Candidates
from crossedge.meshd.controlhost import ControlHost
from crossedge.meshd.lifetime import SOCKETS as LIFETIME_SOCKETS
from crossedge.meshd.lifetime import LifetimeCheck
from crossedge.meshd.natverdict import Finding
from crossedge.meshd.netcheck import Netcheck, NetcheckReport
from crossedge.meshd.stunclient import StunAnswer, StunClient, StunObservers
from crossedge.meshd.transmit import Transmit
from crossedge.wire.endpoint import DirectEndpoint, SocketEndpoint, UdpEndpoint
from crossedge.wire.record import CandidateKind, NatVerdict


class NatDiscovery:
    """Everything that asks STUN servers."""

    def __init__(
        self,
        stun: Sequence[UdpEndpoint],
        candidates: Candidates,
        host: ControlHost,
        changed: Callable[[float], None],
        dropped: Counter[str],
        random: Callable[[int], bytes],
        now: float,
    ) -> None:
        """Nothing is known yet.

        Args:
            stun: the servers of the configuration; rendezvous are named at each check.
            candidates: learns where we are seen.
            host: opens further sockets, and hears where they are seen.
            changed: called with the time when the verdict or the candidates are other ones.
            dropped: counts what nobody asked for.
            random: returns that many random bytes.
            now: seconds of CLOCK_BOOTTIME.
        """
        self.verdict = NatVerdict()
        self.report: NetcheckReport | None = None
        self.netcheck: Netcheck | None = None
        self.lifetime: LifetimeCheck | None = None
        self.observers = StunObservers(stun, random, now)
        self._scouts = StunClient(random)
        self._stun = stun
        self._candidates = candidates
        self._host = host
        self._changed = changed
        self._dropped = dropped
        self._random = random

    def set_verdict(self, verdict: NatVerdict, now: float) -> None:
        """Take what the network check found."""
        self.verdict = verdict
        self._changed(now)

    def begin_netcheck(self, rendezvous: Sequence[UdpEndpoint], ports: Sequence[int], now: float) -> None:
        """Start a network check with sockets on these local ports, the daemon's own first.

        With nobody to ask there is none, and what an earlier one found still stands.
        """
        known = [*rendezvous, *self._stun]
        servers = [server for server in known if ":" not in server.host]
        if not servers:
            return
        hosts = [c.endpoint.host for c in self._candidates.current if c.kind is CandidateKind.HOST]
        self.netcheck = Netcheck(servers, ports, hosts, self._random, now)
        self._netcheck_done(now)

    def _netcheck_done(self, now: float) -> None:
        if self.netcheck is None or self.netcheck.report is None:
            return
        self.report = self.netcheck.report
        self.netcheck = None
        known = self.verdict
        verdict = self.report.verdict
        if (verdict.mapping, verdict.allocation) == (known.mapping, known.allocation):
            verdict = replace(verdict, lifetime=known.lifetime)
        self.set_verdict(verdict, now)
        self._measure_lifetime(now)

    def _measure_lifetime(self, now: float) -> None:
        """Find out how long a mapping lives; what was measured before stands until then."""
        servers = [server for server, _ in self.report.observations] if self.report is not None else []
        sockets = self._host.further_sockets(LIFETIME_SOCKETS if servers else 0)
        self.lifetime = LifetimeCheck(servers[0], sockets, self._random, now) if sockets else None

    def _lifetime_done(self, now: float) -> None:
        check = self.lifetime
        if check is None or not check.done:
            return
        self.lifetime = None
        self._host.further_sockets(0)
        if self.report is not None:
            value = "unknown" if check.lifetime is None else f"{check.lifetime} s"
            self.report = self.report.with_finding(Finding("lifetime", value, check.why))
        self.set_verdict(replace(self.verdict, lifetime=check.lifetime), now)

    def scout(self, rendezvous: Sequence[UdpEndpoint], local: int, now: float) -> bool:
        """Ask a server where it sees this further socket; False where there is none to ask."""
        servers = [each for each in (*rendezvous, *self._stun) if ":" not in each.host]
        return bool(servers) and self._scouts.ask(servers[0], now, local=local)

    def receive(self, datagram: bytes, source: DirectEndpoint, local: int, now: float) -> None:
        """Take an untrusted STUN datagram; `local` numbers the sockets of a network check."""
        if isinstance(source, SocketEndpoint):
            if self.lifetime is not None and self.lifetime.receive(datagram, source, now):
                self._lifetime_done(now)
                return
            if not self._scouts.receive(datagram, source.remote, source.local, now):
                self._dropped["unasked-stun"] += 1
            while (event := self._scouts.poll_event()) is not None:
                if isinstance(event, StunAnswer):
                    self._host.scouted(event.local, event.mapped, now)
            return
        if self.netcheck is not None and self.netcheck.receive(datagram, source, local, now):
            self._netcheck_done(now)
            return
        if not local and self.observers.receive(datagram, source, now):
            while (seen := self.observers.poll_event()) is not None:
                if self._candidates.observe(seen.observer, seen.host, seen.endpoint):
                    self._changed(now)
            return
        self._dropped["unasked-stun"] += 1

    def poll_transmit(self) -> Transmit | None:
        """Return the next datagram to send, or None."""
        if (item := self._scouts.poll_transmit()) is not None and isinstance(item.destination, UdpEndpoint):
            return Transmit(SocketEndpoint(item.destination, item.local), item.datagram)
        if self.lifetime is not None and (sent := self.lifetime.poll_transmit()) is not None:
            return Transmit(*sent)
        if self.netcheck is not None and (item := self.netcheck.poll_transmit()) is not None:
            return item
        return self.observers.poll_transmit()

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do; None: never."""
        parts = (self.netcheck, self.observers, self._scouts, self.lifetime)
        times = [None if part is None else part.next_deadline() for part in parts]
        return min((when for when in times if when is not None), default=None)

    def handle_timeout(self, now: float) -> None:
        """Do what is due."""
        if self.netcheck is not None:
            self.netcheck.handle_timeout(now)
            self._netcheck_done(now)
        self.observers.handle_timeout(now)
        if self.lifetime is not None:
            self.lifetime.handle_timeout(now)
            self._lifetime_done(now)
        self._scouts.handle_timeout(now)
        while self._scouts.poll_event() is not None:
            pass  # no answer: whoever waits for it has a time limit of its own
