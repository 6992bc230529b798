"""Measure the scheduler's service under load; adds its figures to build/bench/sched.json.

A real `crossedge-sched run` gets signed reports over HTTP from many nodes, each every 15 s, every one of its
pairs changed in every report; its processor time is that of the service's process and of its worker together.
kube-scheduler's calls are timed meanwhile, and again without reports. Then both PlanetLab slices and noisy
repeats of them go through the service on a virtual clock, every decision held against thresholds and caps.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossedge.latency.report import CONTENT_TYPE, PATH, Coordinates, Pair, PairState, Report
from crossedge.sched.config import SchedConfig
from crossedge.sched.decision import Policy
from crossedge.sched.files import read_matrix
from crossedge.sched.service import Clock, SchedulerService
from crossedge.sched.services import ServiceSpec
from crossedge.sched.trust import Trust
from crossedge.wire.certificate import Certificate
from crossedge.wire.identity import SigningKey, key_id, network_id, node_id

Floats = NDArray[np.float64]
PORT = 18479
INTERVAL = 15.0
PEERS = 24  # probed by each node
SETTLE = 60.0  # seconds before the measurement begins
FULL_EVERY = 20  # reports of a node, of which one is full: every 300 s
CALLS = 300
SLICES = ("planetlab490/PlanetLabData_1.tsv.gz", "planetlab490/PlanetLabData_9.tsv.gz")
CA = SigningKey(b"\x01" * 32)
NETWORK = network_id(CA.public)


@dataclass(slots=True)
class BenchNode:
    """A node that signs reports."""

    name: str
    peers: list[tuple[bytes, float]] = field(default_factory=list)
    seq: int = 0
    key: SigningKey = field(init=False)
    certificate: Certificate = field(init=False)

    def __post_init__(self) -> None:
        """Make its key and certificate."""
        self.key = SigningKey(node_id(NETWORK, self.name) * 2)
        self.certificate = Certificate(
            network=NETWORK,
            serial=1,
            name=self.name,
            x25519=bytes(32),
            ed25519=self.key.public,
            prefixes4=(),
            not_before=0,
            not_after=2**40,
            issuer=key_id(CA.public),
        ).sign(CA)

    def report(self, unix: float, rng: np.random.Generator, full: bool) -> bytes:
        """Return a report in which every pair is new; deltas name the report before as their base."""
        pairs = []
        for peer, ms in self.peers:
            seconds = ms / 1000 * float(rng.uniform(1.0, 1.05))
            pairs.append(Pair(peer, PairState.DIRECT, seconds, seconds * 1.01, seconds * 0.01, 0.0, 64, 1.0))
        self.seq += 1
        return (
            Report(
                certificate=self.certificate,
                epoch=b"benching",
                seq=self.seq,
                base=0 if full else self.seq - 1,
                issued=int(unix),
                pairs=tuple(pairs),
                coordinates=Coordinates((1.0,) * 8, 1.0, 0.2),
            )
            .sign(self.key)
            .encode()
        )


def generated(n: int, rng: np.random.Generator) -> Floats:
    """Return RTT in ms of nodes in seven regions with access links."""
    centres = rng.normal(0.0, 60.0, (7, 3))
    points = centres[rng.choice(7, n)] + rng.normal(0.0, 5.0, (n, 3))
    access = rng.exponential(2.0, n)
    apart = np.sqrt(((points[:, None] - points[None]) ** 2).sum(2))
    result: Floats = apart + access[:, None] + access[None, :] + 0.3
    return result


def fleet_of(n: int, rng: np.random.Generator) -> list[BenchNode]:
    """Return nodes that each probe some random others."""
    rtt = generated(n, rng)
    nodes = [BenchNode(f"node-{index}") for index in range(n)]
    ids = [node_id(NETWORK, node.name) for node in nodes]
    for index, node in enumerate(nodes):
        others = rng.choice(n - 1, min(PEERS, n - 1), replace=False)
        node.peers = [(ids[peer], float(rtt[index, peer])) for peer in (others + (others >= index)).tolist()]
    return nodes


class Client:
    """One connection; opened anew for each request where `keep` is off."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, kind: str, body: bytes) -> tuple[int, bytes]:
        """Return status and content."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", PORT)
        reader, writer = self._streams
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\nContent-Type: {kind}\r\n"
        head += (
            f"Connection: {'keep-alive' if self._keep else 'close'}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        _, _, length = answer.partition("content-length: ")
        content = await reader.readexactly(int(length.partition("\r\n")[0])) if length else b""
        if not self._keep:
            await self.close()
        return int(answer.split()[1]), content

    async def close(self) -> None:
        """Close the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def processor_seconds(pid: int) -> float:
    """Return processor seconds of a process so far, all threads, in user and kernel mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """Return the descendants of a process."""
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [member for child in children for member in (child, *family(child))]


async def keep_reporting(nodes: list[BenchNode], keep: bool, counts: dict[int, int]) -> None:
    """Let every node report every 15 s until cancelled."""
    rng = np.random.default_rng(1)

    async def one(node: BenchNode) -> None:
        client = Client(keep)
        await asyncio.sleep(float(rng.uniform(0, INTERVAL)))
        while True:
            began = time.monotonic()
            full = node.seq % FULL_EVERY == 0
            status, _ = await client.post(PATH, CONTENT_TYPE, node.report(time.time(), rng, full))
            counts[status] = counts.get(status, 0) + 1
            await asyncio.sleep(
                max(0.0, INTERVAL * float(rng.uniform(0.8, 1.2)) - (time.monotonic() - began))
            )

    async with asyncio.TaskGroup() as group:
        for node in nodes:
            group.create_task(one(node))


async def extender_times(names: list[str], calls: int, pause: float) -> Floats:
    """Return the milliseconds of filter and prioritize together over all names, for each call."""
    client = Client(keep=True)
    rng = np.random.default_rng(2)
    found = []
    for _ in range(calls):
        users = ",".join(
            f"{names[index]}={weight}" for index, weight in enumerate(rng.integers(1, 9, 20).tolist())
        )
        pod = {"metadata": {"name": "web", "annotations": {"crossedge.io/users": users}}, "spec": {}}
        body = json.dumps({"Pod": pod, "Nodes": None, "NodeNames": names}).encode()
        began = time.perf_counter()
        status, filtered = await client.post("/extender/filter", "application/json", body)
        second, scores = await client.post("/extender/prioritize", "application/json", body)
        found.append((time.perf_counter() - began) * 1000)
        if (status, second) != (200, 200) or len(json.loads(scores)) != len(names):
            raise SystemExit(f"the extender answers {status}, {second}: {filtered[:200]!r}")
        await asyncio.sleep(pause)
    await client.close()
    return np.array(found)


async def load(nodes: list[BenchNode], seconds: float, keep: bool, pid: int) -> dict[str, float]:
    """Return the figures of one run."""
    counts: dict[int, int] = {}
    reporting = asyncio.create_task(keep_reporting(nodes, keep, counts))
    await asyncio.sleep(SETTLE)
    before = {member: processor_seconds(member) for member in (pid, *family(pid))}
    counts.clear()
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    used = {member: processor_seconds(member) - at for member, at in before.items()}
    done = dict(counts)
    times = await extender_times([node.name for node in nodes], CALLS, 0.1)
    reporting.cancel()
    await asyncio.gather(reporting, return_exceptions=True)
    quiet = await extender_times([node.name for node in nodes], CALLS, 0.05)
    return {
        "reports_per_s": done.get(204, 0) / took,
        "refused": float(sum(count for status, count in done.items() if status != 204)),
        "core_share": sum(used.values()) / took,
        "core_share_service": used[pid] / took,
        "core_share_worker": (sum(used.values()) - used[pid]) / took,
        "extender_p50_ms": float(np.quantile(times, 0.5)),
        "extender_p99_ms": float(np.quantile(times, 0.99)),
        "extender_quiet_p50_ms": float(np.quantile(quiet, 0.5)),
        "extender_quiet_p99_ms": float(np.quantile(quiet, 0.99)),
    }


def measure_load(n: int, seconds: float, keep: bool) -> dict[str, float]:
    """Start a scheduler, load it, and return the figures."""
    nodes = fleet_of(n, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "etc/crossedge/sched.toml")
        file.parent.mkdir(parents=True)
        key = base64.b64encode(CA.public).decode()
        file.write_text(f'network = "{key}"\nlisten = ["127.0.0.1:{PORT}"]\nlog_level = "warning"\n')
        command = [str(Path(sys.executable).with_name("crossedge-sched")), "run", "--root", directory]
        with subprocess.Popen(command) as process:
            try:
                while True:
                    try:
                        asyncio.run(Client(keep=False).post("/healthz", "text/plain", b""))
                        break
                    except OSError:
                        time.sleep(0.2)
                return asyncio.run(load(nodes, seconds, keep, process.pid))
            finally:
                process.terminate()
                process.wait()


class VirtualClock(Clock):
    """Both clocks, moved by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        """Return the even clock."""
        return self.at

    def unix(self) -> float:
        """Return the time of day."""
        return 1_760_000_000.0 + self.at


