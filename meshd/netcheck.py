"""Which NAT is in front of us: one check of at most 5 s, over STUN to the rendezvous and other servers.

Socket 0 is the daemon's own; the others are fresh and have sent to nobody, because what a filter lets in
depends on where a socket has sent before:

    socket 0     asks each server at (address, port), (address, port 2) and, where it has a second address,
                 (address 2, port) and (address 2, port 2): mapping
    socket 1     asks for answers from elsewhere, and itself sends to one endpoint only: filtering
    socket 2...  ask one server once: allocation
    0 and 2      send to each other's outer endpoint: hairpin

What a server's second port is, its OTHER-ADDRESS says; one with a single address answers at the next port.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import islice
from typing import Any, Final

from crossedge.meshd.natverdict import Evidence, Finding, judge, port_step
from crossedge.meshd.stunclient import RETRANSMIT, StunAnswer, StunClient, StunTimeout
from crossedge.meshd.transmit import Transmit
from crossedge.wire import stun
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.errors import WireError
from crossedge.wire.record import NatVerdict

BUDGET: Final = 4.8  # seconds after which the report is made of what there is
MAX_SERVERS: Final = 4
EXTRA_SOCKETS: Final = 4  # that the check would like to have beside socket 0
FILTER_SOCKET: Final = 1
HAIRPIN_SOCKET: Final = 2
STAGGER: Final = 0.02  # seconds between fresh sockets, so that their order is the NAT's


class _Test(Enum):
    PRIMARY = "the server's first endpoint, from socket 0"
    ANOTHER = "one of its other endpoints, from socket 0"
    FILTER = "its first endpoint, from the filter socket"
    CHANGE_PORT = "an answer from its other port"
    CHANGE_ADDRESS = "an answer from its other address and port"
    FRESH = "its first endpoint, from a fresh socket"


@dataclass(frozen=True, slots=True)
class NetcheckReport:
    """What was found."""

    verdict: NatVerdict
    findings: tuple[Finding, ...]
    observations: tuple[tuple[UdpEndpoint, UdpEndpoint], ...]
    """(server's first endpoint, where it saw socket 0): for the candidates."""
    rtts: tuple[tuple[UdpEndpoint, float], ...]
    """(server, seconds)."""
    ports: tuple[int, ...]
    """Outer ports of the fresh sockets, in the order of asking."""
    step: int
    """Usual distance between them: what a port prediction begins with."""
    seconds: float
    """How long the check took."""

    def with_finding(self, finding: Finding) -> NetcheckReport:
        """Return the report with this finding in place of the one on its topic."""
        others = tuple(finding if each.topic == finding.topic else each for each in self.findings)
        return replace(self, findings=others)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "findings": {item.topic: {"value": item.value, "why": item.why} for item in self.findings},
            "observations": [{"server": str(s), "endpoint": str(e)} for s, e in self.observations],
            "rtt_ms": {str(server): round(rtt * 1000, 2) for server, rtt in self.rtts},
            "ports": list(self.ports),
            "step": self.step,
            "seconds": round(self.seconds, 3),
        }


