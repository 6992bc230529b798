"""What the daemon answers on its control socket: `crossedge status|peers|ping|netcheck|routes`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

from crossedge.host.clock import boottime
from crossedge.meshd.control import Handler
from crossedge.meshd.engine import Engine
from crossedge.meshd.events import PingResult
from crossedge.meshd.hoststate import HostState
from crossedge.meshd.identity import Identity
from crossedge.meshd.reporter import Reporter

PING_COUNT_MAX: Final = 1000
PING_INTERVAL_MIN: Final = 0.01  # seconds
PING_WAIT: Final = 8.0  # seconds for the last answer: the core gives each its result before
NETCHECK_WAIT: Final = 8.0  # seconds; a check itself ends within 5
NETCHECK_LOOK: Final = 0.05

Answer = AsyncIterator[Mapping[str, Any]]


class Answers:
    """Reads the core; the only thing that it changes is that it asks for pings and network checks."""

    def __init__(
        self,
        engine: Engine,
        host: HostState,
        check_nat: Callable[[], None],
        identity: Identity,
        pods: Callable[[], dict[str, Any]],
        reporters: Sequence[Reporter] = (),
    ) -> None:
        """`check_nat` begins a network check unless one is running; `pods` says how the plugin is served."""
        self._reporters = reporters
        self._engine = engine
        self._host = host
        self._check_nat = check_nat
        self._identity = identity
        self._pods = pods
        self._ping_number = 0
        self._pings: dict[int, asyncio.Future[PingResult]] = {}

    def handlers(self) -> dict[str, Handler]:
        """Return the handlers by command."""
        return {
            "status": self.status,
            "peers": self.peers,
            "ping": self.ping,
            "netcheck": self.netcheck,
            "routes": self.routes,
            "latency": self.latency,
        }

    async def status(self, _: Mapping[str, Any]) -> Answer:
        """One answer: the node, its rendezvous, offloads, host state, counters, and what is wrong."""
        await self._host.refresh()
        engine, now = self._engine, boottime()
        host, pods = self._host.report(), self._pods()
        report = engine.mesh.status(now)
        problems = [each for part in (report, host, pods) for each in part.pop("problems", ())]
        problems += [
            {
                "what": f"{reporter.url} does not take this node's reports: {reporter.status()['problem']}",
                "fix": "see that the scheduler runs and is in reach, or correct [reports] in meshd.toml",
            }
            for reporter in self._reporters
            if reporter.overdue
        ]
        yield {
            "version": version("crossedge"),
            **report,
            "offloads": {"udp": engine.udp.offloads(), "tun": host["tun"]["offloads"]},
            "host": host,
            "pods": pods,
            "traffic": engine.plane.counters(),
            "reports": [reporter.status() for reporter in self._reporters],
            "dropped": dict(sorted(engine.all_dropped().items())),
            "problems": problems,
        }

    async def peers(self, _: Mapping[str, Any]) -> Answer:
        """One answer: every peer."""
        yield {"peers": self._engine.mesh.peers(boottime())}

    async def latency(self, _: Mapping[str, Any]) -> Answer:
        """One answer: what was measured of every pair, and where this node sees itself."""
        now = boottime()
        latency = self._engine.mesh.latency
        place = latency.vivaldi.place
        yield {
            "pairs": latency.rows(now),
            "coordinates": {
                "point_ms": [round(at, 3) for at in place.point],
                "height_ms": round(place.height, 3),
                "error": round(place.error, 3),
                "samples": latency.vivaldi.samples,
            },
            "interval_s": round(latency.prober.interval, 1),
            "reports": [reporter.status() for reporter in self._reporters],
        }

    async def routes(self, _: Mapping[str, Any]) -> Answer:
        """One answer: every prefix that goes through the mesh."""
        certificate = self._identity.bundle.certificate
        own = [
            {"prefix": str(prefix), "peer": self._identity.name, "kind": "own", "mtu_bytes": None}
            for prefix in certificate.allowed_ips
        ]
        through = [
            {
                "prefix": str(route.prefix),
                "peer": route.peer,
                "kind": "static peer" if route.stock else "member",
                "mtu_bytes": route.mtu or None,
            }
            for route in self._engine.mesh.routes()
        ]
        yield {"routes": [*own, *through], "tun": self._host.report()["tun"]}

    async def netcheck(self, _: Mapping[str, Any]) -> Answer:
        """One answer, when the check is done."""
        mesh = self._engine.mesh
        self._check_nat()
        async with asyncio.timeout(NETCHECK_WAIT):
            while mesh.netcheck_running:
                await asyncio.sleep(NETCHECK_LOOK)
        if mesh.control.nat.report is None:
            raise ValueError("no network check could be made: no rendezvous or STUN server is known yet")
        yield mesh.control.nat.report.as_dict()

    async def ping(self, request: Mapping[str, Any]) -> Answer:
        """An answer for each probe, in order."""
        name, count, interval = request.get("peer"), request.get("count", 5), request.get("interval_s", 1.0)
        if not isinstance(count, int) or not 0 < count <= PING_COUNT_MAX:
            raise ValueError(f"count is a number from 1 to {PING_COUNT_MAX}")
        if not isinstance(interval, (int, float)) or not interval >= PING_INTERVAL_MIN:
            raise ValueError(f"interval_s is {PING_INTERVAL_MIN} seconds or more")
        for number in range(count):
            if number:
                await asyncio.sleep(interval)
            yield self._shown(await self._ping_once(str(name)), number + 1)

    async def _ping_once(self, name: str) -> PingResult:
        self._ping_number += 1
        number = self._ping_number
        future: asyncio.Future[PingResult] = asyncio.get_running_loop().create_future()
        self._pings[number] = future
        try:
            if not self._engine.mesh.ping(name, number, boottime()):
                raise ValueError(f"no such peer: {name}; crossedge peers lists them")
            self._engine.settle()
            async with asyncio.timeout(PING_WAIT):
                return await future
        except TimeoutError:
            return PingResult(name, number, None, None, "no answer")
        finally:
            self._pings.pop(number, None)

    def ping_result(self, result: PingResult) -> None:
        """Take a result that the core reports."""
        future = self._pings.get(result.number)
        if future is not None and not future.done():
            future.set_result(result)

    @staticmethod
    def _shown(result: PingResult, number: int) -> dict[str, Any]:
        return {
            "peer": result.peer,
            "number": number,
            "path": None if result.endpoint is None else str(result.endpoint),
            "rtt_ms": None if result.rtt is None else round(result.rtt * 1000, 3),
            "note": result.note,
        }
