"""The event loop's side of the mesh: joins the core, the data path and the shells, and keeps one timer.

    UDP shell --> DataPlane.inbound --> Mesh      whatever was called, `settle` drains the core afterwards:
    TUN shell --> DataPlane.outbound, flush       events first, then datagrams, then the timer is set

It holds no rules: what to do is decided by `Mesh`, `DataPlane` and `HostState`.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from crossedge.host.clock import boottime
from crossedge.host.device import overflowed
from crossedge.host.tun import Tun
from crossedge.host.udp import UdpSocket, open_udp
from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.dataplane import DataPlane
from crossedge.meshd.desired import MARK
from crossedge.meshd.events import LinkReady, MeshEvent, RoutesChanged, SocketsFreed
from crossedge.meshd.inbound import Arrival
from crossedge.meshd.keypair import Keypair
from crossedge.meshd.link import Link
from crossedge.meshd.mesh import Mesh
from crossedge.meshd.tun import TunShell
from crossedge.meshd.udp import UdpShell
from crossedge.meshd.virtio import Offloads
from crossedge.wire.endpoint import Endpoint, Network, UdpEndpoint

LONGEST_SLEEP: Final = 60.0  # seconds: the timer is set anew at least this often
FAULT_PAUSE: Final = 0.5  # seconds until the core is called again after a fault
EARLY: Final = 0.0005  # seconds that the timer may fire before its time, to spare setting it anew
EXTRA_READS: Final = 64  # datagrams taken from a fresh socket of a network check in one wake-up
EXTRA_SIZE: Final = 2048


@dataclass(frozen=True, slots=True)
class Own:
    """What is ours inside the mesh."""

    networks: tuple[Network, ...]
    """Pod prefixes and overlay addresses."""
    overlay4: IPv4Address | None
    overlay6: IPv6Address | None


class Engine:
    """One mesh on one event loop, between one TUN and its UDP sockets."""

    def __init__(
        self,
        mesh: Mesh,
        allowed: AllowedIPs[Link],
        own: Own,
        tun: Tun,
        sockets: list[UdpSocket],
        *,
        mtu: int,
        on_event: Callable[[MeshEvent], None],
    ) -> None:
        """Join everything; nothing is read before `start`.

        `allowed` is the table that `mesh` fills. `mtu` is the TUN's, in bytes. `on_event` gets every event of
        the core but those that the data path wants.
        """
        self.mesh = mesh
        self.dropped: Counter[str] = Counter()
        networks: AllowedIPs[bool] = AllowedIPs()
        for network in own.networks:
            networks.insert(network, True)
        self.udp = UdpShell(
            sockets,
            receive=self._receive,
            after=self._after,
            clock=boottime,
            too_big=self._too_big,
            blocked=self._blocked,
            further=self._further,
        )
        self.plane = DataPlane(
            allowed=allowed,
            own=networks,
            indices=mesh.device.indices,
            link_of=lambda session: session.owner.link,
            transmit=self.udp.transmit,
            way=self.udp.way,
            write=lambda _: None,  # until there is a shell for the TUN, which is before anything is read
            control=self._control,
            inner=self._inner,
            wanted=self._wanted,
            moved=self._moved,
            report=self._report,
            unknown=self._unknown,
            written=self._written,
            offloads=Offloads.named(tun.offloads),
            mtu=mtu,
        )
        self.udp.lone = self.plane.inbound_lone
        self.udp.whole, self.udp.end_wholes = self.plane.whole, self.plane.end_wholes
        self._on_event = on_event
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.Handle | None = None
        self._due_at = 0.0
        self._stirred = False
        self._extra: list[UdpSocket] = []
        self._tun = self._tun_shell(tun)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Read from now on."""
        self._loop = loop
        self.udp.start(loop)
        self._tun.start(loop)
        self.settle()

    def stop(self) -> None:
        """Stop; descriptors stay their owners'."""
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
        self._close_extra()
        self._tun.stop()
        self.udp.stop()

    def replace_tun(self, tun: Tun) -> None:
        """Read and write another TUN from now on: somebody deleted the one before."""
        self._tun.stop()
        self.dropped += self._tun.dropped
        self._tun = self._tun_shell(tun)
        if self._loop is not None:
            self._tun.start(self._loop)

    def all_dropped(self) -> Counter[str]:
        """Return what was dropped and why, of the data path, the core and the shells."""
        counters = (
            self.dropped,
            self.plane.dropped,
            self._tun.dropped,
            self.udp.dropped,
        )
        if lost := overflowed(self._tun_descriptor):
            self.dropped["tun-read-overflow"] += lost
        total = self.mesh.all_dropped()
        for counter in counters:
            total.update(counter)
        return total

    # --- Network checks ---------------------------------------------------------------------------------

    def begin_netcheck(self, main_port: int, extra: list[UdpSocket]) -> None:
        """Start a network check with some fresh sockets, which are closed when it ends."""
        self._close_extra()
        self._extra = extra
        if self._loop is not None:
            for number, opened in enumerate(extra, 1):
                self._loop.add_reader(opened.socket.fileno(), self._readable_extra, opened, number)
        self.mesh.begin_netcheck([main_port, *(opened.port for opened in extra)], boottime())
        self.settle()

    def _readable_extra(self, opened: UdpSocket, number: int) -> None:
        for _ in range(EXTRA_READS):
            try:
                datagram, address = opened.socket.recvfrom(EXTRA_SIZE)
            except OSError:  # nothing more, or the kernel's word on an earlier datagram
                break
            self.mesh.receive(datagram, UdpEndpoint(*address[:2]), boottime(), local=number)
        self.settle()

    def _further(self, number: int) -> UdpSocket | None:
        """Open a further socket, as long as the core has a use for its number."""
        return open_udp(socket.AF_INET, 0, MARK) if number in self.mesh.services.sockets else None

    def _close_extra(self) -> None:
        for opened in self._extra:
            if self._loop is not None:
                self._loop.remove_reader(opened.socket.fileno())
            opened.close()
        self._extra = []

    # --- What the data path and the shells call ---------------------------------------------------------

    def _tun_shell(self, tun: Tun) -> TunShell:
        shell = TunShell(
            tun.descriptor,
            self.plane.buffer,
            lone=self.plane.lone,
            after=self._after,
            outbound=self.plane.outbound,
            flush=self._flush,
            clock=boottime,
            lost=self._tun_lost,
            vnet_header=tun.vnet_header > 0,
            sender=tun.sender,
            mac=tun.mac,
        )
        self._tun_descriptor = tun.descriptor
        self.plane.write_to(shell.write, shell.join, Offloads.named(tun.offloads))
        return shell

    def _tun_lost(self, error: OSError) -> None:  # the host's state hears of it by itself and opens another
        self.dropped[f"tun-lost-{error.errno}"] += 1

    def _receive(self, buffer: bytearray, arrivals: list[Arrival], now: float) -> None:
        self.plane.inbound(buffer, arrivals, now)
        self._after()

    def _after(self) -> None:
        """Drain the core if what the data path did stirred it."""
        if self._stirred or self.mesh.stirred:
            self.settle()

    def _flush(self, now: float) -> None:
        self.plane.flush(now)
        self._after()

    def _control(self, datagram: bytes, source: Endpoint, _: float) -> None:
        self._stirred = True
        self.mesh.receive(datagram, source, boottime())

    def _inner(self, link: Link, plaintext: bytes, source: Endpoint, stamp: float) -> None:
        self._stirred = True
        self.mesh.receive_inner(link, plaintext, source, boottime(), stamp)

    def _wanted(self, link: Link) -> None:
        self._stirred = True
        self.mesh.want_session(link, boottime())

    def _written(self) -> None:
        self._tun.look()

    def _moved(self, link: Link, source: Endpoint, size: int) -> None:
        self._stirred = True
        self.mesh.roamed(link, source, size, boottime())

    def _report(self, link: Link, keypair: Keypair) -> None:
        self._stirred = True
        self.mesh.report(link, keypair, boottime())

    def _unknown(self, address: bytes) -> None:
        self._stirred = True
        self.mesh.want_address(address, boottime())

    def _too_big(self, endpoint: Endpoint, size: int) -> None:
        self._stirred = True
        self.mesh.datagram_too_big(endpoint, boottime(), size)

    def _blocked(self, yes: bool) -> None:
        self._tun.pause(yes)

    # --- Draining the core ------------------------------------------------------------------------------

    def settle(self) -> None:
        """Hand out what the core says and sends, then set the timer for when it wants to be called.

        Packets alone do not stir the core: it need not be asked after every one.
        """
        self._stirred = self.mesh.stirred = False
        try:
            self._drain()
        except Exception:  # a fault in handling one event must not leave the mesh without a timer
            self._arm(FAULT_PAUSE)
            raise
        self._arm()

    def _drain(self) -> None:
        mesh = self.mesh
        while True:
            while (event := mesh.poll_event()) is not None:
                if isinstance(event, LinkReady):
                    self.plane.flush_queue(event.link, boottime())
                    continue
                if isinstance(event, SocketsFreed):
                    self.udp.close_further(event.numbers)
                    continue
                if isinstance(event, RoutesChanged):
                    self.plane.claim(boottime())
                self._on_event(event)
            if (item := mesh.poll_transmit(boottime)) is None:
                break
            while item is not None:
                if not item.local:
                    self.udp.send(item.datagram, item.destination, item.ttl)
                elif item.local <= len(self._extra) and isinstance(item.destination, UdpEndpoint):
                    self._send_extra(self._extra[item.local - 1], item.datagram, item.destination)
                item = mesh.poll_transmit(boottime)
        if self._extra and not mesh.netcheck_running:
            self._close_extra()

    def _send_extra(self, opened: UdpSocket, datagram: bytes, destination: UdpEndpoint) -> None:
        try:
            opened.socket.sendto(datagram, destination)
        except OSError:
            self.dropped["netcheck-send"] += 1

    def _arm(self, pause: float = 0.0) -> None:
        """Set the timer for the core's deadline, or, after a fault, for the end of a pause."""
        if self._loop is None:
            return
        now = boottime()
        when = now + pause if pause else min(self.mesh.next_deadline(), now + LONGEST_SLEEP)
        if self._timer is not None:
            if self._due_at <= when < self._due_at + EARLY:
                return
            self._timer.cancel()
        self._due_at = when
        # Up to a whole millisecond, the loop's measure: a timer that came before its time would be set anew,
        # for no time at all, again and again until the time has come.
        wait = math.ceil(max(0.0, when - now) * 1000.0) / 1000.0
        self._timer = self._loop.call_later(wait, self._due)

    def _due(self) -> None:
        self._timer = None
        try:
            self.mesh.handle_timeout(boottime())
        except Exception:
            self._arm(FAULT_PAUSE)
            raise
        self.settle()