async def measure_stability(data: Path) -> dict[str, float]:
    """Replay both slices and noisy repeats through a service; return how often a rule was broken."""
    slices = [read_matrix(data / path) for path in SLICES]
    names = [name for name in slices[0].names if name in slices[1].names]
    parts = [matrix.part([matrix.names.index(name) for name in names]) for matrix in slices]
    nodes = [BenchNode(f"n{index}") for index in range(len(names))]
    ids = [node_id(NETWORK, node.name) for node in nodes]
    clock, rng = VirtualClock(), np.random.default_rng(0)
    policy = Policy()
    rounds = [(part, seed) for part in parts for seed in range(5)]
    broken = moves = most = 0
    with tempfile.TemporaryDirectory() as directory:
        config = SchedConfig.model_validate({"network": CA.public, "state_dir": Path("/state")})
        service = SchedulerService(config, Trust(CA.public), Path(directory), clock, inline=True)
        scheduler = service.scheduler
        for part, seed in rounds:
            noise = np.maximum(1.0 + 0.1 * rng.normal(0.0, 1.0, part.rtt.shape), 0.1) if seed else 1.0
            rtt = part.rtt * noise
            for row, node in enumerate(nodes):
                node.seq += 1
                pairs = tuple(
                    Pair(ids[column], PairState.DIRECT, ms / 1000, ms / 1000, 0.0, 0.0, 10, 0.0)
                    for column, ms in enumerate(rtt[row].tolist())
                    if column != row and ms == ms
                )
                report = Report(
                    certificate=node.certificate,
                    epoch=b"benching",
                    seq=node.seq,
                    issued=int(clock.unix()),
                    pairs=pairs,
                )
                scheduler.report(report.sign(node.key).encode(), clock.now(), clock.unix())
            before = {name: set(held.current) for name, held in scheduler.services.items()}
            await service.round()
            view, made = scheduler.view, 0
            for name, old in before.items():
                held = scheduler.services[name]
                came = set(held.current) - old
                made += len(came)
                if not came or held.decision is None:
                    continue
                was, best = (
                    float(
                        np.nan_to_num(view.rtt[:, [view.index[node] for node in where]], nan=1e4)
                        .min(axis=1)
                        .mean()
                    )
                    for where in (sorted(old), held.decision["best"]["nodes"])
                )
                gain = was - best
                broken += (
                    gain < policy.gain_ms or gain < policy.gain_share * was or len(came) > policy.moves_max
                )
            broken += made > config.moves.per_round
            moves, most = moves + made, max(most, made)
            if not before:
                for replicas in (3, 5, 8, 20):
                    await service.put_service(f"p{replicas}", ServiceSpec(replicas=replicas))
            clock.at += config.rounds.every
        await service.stop()
    return {
        "rounds": len(rounds),
        "broken_rules": broken,
        "moves": moves,
        "most_moves_in_a_round": most,
    }


