"""A network that reports to a scheduler, on virtual clocks: certificates, signed reports, an API client."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from crossedge.latency.report import CONTENT_TYPE, PATH, Pair, PairState, Report
from crossedge.sched.api import create_app
from crossedge.sched.config import SchedConfig
from crossedge.sched.service import Clock, SchedulerService
from crossedge.sched.trust import Trust
from crossedge.wire.certificate import Certificate
from crossedge.wire.identity import SigningKey, key_id, network_id, node_id

CA = SigningKey(b"\x01" * 32)
NETWORK = network_id(CA.public)
START = 1_760_000_000
TOKEN = "a-token-for-the-tests-only"
BEARER = {"Authorization": f"Bearer {TOKEN}"}

Floats = NDArray[np.float64]


class VirtualClock(Clock):
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at

    def unix(self) -> float:
        return START + self.at


class FleetNode:
    """A node that can sign reports."""

    def __init__(self, name: str, ca: SigningKey = CA, serial: int = 1, **changes: Any) -> None:
        self.name = name
        self.key = SigningKey(node_id(NETWORK, name) * 2)
        fields: dict[str, Any] = {
            "network": network_id(ca.public),
            "serial": serial,
            "name": name,
            "x25519": bytes(32),
            "ed25519": self.key.public,
            "not_before": START - 1000,
            "not_after": START + 10**8,
            "issuer": key_id(ca.public),
        }
        self.certificate = Certificate(**{**fields, **changes}).sign(ca)
        self.seq = 0

    @property
    def id(self) -> bytes:
        return node_id(NETWORK, self.name)

    def report(
        self, unix: float, pairs: Sequence[Pair], key: SigningKey | None = None, **changes: Any
    ) -> bytes:
        self.seq += 1
        fields: dict[str, Any] = {
            "certificate": self.certificate,
            "epoch": b"instance",
            "seq": self.seq,
            "issued": int(unix),
            "pairs": tuple(pairs),
        }
        return Report(**{**fields, **changes}).sign(key or self.key).encode()


def pair(peer: bytes, ms: float | None, age: float = 0.0, relayed: bool = False) -> Pair:
    """Return a measured pair, or one that does not answer."""
    if ms is None:
        return Pair(peer, PairState.UNREACHABLE, loss=1.0, samples=10, age=age)
    state = PairState.RELAYED if relayed else PairState.DIRECT
    return Pair(peer, state, ms / 1000, ms / 1000, 0.0, 0.0, 10, age)


class Fleet:
    """Nodes with a matrix of RTT in ms between them; `nan` is not probed, `inf` does not answer."""

    def __init__(self, rtt: Floats, names: Sequence[str] | None = None) -> None:
        self.rtt = rtt
        self.nodes = [FleetNode(name) for name in names or [f"n{i}" for i in range(len(rtt))]]

    def pairs(self, row: int) -> list[Pair]:
        result = []
        for column, node in enumerate(self.nodes):
            ms = self.rtt[row, column]
            if column != row and not np.isnan(ms):
                result.append(pair(node.id, None if np.isinf(ms) else float(ms)))
        return result

    def report_all(self, service: SchedulerService, silent: Sequence[str] = ()) -> None:
        """Let every node report straight into the scheduler."""
        clock = service.clock
        for row, node in enumerate(self.nodes):
            if node.name not in silent:
                service.scheduler.report(
                    node.report(clock.unix(), self.pairs(row)), clock.now(), clock.unix()
                )


def two_regions(sizes: tuple[int, int] = (4, 4), apart: float = 40.0, seed: int = 0) -> Floats:
    """Return RTT of two regions, a few ms inside each."""
    rng = np.random.default_rng(seed)
    region = np.repeat([0, 1], sizes)
    rtt = np.where(region[:, None] == region[None, :], 3.0, apart) + rng.uniform(0, 1, (sum(sizes),) * 2)
    rtt = (rtt + rtt.T) / 2
    np.fill_diagonal(rtt, 0.0)
    return rtt


def make_service(
    directory: Path, clock: VirtualClock | None = None, token: bool = True, **settings: Any
) -> SchedulerService:
    """Return a scheduler that computes where it is called, its files under a directory."""
    if token:
        file = directory / "token"
        directory.mkdir(exist_ok=True)
        file.write_text(TOKEN + "\n")
        file.chmod(0o600)
        settings.setdefault("token_file", Path("/token"))
    config = SchedConfig.model_validate({"network": CA.public, "state_dir": Path("/state"), **settings})
    return SchedulerService(config, Trust(CA.public), directory, clock or VirtualClock(), inline=True)


@asynccontextmanager
async def client_of(service: SchedulerService) -> Any:
    """Yield an HTTP client of a scheduler in this process."""
    transport = httpx.ASGITransport(app=create_app(service, lifespan=False))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8478") as client:
        yield client


async def post_report(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    """Send a report as a node does."""
    return await client.post(PATH, content=body, headers={"Content-Type": CONTENT_TYPE})
