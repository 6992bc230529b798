"""The daemon: opens what it needs, joins it, keeps it going, and ends without disturbing the pods.

Start: sockets and TUN (inherited ones first, so that NAT mappings live on), host state, core, control socket.
Stop: the interface, its routes and rules stay, so pods keep what they have; see `hostplan.remove_traces`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Coroutine, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from crossedge.host import descriptors
from crossedge.host.clock import boottime, realtime_offset, synchronised
from crossedge.host.cpu import has_aes
from crossedge.host.interfaces import default_route_mtu, default_routes, host_addresses
from crossedge.host.monitor import Event, Monitor
from crossedge.host.tun import Tun
from crossedge.host.udp import UdpSocket, open_udp
from crossedge.meshd.allowedips import AllowedIPs
from crossedge.meshd.answers import Answers
from crossedge.meshd.cniserver import PodServer
from crossedge.meshd.config import MeshdConfig
from crossedge.meshd.control import ControlServer
from crossedge.meshd.desired import MARK
from crossedge.meshd.engine import Engine, Own
from crossedge.meshd.events import (
    BlocklistToPersist,
    Direct,
    MeshEvent,
    Notice,
    PathChanged,
    PingResult,
    ReachChanged,
    RoutesChanged,
    SessionChanged,
    StateToPersist,
)
from crossedge.meshd.hostplan import HOST_RECORD, plan, tun_offloads_off
from crossedge.meshd.hoststate import HostState
from crossedge.meshd.identity import Identity, under
from crossedge.meshd.inner import Aeads
from crossedge.meshd.keeper import Keeper
from crossedge.meshd.link import Link
from crossedge.meshd.mesh import Mesh
from crossedge.meshd.netcheck import EXTRA_SOCKETS
from crossedge.meshd.netwatch import Found, NetworkWatch
from crossedge.meshd.reporter import Reporter, Source
from crossedge.meshd.resolve import FAMILIES, keep_resolved, resolve, split
from crossedge.meshd.sequence import Sequence
from crossedge.meshd.settings import MeshSettings
from crossedge.meshd.sockets import Inherited, open_sockets
from crossedge.meshd.state import StateStore
from crossedge.meshd.staticpeer import StaticPeerSettings
from crossedge.meshd.virtio import Offloads
from crossedge.meshd.wallclock import Wallclock
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.endpoint import Endpoint, UdpEndpoint
from crossedge.wire.errors import ConfigError, WireError

SOCKET_NAME: Final = "meshd.sock"
CLOCK_INTERVAL: Final = 5.0  # seconds between looks at the system clock
PERSIST_INTERVAL: Final = 60.0  # seconds between looks at what changes all the time
NETWORK_DELAY: Final = 0.1  # seconds between a network event and the look at the addresses
NETWORK_AGAIN: Final = 1.0  # seconds between looks while the kernel refuses to answer
NETCHECK_DELAY: Final = 1.0  # seconds between a change of the network and the check of its NAT
NETCHECK_AGAIN: Final = 30.0  # seconds between checks that nobody answers
STATIC_RESOLVE: Final = 3.0  # seconds that the start waits for names of stock peers
REACHED: Final = ("no peer is reached: pods here are cut off", "a peer is reached again")
UNDERLAY_MTU: Final = 1500  # bytes, where there is no default route to ask

log = logging.getLogger("meshd")


class Daemon:
    """One node."""

    def __init__(
        self, config: MeshdConfig, identity: Identity, preshared: Mapping[str, bytes | None], root: Path
    ) -> None:
        """Nothing is opened before `run`. `preshared` has the pre-shared keys of static peers by name."""
        self._config = config
        self._identity = identity
        self._preshared = preshared
        self._root = root
        self._run = under(root, config.run)
        self._pods = PodServer(
            root, identity.bundle.certificate.prefixes, config.tun.mtu, config.pods.unreachable_after
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._network_timer: asyncio.TimerHandle | None = None
        self._persist_timer: asyncio.TimerHandle | None = None
        self._netcheck_timer: asyncio.TimerHandle | None = None
        self._watch = NetworkWatch(config.tun.name)
        self._checked = float("-inf")
        self._routes_due = False
        self._up = False
        self._failed = False
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT.

        Raises:
            ConfigError: what the configuration asks for cannot be had (a port in use, a supernet that the
                host is connected to, a state directory that cannot be written).
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopped.set)
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack, loop)
            self._up = True
            self._pods.ready()
            gc.freeze()  # what stands now stays: no collection need walk it
            descriptors.ready(f"{self._identity.name}: {len(self._mesh.members)} peers known")
            log.info(
                "node %s is up: crossedge %s, UDP port %d, %s, pods %s; %d peers known of before",
                self._identity.name,
                version("crossedge"),
                self._port,
                self._config.tun.name,
                ", ".join(map(str, self._identity.bundle.certificate.prefixes)),
                len(self._mesh.members),
            )
            await self._stopped.wait()
            descriptors.stopping()
            log.info("stopping; pods keep their routes")
        if self._failed:
            raise SystemExit(1)

    # --- Start ------------------------------------------------------------------------------------------

    async def _start(self, stack: contextlib.AsyncExitStack, loop: asyncio.AbstractEventLoop) -> None:
        config, certificate = self._config, self._identity.bundle.certificate
        directory = under(self._root, config.state)
        self._store = stack.enter_context(StateStore(directory))
        self._keeper = Keeper(self._store)
        stack.callback(self._keeper.close)
        members = self._store.load_members()
        for problem in self._store.problems:
            log.warning("%s", problem)
        try:
            self._run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(self._run, "run", f"a directory that can be made; {error.strerror}") from error
        inherited = Inherited(descriptors.inherited())
        sockets = open_sockets(config, inherited)
        for opened in sockets.values():
            stack.callback(opened.close)
        self._port = next(iter(sockets.values())).port
        self._families = frozenset(sockets)
        self._host = HostState(
            plan(config, self._identity, self._port, ()),
            record=self._run / HOST_RECORD,
            tun_descriptor=inherited.tun(config.tun.name),
            disable=tun_offloads_off(config),
            on_tun=self._replace_tun,
        )
        stack.callback(self._host.close)
        try:
            tun = self._host.start(loop)
        except ValueError as error:
            raise ConfigError(
                under(self._root, config.bundle), "supernets", f"no conflict: {error}"
            ) from error
        except PermissionError as error:
            raise ConfigError("meshd", "", "to run as root: it needs CAP_NET_ADMIN") from error
        except OSError as error:
            raise ConfigError("meshd", "tun", f"to be able to set up {config.tun.name}: {error}") from error
        stack.callback(self._leave_host)
        now = boottime()
        self._clock = Wallclock(max(self._store.known_time, float(certificate.not_before)), now)
        self._clock.set(realtime_offset(), synchronised())
        reserve = self._keeper.reserve_now
        numbers = self._numbers = Sequence(self._store.sequence, self._clock.issuing, reserve)
        allowed: AllowedIPs[Link] = AllowedIPs()
        settings = await self._settings(tun)
        self._mesh = Mesh(settings, allowed, self._clock, numbers, os.urandom, now)
        self._engine = Engine(
            self._mesh,
            allowed,
            Own(certificate.allowed_ips, certificate.overlay4, certificate.overlay6),
            tun,
            list(sockets.values()),
            mtu=config.tun.mtu,
            on_event=self._on_event,
        )
        stack.callback(self._engine.stop)
        stack.callback(self._mesh.close)
        self._look_at_network()
        self._mesh.restore(members.records, members.active, boottime())
        stack.callback(self._persist_last)
        monitor = Monitor(self._on_network, ("link", "address", "route"))
        stack.callback(monitor.close)
        self._engine.start(loop)
        monitor.start(loop)
        inherited.finish(sockets, self._host.tun)
        stack.push_async_callback(self._end_tasks)
        for server in self._identity.bundle.rendezvous:
            tell = partial(self._found, server.public_key)
            self._spawn(keep_resolved(server.host, server.port, self._families, tell))
        for peer in self._config.static_peer:
            if peer.endpoint is not None:
                tell = partial(self._static_found, peer.name)
                self._spawn(keep_resolved(*split(peer.endpoint), self._families, tell))
        self._start_reports(mesh_settings=settings)
        self._spawn(self._keep_clock())
        self._spawn(self._keep_persisting())
        self._answers = Answers(
            self._engine,
            self._host,
            self.check_nat,
            self._identity,
            self._pods.report,
            tuple(self._reporters),
        )
        control = ControlServer(self._answers.handlers())
        path = self._run / SOCKET_NAME
        try:
            await control.start(path)
        except OSError as error:
            raise ConfigError(
                path, "run", f"to be able to listen there; {error.strerror or error}"
            ) from error
        stack.push_async_callback(control.stop)
        stack.callback(self._pods.stop)
        self._pods.start(loop, self._host.tun)

    def _start_reports(self, mesh_settings: MeshSettings) -> None:
        """Tell the schedulers what is measured, from now on."""
        latency, reports = self._mesh.latency, self._config.reports
        source = Source(
            mesh_settings.certificate,
            mesh_settings.signing_key,
            number=lambda: self._numbers.next(boottime()),
            unix=lambda: self._clock.issuing(boottime()),
            pairs=lambda: latency.pairs(boottime()),
            place=lambda: latency.vivaldi.place if latency.vivaldi.samples else None,
            asked=latency.asked,
        )
        epoch = os.urandom(8)
        self._reporters = [
            Reporter(url, source, epoch, reports.interval, self._families) for url in reports.url
        ]
        for reporter in self._reporters:
            self._spawn(reporter.run())

    async def _settings(self, tun: Tun) -> MeshSettings:
        config, bundle = self._config, self._identity.bundle
        aes = has_aes() and "aes" not in config.disable_offloads
        aeads = Aeads.CHACHA20_POLY1305 | (Aeads.AES_256_GCM if aes else Aeads(0))
        return MeshSettings(
            certificate=bundle.certificate,
            ca_public=bundle.ca,
            blocklist=self._newest_blocklist(),
            session_key=self._identity.session,
            signing_key=self._identity.signing,
            port=self._port,
            families=self._families,
            mesh_prefixes=bundle.supernets,
            advertise=await self._resolved("advertise", config.advertise),
            stun=await self._resolved("stun", config.stun),
            static_peers=tuple(
                StaticPeerSettings(
                    peer.name,
                    peer.public_key,
                    peer.allowed_ips,
                    None,  # told as soon as its name is resolved, which for an address is at once
                    self._preshared.get(peer.name),
                    peer.keepalive,
                )
                for peer in config.static_peer
            ),
            aeads=Aeads(0) if "superframes" in config.disable_offloads else aeads,
            gso=Offloads.named(tun.offloads).gso,
            underlay_mtu=self._underlay_mtu(),
            unreachable_after=config.pods.unreachable_after,
            measure=config.latency.probe,
        )

    async def _resolved(self, key: str, texts: tuple[str, ...]) -> tuple[UdpEndpoint, ...]:
        found = []
        for text in texts:
            host, port = split(text)
            endpoint = await self._resolve_soon(host, port)
            if endpoint is None:
                log.warning("%s: %s has no address now; it is left out", key, host)
            else:
                found.append(endpoint)
        return tuple(found)

    async def _resolve_soon(self, host: str, port: int) -> UdpEndpoint | None:
        try:
            async with asyncio.timeout(STATIC_RESOLVE):
                return await resolve(host, port, self._families)
        except TimeoutError:
            return None

    def _newest_blocklist(self) -> Blocklist:
        """Return the persisted blocklist where it holds and is newer than the bundle's, else the bundle's."""
        bundle = self._identity.bundle
        encoded = self._store.load_blocklist()
        if encoded is None:
            return bundle.blocklist
        try:
            held = Blocklist.decode(encoded)
            held.verify(bundle.ca)
        except WireError as error:
            self._store.refuse_blocklist(str(error))
            return bundle.blocklist
        return held if held.serial > bundle.blocklist.serial else bundle.blocklist

    def _leave_host(self) -> None:
        """Stop keeping the host; what was made for a start that failed goes, the rest stays for the pods."""
        if not self._up:
            self._host.withdraw()

    # --- The host's network -----------------------------------------------------------------------------

    def _apply_routes(self) -> None:
        self._routes_due = False
        self._host.apply(plan(self._config, self._identity, self._port, self._mesh.routes()))

    def _replace_tun(self, tun: Tun) -> None:
        self._engine.replace_tun(tun)
        descriptors.unstore("tun")  # or the next start is given the dead one, too, and first
        descriptors.store("tun", tun.descriptor)
        self._pods.change(tun)

    def _underlay_mtu(self) -> int:
        found = [default_route_mtu(FAMILIES[version]) for version in self._families]
        return min((mtu for mtu in found if mtu), default=UNDERLAY_MTU)

    def _on_network(self, event: Event) -> None:
        if self._watch.concerns(event):
            self._look_soon(NETWORK_DELAY)

    def _look_soon(self, delay: float) -> None:
        if self._network_timer is None:
            self._network_timer = asyncio.get_running_loop().call_later(delay, self._network_settled)

    def _network_settled(self) -> None:
        self._network_timer = None
        try:
            self._look_at_network()
        except OSError as error:
            log.warning("cannot look at the host's network: %s; trying again", error)
            self._look_soon(NETWORK_AGAIN)
        self._engine.settle()

    def _look_at_network(self) -> None:
        tun = self._config.tun.name
        found = [each.address for each in host_addresses({tun}) if each.address.version in self._families]
        mesh = self._identity.bundle.supernets
        # An address of a bridge for our pods is no way to us.
        outside = tuple(str(address) for address in found if not any(address in network for network in mesh))
        ways = tuple(default_routes())
        self._mesh.set_underlay_mtu(self._underlay_mtu(), boottime())
        change = self._watch.look(Found(outside, ways))
        if change.news:
            self._mesh.set_host_addresses(outside, boottime(), moved=change.moved)
            self._check_nat_soon()

    def _found(self, key: bytes, endpoint: UdpEndpoint) -> None:
        self._mesh.set_rendezvous(key, endpoint, boottime())
        self._engine.settle()
        self._check_nat_soon()

    def _static_found(self, name: str, endpoint: UdpEndpoint) -> None:
        self._mesh.set_static_endpoint(name, endpoint, boottime())
        self._engine.settle()

    # --- Network checks ---------------------------------------------------------------------------------

    def _check_nat_soon(self) -> None:
        if self._netcheck_timer is None:
            loop = asyncio.get_running_loop()
            self._netcheck_timer = loop.call_later(NETCHECK_DELAY, self._check_nat_now)

    def _check_nat_now(self) -> None:
        self._netcheck_timer = None
        self.check_nat()

    def check_nat(self) -> None:
        """Begin a network check, unless one is running."""
        if self._mesh.netcheck_running:
            return
        self._checked = boottime()
        version = 4 if 4 in self._families else 6
        extra: list[UdpSocket] = []
        with contextlib.suppress(OSError):
            while len(extra) < EXTRA_SOCKETS:
                extra += [open_udp(FAMILIES[version], 0, MARK, disable=frozenset({"gro", "stamps"}))]
        self._engine.begin_netcheck(self._port, extra)

    # --- Events and upkeep ------------------------------------------------------------------------------

    def _on_event(self, event: MeshEvent) -> None:
        match event:
            case RoutesChanged():
                if not self._routes_due:
                    self._routes_due = True
                    asyncio.get_running_loop().call_soon(self._apply_routes)
            case StateToPersist():
                self._persist_soon()
            case BlocklistToPersist(blocklist=blocklist):
                self._keeper.blocklist(blocklist.encode())
            case PingResult():
                self._answers.ping_result(event)
            case ReachChanged(cut_off=cut_off):
                log.log(logging.ERROR if cut_off else logging.INFO, "%s", REACHED[not cut_off])
                self._pods.reached(cut_off)
            case PathChanged(peer=peer, old=old, new=new, reason=reason):
                log.info("%s: %s -> %s (%s)", peer, _shown(old), _shown(new), reason)
            case Direct(peer=peer, seconds=seconds):
                log.info("%s: direct after %.0f ms", peer, seconds * 1000)
            case SessionChanged(peer=peer, state=state):
                log.debug("%s: session %s", peer, state)
            case Notice(level=level, text=text):
                log.log(logging.getLevelNamesMapping()[level.upper()], "%s", text)

    def _persist_soon(self) -> None:
        if self._persist_timer is None:
            loop = asyncio.get_running_loop()
            self._persist_timer = loop.call_later(self._keeper.delay(boottime()), self._persist)

    def _persist(self, *, last: bool = False) -> None:
        """Have what must survive a restart written, without waiting for it."""
        if self._persist_timer is not None:
            self._persist_timer.cancel()
            self._persist_timer = None
        now, loop = boottime(), asyncio.get_running_loop()
        bound = self._numbers.due(now) or 0
        durable = self._numbers.reserved
        self._keeper.reserve(bound, lambda value: loop.call_soon_threadsafe(durable, value))
        self._keeper.time(self._clock.known(now), now, last=last)
        self._keeper.members(self._mesh.control.directory.export(), self._mesh.export_active(now), now)

    def _persist_last(self) -> None:
        self._persist(last=True)

    async def _keep_persisting(self) -> None:
        while True:
            await asyncio.sleep(PERSIST_INTERVAL)
            self._persist()

    async def _keep_clock(self) -> None:
        while True:
            await asyncio.sleep(CLOCK_INTERVAL)
            self._clock.set(realtime_offset(), synchronised())
            if not self._keeper.has_active(self._mesh.export_active(boottime())):
                self._persist_soon()
            report = self._mesh.control.nat.report
            if (report is None or not report.observations) and boottime() - self._checked >= NETCHECK_AGAIN:
                self.check_nat()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            log.critical("a part of the daemon failed; it ends, to be started again", exc_info=fault)
            self._failed = True
            self._stopped.set()

    async def _end_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for timer in (self._network_timer, self._persist_timer, self._netcheck_timer):
            if timer is not None:
                timer.cancel()


def _shown(endpoints: tuple[Endpoint, ...]) -> str:
    return " and ".join(str(endpoint) for endpoint in endpoints) or "nothing"
