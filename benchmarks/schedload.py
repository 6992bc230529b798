"""Measure the scheduler's service: under load, and on a virtual clock.

A real `crossedge-sched run` gets signed reports over HTTP from many nodes, each every 15 s, every one of its
pairs changed in every report: over a new connection each, as meshd does, and then over kept ones. Its
processor time is that of the service's process and of its worker together. kube-scheduler's calls are timed
by a process of their own during the former, and again without reports. All are ordinary processes.

`measure_stability` takes both PlanetLab slices and noisy repeats of them through the service, every decision
held against thresholds and caps.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figures
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
SETTLE_MAX = 120.0  # seconds until a round over all nodes must have ended
SECONDS = 60.0  # of load: two rounds; half of that over kept connections
FULL_EVERY = 20  # reports of a node, of which one is full: every 300 s
CALLS = 400  # by kube-scheduler, each filter and prioritize
PAUSES = {"load": 0.05, "quiet": 0.02}  # seconds between them
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

    async def ask(self, path: str) -> Any:
        """Return what a GET answers, from JSON."""
        return json.loads((await self.post(path, "", b"", "GET"))[1])

    async def post(self, path: str, kind: str, body: bytes, method: str = "POST") -> tuple[int, bytes]:
        """Return status and content."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", PORT)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\nContent-Type: {kind}\r\n"
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


def extender_times(names: list[str], calls: int, pause: float) -> Floats:
    """Return the milliseconds of filter and prioritize together over all names, for each call."""
    return asyncio.run(_extender_times(names, calls, pause))


async def _extender_times(names: list[str], calls: int, pause: float) -> Floats:
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


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


async def settled(count: int) -> None:
    """Wait until a round over all nodes has chosen its estimator; that is not part of the steady load."""
    began = time.monotonic()
    while time.monotonic() - began < SETTLE_MAX:
        await asyncio.sleep(1.0)
        status = await Client(keep=False).ask("/v1/status")
        if status["nodes"]["fresh"] == count and status["estimator_error"] is not None:
            return
    raise SystemExit(f"no round over all nodes within {SETTLE_MAX:g} s: {status}")


async def shares(pid: int, seconds: float, counts: dict[int, int]) -> dict[str, float]:
    """Return what the service and its worker use of a core meanwhile, and how many reports they take."""
    before = {member: processor_seconds(member) for member in (pid, *family(pid))}
    counts.clear()
    began = time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - began
    used = {member: processor_seconds(member) - at for member, at in before.items()}
    taken = counts.get(204, 0) + counts.get(200, 0)
    return {
        "reports_per_s": taken / took,
        "refused": float(sum(counts.values()) - taken),
        "core_share": sum(used.values()) / took,
        "core_share_service": used[pid] / took,
        "core_share_worker": (sum(used.values()) - used[pid]) / took,
        "processor_ms_per_report": 1000 * used[pid] / max(taken, 1),
    }


async def load(nodes: list[BenchNode], seconds: float, pid: int) -> dict[str, float]:
    """Return the figures of one run."""
    found: dict[str, float] = {}
    loop, names = asyncio.get_running_loop(), [node.name for node in nodes]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as kube_scheduler:

        async def calls(when: str) -> None:
            used = processor_seconds(pid)
            pause = PAUSES[when]
            times = await loop.run_in_executor(kube_scheduler, extender_times, names, CALLS, pause)
            found[f"extender_{when}.p50_ms"] = float(np.quantile(times, 0.5))
            found[f"extender_{when}.p99_ms"] = float(np.quantile(times, 0.99))
            if when == "quiet":
                found["extender_quiet.processor_ms"] = 1000 * (processor_seconds(pid) - used) / CALLS

        for keep in (False, True):
            counts: dict[int, int] = {}
            reporting = asyncio.create_task(keep_reporting(nodes, keep, counts))
            if not keep:
                say(f"{len(nodes)} nodes report; waiting for a round over all of them")
                await settled(len(nodes))
            span = seconds / 2 if keep else seconds
            say(f"{span:.0f} s of reports over {'kept' if keep else 'new'} connections")
            name = "kept_connections" if keep else "load"
            found |= {f"{name}.{key}": value for key, value in (await shares(pid, span, counts)).items()}
            if not keep:
                say(f"{CALLS} calls to the extender under load")
                await calls("load")
            reporting.cancel()
            await asyncio.gather(reporting, return_exceptions=True)
        say(f"{CALLS} calls to the extender without load")
        await calls("quiet")
    return found


def measure_load(n: int, seconds: float) -> dict[str, float]:
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
                while process.poll() is None:
                    try:
                        asyncio.run(Client(keep=False).ask("/healthz"))
                        break
                    except OSError:
                        time.sleep(0.2)
                else:
                    raise SystemExit(f"crossedge-sched ended with status {process.returncode}")
                return asyncio.run(load(nodes, seconds, process.pid))
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
    "load.core_share": "<= 0.5",
    "load.refused": "== 0",
    "kept_connections.core_share": "<= 0.5",
    "kept_connections.refused": "== 0",
    "extender_load.p99_ms": "<= 50",
    "extender_quiet.p99_ms": "<= 50",
}


def measure_service(figures: Figures, nodes: int = 1000, seconds: float = SECONDS) -> None:
    """Add the figures of a running service under load."""
    for name, value in measure_load(nodes, seconds).items():
        figures.add(f"service.{name}", value, BARS.get(name, ""))


def main() -> int:
    """Measure the load alone; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long to measure each load")
    arguments = parser.parse_args()
    figures = Figures()
    measure_service(figures, arguments.nodes, arguments.seconds)
    print(figures.table())
    return 1 if figures.missed else 0


if __name__ == "__main__":
    sys.exit(main())