BARS = {
    "service.load.core_share": ("<=", 0.5),
    "service.load.refused": ("==", 0),
    "service.load.extender_p99_ms": ("<=", 50.0),
    "service.load.extender_quiet_p99_ms": ("<=", 50.0),
    "service.load_new_connections.core_share": ("<=", 0.5),
    "service.stability.broken_rules": ("==", 0),
    "service.stability.most_moves_in_a_round": ("<=", 5),
}


def add_figures(path: Path, figures: dict[str, float]) -> None:
    """Add figures to the file that the other benchmark wrote."""
    held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"figures": {}}
    for name, value in figures.items():
        row: dict[str, Any] = {"value": round(float(value), 6)}
        if name in BARS:
            sign, edge = BARS[name]
            holds = {"<=": value <= edge, "==": value == edge}[sign]
            row |= {"bar": f"{sign} {edge:g}", "holds": bool(holds)}
        held["figures"][name] = row
        print(
            f"{name}: {value:.4f} {row.get('bar', '')} {'' if row.get('holds', True) else '  MISSED'}",
            flush=True,
        )
    held["missed"] = [name for name, row in held["figures"].items() if not row.get("holds", True)]
    path.write_text(json.dumps(held, indent=2))


def main() -> None:
    """Measure load and stability."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to measure each load")
    parser.add_argument("--only", choices=("load", "stability"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "sched.json"
    if arguments.only != "stability":
        for name, keep in (("load", True), ("load_new_connections", False)):
            found = measure_load(arguments.nodes, arguments.seconds, keep)
            add_figures(path, {f"service.{name}.{key}": value for key, value in found.items()})
    data = os.environ.get("CROSSEDGE_DATA")
    if arguments.only != "load" and data:
        found = asyncio.run(measure_stability(Path(data)))
        add_figures(path, {f"service.stability.{key}": value for key, value in found.items()})


if __name__ == "__main__":
    main()
