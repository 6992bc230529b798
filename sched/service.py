"""The running scheduler: clocks, the worker process, the history's thread, the loop of rounds. No rules."""

from __future__ import annotations

import asyncio
import functools
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np

from crossedge.sched.baselines import baselines
from crossedge.sched.config import SchedConfig, rooted
from crossedge.sched.decision import Policy
from crossedge.sched.groups import Grouping
from crossedge.sched.history import History
from crossedge.sched.kubernetes import KubernetesClient, KubernetesError, wanted
from crossedge.sched.matrix import Ints
from crossedge.sched.placement import PlacementError
from crossedge.sched.rounds import Outcome, Task, run_round
from crossedge.sched.scheduler import Kept, Restored, Scheduler, Service, kept_json
from crossedge.sched.services import (
    ServiceError,
    ServiceSpec,
    View,
    decided,
    kept,
    number,
    problem_of,
    users_of,
)
from crossedge.sched.trust import Blocklists, Trust, load_token, token_path

SOON: Final = 5.0
"""Seconds between rounds while nodes are coming back."""
DRY_RUNS_MAX: Final = 4
"""Dry runs that wait or run."""
NICE: Final = 5

logger = logging.getLogger("crossedge-sched")
P = ParamSpec("P")
T = TypeVar("T")


class Clock:
    """The two clocks."""

    def now(self) -> float:
        """Return seconds that pass evenly, also while the machine sleeps."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def unix(self) -> float:
        """Return the time of day, Unix seconds."""
        return time.time()


class BusyError(Exception):
    """Too many dry runs at once."""


def restored(history: History) -> Restored:
    """Return what the history says an earlier life left."""
    positions = history.state("positions") or {}
    return Restored(
        history.nodes(),
        history.services(),
        history.last_round(),
        float(history.state("round_time") or 0.0),
        {name: int(label) for name, label in (history.state("groups") or {}).items()},
        int(history.state("fresh_group") or 0),
        {name: (float(x), float(y)) for name, (x, y) in positions.items()},
        tuple(history.state("estimator") or (None, None, 0, 0)),
    )


def dry_run(
    spec: ServiceSpec,
    view: View,
    policy: Policy,
    grouping: Grouping | None,
    listed: int,
    with_baselines: bool,
) -> dict[str, Any]:
    """Return where a service would go and why, as JSON; `ServiceError`, `PlacementError` where it cannot."""
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    decision = decided(spec, spec.current or (), view, policy, rng, listed)
    problem, _ = problem_of(spec, view)
    chosen: Ints = np.array([view.index[name] for name in decision["nodes"]], dtype=np.int64)
    decision["users"] = users_of(problem, chosen, view)
    decision["baselines"] = None
    if with_baselines and grouping is not None:
        found = baselines(problem, grouping, rng)
        decision["baselines"] = {
            name: {"mean_ms": number(mean), "p95_ms": number(tail)} for name, (mean, tail) in found.items()
        }
    decision["seconds"] = number(time.perf_counter() - started)
    return decision


def begin_worker() -> None:
    """Begin a worker: answering comes before computing, signals are the parent's, and it ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(OSError):
        os.nice(NICE)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=end_with, args=(parent.sentinel,), daemon=True).start()


