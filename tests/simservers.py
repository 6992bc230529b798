"""The servers of the simulated world: rendezvous that can be killed, and plain STUN servers."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from crossedge.lab.internet import Host, Internet, Transmit
from crossedge.rendezvous.service import Service
from crossedge.rendezvous.settings import SourceLimits
from crossedge.rendezvous.stunserver import StunServer, address_group
from crossedge.wire.endpoint import UdpEndpoint
from crossedge.wire.envelope import ControlKey

if TYPE_CHECKING:
    from tests.simworld import SimNode, SimWorld

TODAY = 1_760_000_000.0


class StunHost:
    """A plain STUN server: an observer that is independent of the rendezvous."""

    def __init__(self, net: Internet, host: Host) -> None:
        self.endpoint = UdpEndpoint(host.addresses[0], 3478)
        self._core = StunServer(SourceLimits(slots=64), net.random)
        self._core.locals.extend(address_group((host.addresses[0],), (3478, 3479), 0))
        self._out: deque[Transmit] = deque()
        host.attach(self, sockets=[local.bound for local in self._core.locals], indexed=True)

    def receive(self, datagram: bytes, source: UdpEndpoint, local: int, now: float) -> None:
        answer = self._core.answer(datagram, source, local, now)
        if answer is not None:
            self._out.append(Transmit(answer.destination, answer.datagram, None, answer.local))

    def poll_transmit(self) -> Transmit | None:
        return self._out.popleft() if self._out else None

    def next_deadline(self) -> None:
        return None

    def handle_timeout(self, now: float) -> None:
        raise AssertionError("has no timers")


class SimServer:
    """A rendezvous that can be killed and started."""

    def __init__(self, world: SimWorld, name: str, region: str) -> None:
        self.world = world
        self.host = world.net.host(name, region=region, six=world.six)
        self.key = ControlKey.generate(world.net.random)
        self.service: Service | None = None
        self.start()

    @property
    def endpoint(self) -> UdpEndpoint:
        return UdpEndpoint(self.host.addresses[0], 3478)

    def endpoint_for(self, node: SimNode) -> UdpEndpoint:
        """Return where a node reaches it: by IPv6 if that is all it has."""
        own = [":" in address for address in node.host.addresses]
        return next(UdpEndpoint(host, 3478) for host in self.host.addresses if (":" in host) in own)

    def start(self) -> None:
        net = self.world.net
        locals_ = address_group((self.host.addresses[0],), (3478, 3479), 0)
        for address in self.host.addresses[1:]:
            locals_ += address_group((address,), (3478, 3479), len(locals_))
        self.service = Service(
            self.key,
            [self.world.ca.public],
            locals_,
            net.random,
            net.now,
            TODAY - net.now,
            SourceLimits(slots=256),
        )
        self.host.attach(
            self.service,
            sockets=[local.bound for local in locals_],
            indexed=True,
            unpack=lambda item: Transmit(item.destination, item.datagram, None, item.local),
        )

    def kill(self) -> None:
        self.host.detach()
        self.service = None