class Netcheck:
    """One check. Core: poll it until `report` is there."""

    def __init__(
        self,
        servers: Iterable[UdpEndpoint],
        ports: Sequence[int],
        own_hosts: Iterable[str],
        random: Callable[[int], bytes],
        now: float,
    ) -> None:
        """Begin at once.

        Args:
            servers: STUN servers of one address family, rendezvous among them; at most 4 are asked.
            ports: local port of each socket, the daemon's first, then up to `EXTRA_SOCKETS` fresh ones.
            own_hosts: the host's own addresses.
            random: returns that many random bytes.
            now: seconds.
        """
        self.report: NetcheckReport | None = None
        self._stun = StunClient(random)
        self._random = random
        self._started = now
        self._evidence = Evidence(frozenset(own_hosts), tuple(ports))
        self._first: dict[UdpEndpoint, UdpEndpoint] = {}
        self._rtts: dict[UdpEndpoint, float] = {}
        self._filter_hosts: set[str] = set()  # that the filter socket has sent to
        self._filter_second = False
        self._reference: UdpEndpoint | None = None
        self._fresh: deque[tuple[float, int]] = deque()
        self._hairpin: dict[bytes, tuple[int, UdpEndpoint]] = {}  # transaction: socket it goes to, endpoint
        self._hairpin_tries = 0
        self._hairpin_due: float | None = None
        self._transmits: deque[Transmit] = deque()
        for server in islice(dict.fromkeys(servers), MAX_SERVERS):
            self._stun.ask(server, now, tag=_Test.PRIMARY)
        self._finish_if_done(now)

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> bool:
        """Take an untrusted STUN datagram from socket number `local`; return whether it is of this check."""
        transaction = datagram[8 : stun.HEADER]
        if transaction in self._hairpin:
            self._receive_hairpin(datagram, transaction, local)
            self._finish_if_done(now)
            return True
        mine = self._stun.receive(datagram, source, local, now)
        self._take_events(now)
        return mine

    def poll_transmit(self) -> Transmit | None:
        """Return the next datagram to send, from the socket that its `local` says."""
        return self._transmits.popleft() if self._transmits else self._stun.poll_transmit()

    def next_deadline(self) -> float | None:
        """Return when `handle_timeout` has something to do; None once the report is there."""
        if self.report is not None:
            return None
        deadlines = [self._started + BUDGET, self._stun.next_deadline(), self._hairpin_due]
        if self._fresh:
            deadlines.append(self._fresh[0][0])
        return min(deadline for deadline in deadlines if deadline is not None)

    def handle_timeout(self, now: float) -> None:
        """Go on."""
        if self.report is not None:
            return
        self._stun.handle_timeout(now)
        while self._fresh and self._fresh[0][0] <= now and self._reference is not None:
            self._stun.ask(self._reference, now, tag=_Test.FRESH, local=self._fresh.popleft()[1])
        if self._hairpin_due is not None and self._hairpin_due <= now:
            self._send_hairpin(now)
        self._take_events(now)

    # --- Steps ----------------------------------------------------------------------------------------

    def _take_events(self, now: float) -> None:
        for event in iter(self._stun.poll_event, None):
            if isinstance(event, StunAnswer):
                self._answered(event, now)
            elif isinstance(event, StunTimeout):
                self._unanswered(event)
        self._finish_if_done(now)

    def _answered(self, answer: StunAnswer, now: float) -> None:
        evidence, tag = self._evidence, answer.tag
        if tag is _Test.PRIMARY:
            evidence.mapped[answer.destination] = answer.mapped
            self._first[answer.destination] = answer.mapped
            if answer.rtt is not None:
                self._rtts[answer.destination] = answer.rtt
            self._ask_further(answer, now)
        elif tag is _Test.ANOTHER:
            evidence.mapped[answer.destination] = answer.mapped
        elif tag is _Test.FILTER:
            evidence.filter_tested = True
            if answer.destination == self._reference:
                evidence.fresh[FILTER_SOCKET] = answer.mapped
        elif tag is _Test.CHANGE_PORT and answer.source.host == answer.destination.host:
            if answer.source != answer.destination:
                evidence.port_passed = True
        elif tag is _Test.CHANGE_ADDRESS and answer.source.host != answer.destination.host:
            evidence.address_passed = True
        elif tag is _Test.FRESH:
            evidence.fresh[answer.local] = answer.mapped
        self._begin_hairpin(now)

    def _unanswered(self, event: StunTimeout) -> None:
        """Take silence as a filter's work: who cannot answer from elsewhere refuses, which says nothing."""
        evidence = self._evidence
        if event.tag is _Test.CHANGE_PORT and evidence.port_passed is None:
            evidence.port_passed = False
        elif event.tag is _Test.CHANGE_ADDRESS and evidence.address_passed is None:
            evidence.address_passed = False

    def _ask_further(self, primary: StunAnswer, now: float) -> None:
        """Ask everything else of a server that has answered."""
        server, other = primary.destination, primary.other
        second = (
            other is not None and other.host != server.host and (":" in other.host) == (":" in server.host)
        )
        port = other.port if other is not None and other.port != server.port else server.port + 1
        targets = [UdpEndpoint(server.host, port)]
        if second and other is not None:
            targets += [UdpEndpoint(other.host, server.port), UdpEndpoint(other.host, port)]
        for target in targets:
            if target not in self._evidence.mapped and target.port < 65_536:
                self._stun.ask(target, now, tag=_Test.ANOTHER)
        self._ask_filter(server, other.host if second and other is not None else None, now)
        if self._reference is None:
            self._reference = server
            for turn, local in enumerate(range(HAIRPIN_SOCKET, len(self._evidence.ports)), start=1):
                self._fresh.append((now + turn * STAGGER, local))

    def _ask_filter(self, server: UdpEndpoint, other_host: str | None, now: float) -> None:
        """Ask the first server for answers from elsewhere, and one more if that has just one address."""
        if len(self._evidence.ports) <= FILTER_SOCKET or self._filter_second:
            return
        if self._filter_hosts and (other_host is None or other_host in self._filter_hosts):
            return
        self._filter_hosts.add(server.host)
        self._filter_second = other_host is not None
        local = FILTER_SOCKET
        self._stun.ask(server, now, tag=_Test.FILTER, local=local)
        self._stun.ask(server, now, tag=_Test.CHANGE_PORT, local=local, change_port=True)
        if other_host is not None:
            self._stun.ask(
                server, now, tag=_Test.CHANGE_ADDRESS, local=local, change_ip=True, change_port=True
            )

    def _begin_hairpin(self, now: float) -> None:
        """Once the outer endpoints of sockets 0 and 2 are known, send from each to the other's."""
        theirs = self._evidence.fresh.get(HAIRPIN_SOCKET)
        if self._hairpin or theirs is None or self._reference is None or not self._evidence.translated:
            return
        self._hairpin[self._random(stun.TRANSACTION)] = 0, self._first[self._reference]
        self._hairpin[self._random(stun.TRANSACTION)] = HAIRPIN_SOCKET, theirs
        self._send_hairpin(now)

    def _send_hairpin(self, now: float) -> None:
        if self._hairpin_tries == len(RETRANSMIT):
            self._hairpin_due = None
            if self._evidence.hairpin is None:
                self._evidence.hairpin = False
            return
        for transaction, (target, endpoint) in self._hairpin.items():
            sender = HAIRPIN_SOCKET if target == 0 else 0
            self._transmits.append(Transmit(endpoint, stun.encode_request(transaction), None, sender))
        self._hairpin_due = now + RETRANSMIT[self._hairpin_tries]
        self._hairpin_tries += 1

    def _receive_hairpin(self, datagram: bytes, transaction: bytes, local: int) -> None:
        try:
            message = stun.decode(datagram)
        except WireError:
            return
        if isinstance(message, stun.Request) and local == self._hairpin[transaction][0]:
            self._evidence.hairpin = True
            self._hairpin_due = None

    def _finish_if_done(self, now: float) -> None:
        if self.report is not None:
            return
        waiting = len(self._stun) or self._fresh or self._hairpin_due is not None
        if waiting and now < self._started + BUDGET:
            return
        verdict, findings = judge(self._evidence)
        ports = tuple(endpoint.port for _, endpoint in sorted(self._evidence.fresh.items()))
        self.report = NetcheckReport(
            verdict,
            findings,
            tuple(self._first.items()),
            tuple(self._rtts.items()),
            ports,
            port_step(ports),
            now - self._started,
        )