def end_with(sentinel: int) -> None:
    """End this process as soon as the other one has ended."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


class SchedulerService:
    """One network's scheduler, running."""

    def __init__(
        self,
        config: SchedConfig,
        trust: Trust,
        root: Path = Path("/"),
        clock: Clock | None = None,
        inline: bool = False,
    ) -> None:
        """Open the history and restore what it has.

        Args:
            config: of the service.
            trust: whom to believe.
            root: stands before every path.
            clock: another one in tests.
            inline: compute and write where it is called, in tests.

        Raises:
            ConfigError: the history or the token cannot be used.
        """
        self.config = config
        self.clock = clock or Clock()
        path = token_path(config, root)
        self.token = None if path is None else load_token(path)
        self.history = History(rooted(root, config.state_dir), config.history)
        now = self.clock.now()
        self.scheduler = Scheduler(config, trust.ca, now, restored(self.history))
        paths = tuple(rooted(root, path) for path in config.blocklists)
        self.blocklists = Blocklists(trust.ca, paths, trust.blocklist)
        self.scheduler.enforce(self.blocklists.newest)
        self.boot = os.urandom(4).hex()
        self.problems: dict[str, str] = {}
        self.last_seconds = 0.0
        self._inline = inline
        self._rounds: Executor | None = None
        self._dry: Executor | None = None
        self._writer: Executor | None = None
        self._dry_runs = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._rounding = asyncio.Lock()

    def start(self) -> None:
        """Begin the loop of rounds; needs a running event loop."""
        self._task(self._loop())

    async def stop(self) -> None:
        """End everything; the history is closed last."""
        self._stopping = True
        self._wake.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for executor in (self._rounds, self._dry):
            if isinstance(executor, ProcessPoolExecutor):
                for process in list((executor._processes or {}).values()):
                    process.terminate()
            if executor is not None:
                executor.shutdown(wait=True, cancel_futures=True)
        if self._writer is not None:
            self._writer.shutdown(wait=True)
        self.history.close()

    def wake(self) -> None:
        """Let the next round come soon: a node is new."""
        self._wake.set()

    def _task(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # History, in a thread of its own

    async def past(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a call to the history returns, made in the one thread that owns it."""
        if self._inline:
            return call(*args, **kwargs)
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, "history")
        return await asyncio.get_running_loop().run_in_executor(
            self._writer, functools.partial(call, *args, **kwargs)
        )

    async def _keep(self, what: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> bool:
        try:
            await self.past(call, *args, **kwargs)
        except sqlite3.Error as error:
            logger.error("the history could not be written (%s): %s", what, error)
            self.scheduler.counters.add("history_errors_total", what)
            self.problems["history"] = f"the history cannot be written: {error}"
            return False
        self.problems.pop("history", None)
        return True

    # Rounds, in a process of their own

    async def round(self) -> None:
        """Make one round; what fails is logged, counted and shown, and the round before stays."""
        async with self._rounding:
            if self.blocklists.refresh():
                gone = self.scheduler.enforce(self.blocklists.newest)
                if gone:
                    logger.warning("revoked: %s", ", ".join(gone))
            started = self.clock.now()
            steps = self.scheduler.begin(started, self.clock.unix())
            task = await self._steps(steps)
            try:
                outcome = await self._compute(task)
            except Exception as error:
                logger.exception("round %d failed", task.round)
                self.scheduler.counters.add("rounds_total", "failed")
                self.problems["round"] = f"round {task.round} failed: {type(error).__name__}: {error}"
                return
            self.problems.pop("round", None)
            saved = self.scheduler.end(outcome, self.clock.now(), self.clock.unix())
            self.last_seconds = self.clock.now() - started
            await self._save(saved)
        if self.config.kubernetes.label_nodes:
            await self._label()

    async def _label(self) -> None:
        client = KubernetesClient(self.config.kubernetes)
        want = wanted(self.scheduler)
        try:
            patched = client.label(want) if self._inline else await asyncio.to_thread(client.label, want)
        except KubernetesError as error:
            self.scheduler.counters.add("kubernetes_patches_total", "failed")
            self.problems["kubernetes"] = f"nodes could not be labelled: {error}"
            return
        self.problems.pop("kubernetes", None)
        self.scheduler.counters.add("kubernetes_patches_total", "done", patched)

    async def _save(self, saved: Kept) -> None:
        await self._keep(
            "round",
            self.history.save_round,
            saved.row,
            saved.nodes,
            saved.services,
            saved.decisions,
            saved.state,
        )
        unix = self.clock.unix()
        if saved.row.round % 100 == 0:
            await self._keep("nodes", self.history.drop_nodes, unix - self.config.nodes.forget_after)

    async def _steps(self, steps: Generator[None, None, Task]) -> Task:
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                task: Task = stop.value
                return task
            await asyncio.sleep(0)

    async def _compute(self, task: Task) -> Outcome:
        if self._inline:
            return run_round(task)
        if self._rounds is None:
            context = multiprocessing.get_context("spawn")
            self._rounds = ProcessPoolExecutor(1, context, begin_worker)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._rounds, run_round, task)
        except BrokenProcessPool:
            self._rounds = None
            raise

    async def _loop(self) -> None:
        while not self._stopping:
            started = self.clock.now()
            await self.round()
            took = self.clock.now() - started
            rounds = self.config.rounds
            outcome = self.scheduler.outcome
            rest = 0.0 if outcome is None else rounds.rest * outcome.processor
            soon = self.scheduler.warming(self.clock.now()) or not self.scheduler.view.names
            self._wake.clear()
            if not soon:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), max(rounds.every - took, rest))
                    soon = True
            if soon:
                since = self.clock.now() - started
                await asyncio.sleep(max(min(SOON, rounds.every) - since, took + rest - since, 0.0))

    # Services

    async def put_service(self, name: str, spec: ServiceSpec) -> tuple[Service, bool]:
        """Store a service; return it and whether it is new. A new one is placed at once.

        Raises:
            ServiceError: it cannot be had; nothing is stored.
            OSError: it could not be written, and is not stored.
        """
        held = self.scheduler.services.get(name)
        service, fresh = self.scheduler.put_service(name, spec, self.clock.unix())
        if not await self._keep("service", self.history.save_service, service.row()):
            if self.scheduler.services.get(name) is service:
                self.scheduler.services.pop(name)
                if held is not None:
                    self.scheduler.services[name] = held
            raise OSError("the history cannot be written")
        if not service.current and self.scheduler.view.names and not self.scheduler.warming(self.clock.now()):
            await self._place_new(service)
        return service, fresh

    async def _place_new(self, service: Service) -> None:
        view, policy = self.scheduler.view, self.scheduler.policy
        try:
            decision = await self._aside(decided, service.spec, (), view, policy, np.random.default_rng(0))
        except (PlacementError, ServiceError) as error:
            decision = kept((), error)
        if self.scheduler.services.get(service.name) is not service or service.current:
            return
        changed = self.scheduler.settle(service, decision)
        shown = kept_json(decision) if changed else None
        await self._keep("decision", self.history.save_decision, service.row(), int(decision["round"]), shown)

    async def drop_service(self, name: str) -> bool:
        """Forget a service; return whether there was one. `OSError` where that cannot be written."""
        service = self.scheduler.services.pop(name, None)
        if service is None:
            return False
        if not await self._keep("service", self.history.drop_service, name):
            self.scheduler.services.setdefault(name, service)
            raise OSError("the history cannot be written")
        return True

    async def dry_run(self, spec: ServiceSpec, listed: int, with_baselines: bool) -> dict[str, Any]:
        """Return where a service would go and why.

        Raises:
            ServiceError: it cannot be had, or nothing is known yet.
            PlacementError: it does not fit.
            BusyError: too many at once.
        """
        self.scheduler.check_service(spec)
        if not self.scheduler.view.names:
            raise ServiceError("no-matrix-yet", "", "no round has ended yet: too little data")
        if self._dry_runs >= DRY_RUNS_MAX:
            raise BusyError
        self._dry_runs += 1
        try:
            outcome = self.scheduler.outcome
            grouping = None if outcome is None else outcome.grouping
            view = self.scheduler.view
            result = await self._aside(
                dry_run, spec, view, self.scheduler.policy, grouping, listed, with_baselines
            )
        finally:
            self._dry_runs -= 1
        return {"round": view.round, "time": view.time, "replicas": spec.replicas, **result}

    async def _aside(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._inline:
            return call(*args, **kwargs)
        if self._dry is None:
            self._dry = ThreadPoolExecutor(1, "placement")
        return await asyncio.get_running_loop().run_in_executor(
            self._dry, functools.partial(call, *args, **kwargs)
        )
