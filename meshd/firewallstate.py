"""Keeps our table of nftables, by a worker thread, and looks out for the tables of others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from crossedge.host import nft
from crossedge.host.monitor import NftEvent, NftMonitor
from crossedge.host.namespaces import Namespace
from crossedge.meshd import firewall, foreign
from crossedge.meshd.desired import Desired
from crossedge.meshd.foreign import Problem
from crossedge.meshd.ruleset import Ruleset, counters

DELAY = 0.05
"""Seconds between hearing that our table was touched and looking at it."""
SOON = 1.0
LATER = 30.0
"""Seconds before other tables are looked at: when chains came or went, and when only their content did."""
REFRESH = 5.0
"""Seconds after which a fresh look is not waited for any longer."""
RETRY = 2.0
"""Seconds before a refused script is tried again."""
NFPROTO_INET = 1

log = logging.getLogger(__name__)


class _Done(NamedTuple):
    """What a job of the worker came to."""

    desired: Desired | None = None
    installed: Ruleset | None = None
    processes: tuple[int, ...] = ()
    differences: tuple[str, ...] = ()
    problems: tuple[Problem, ...] | None = None
    made: bool = False
    counters: dict[str, int] | None = None


class FirewallState:
    """Our table: as desired after each change, and again after others touched it.

    Transactions are made one at a time, of the newest value. Each touch by another process (its netlink port
    is not that of a nft of ours) makes us compare the whole table. Events are preferred to reading the
    generation number twice a second: they cost an idle host nothing, are faster, and tell a foreign busy
    table from ours.
    """

    def __init__(self, namespace: Namespace, count: Callable[[str, int], None]) -> None:
        """Work in `namespace`; `count` (kind, times) is called when something was set right."""
        self._namespace = namespace
        self._count = count
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._monitor: NftMonitor | None = None
        self._desired = Desired()
        self._cache: firewall.Cache = {}
        self._installed: Ruleset | None = None
        self._installed_for: Desired | None = None
        self._running = False
        self._verify = False
        self._look = False
        self._timers: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        self._own: deque[int] = deque(maxlen=64)
        self._strangers: set[int] = set()
        self._error = ""
        self._counters: dict[str, int] = {}
        self.made = False
        """Whether our table was not there when this was started."""
        self.problems: tuple[Problem, ...] = ()
        """Other tables that drop what is forwarded for our pods, when last looked at."""

    def start(self, loop: asyncio.AbstractEventLoop, desired: Desired) -> None:
        """Put our table in place, waiting for it, and keep it; raises `OSError` (`NftError` among them)."""
        self._desired = desired
        self._installed = self._installed_for = None
        with contextlib.ExitStack() as undo:
            self._worker = ThreadPoolExecutor(1, "nftables", self._namespace.enter)
            undo.callback(self._worker.shutdown)
            self._monitor = self._namespace.call(NftMonitor, self._on_event)
            undo.callback(self._monitor.close)
            done = self._worker.submit(_check, desired, self._cache).result()
            self.made = done.made
            self._finish(done, start=True)
            undo.pop_all()
        self._loop = loop
        self._monitor.start(loop)
        self._look = True
        self._pump()

    def want(self, desired: Desired) -> None:
        """Bring the table to another value, soon."""
        self._look = self._look or (desired.pods, desired.tun) != (self._desired.pods, self._desired.tun)
        self._desired = desired
        self._pump()

    @property
    def busy(self) -> bool:
        """Whether something is being done or due soon; not while a failure waits for its next try."""
        if self._installed_for is not self._desired and "retry" not in self._timers:
            return True
        return self._running or "verify" in self._timers

    def stop(self) -> None:
        """Stop keeping the table; it stays in place. May be called twice."""
        for _, timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        self._loop = None
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        self._running = False
        self._installed_for = self._desired

    def report(self) -> dict[str, Any]:
        """Return plain values about our table."""
        return {
            "table": f"{firewall.FAMILY} {firewall.TABLE}",
            "current": self._installed is not None and self._installed_for is self._desired,
            "error": self._error,
            "counters": dict(self._counters),
        }

    async def refresh(self) -> None:
        """Look at our table's counters and at the tables of others now, so that `report` is fresh."""
        if self._loop is None:
            return
        self._look = self._verify = True
        self._pump()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REFRESH):
                while self._running:
                    await asyncio.sleep(0.01)

    def _on_event(self, event: NftEvent) -> None:
        if event.overrun:
            self._strangers.add(0)
            self._after("verify", DELAY)
            self._after("look", SOON)
        elif (event.table, event.family) != (firewall.TABLE, NFPROTO_INET):
            self._after("look", SOON if event.chains else LATER)
        elif event.port not in self._own:
            # While a job runs, its process is not known yet: it is sorted out when the job is done.
            self._strangers.add(event.port)
            if not self._running:
                self._after("verify", DELAY)

    def _after(self, what: str, delay: float) -> None:
        if self._loop is None:
            return
        when = self._loop.time() + delay
        if what in self._timers:
            earlier, timer = self._timers[what]
            if earlier <= when:
                return
            timer.cancel()
        self._timers[what] = when, self._loop.call_at(when, self._due, what)

    def _due(self, what: str) -> None:
        del self._timers[what]
        if what == "verify":
            self._verify = True
        elif what == "look":
            self._look = True
        self._pump()

    def _pump(self) -> None:
        """Give the worker its next job, the most important first."""
        if self._running or self._loop is None or self._worker is None:
            return
        if self._installed_for is not self._desired:
            if "retry" in self._timers:
                return
            job = self._worker.submit(_install, self._desired, self._cache, self._installed)
        elif self._verify:
            self._verify = False
            self._strangers.clear()
            job = self._worker.submit(_check, self._desired, self._cache)
        elif self._look:
            self._look = False
            job = self._worker.submit(_look, self._desired)
        else:
            return
        self._running = True
        loop = self._loop
        job.add_done_callback(lambda done: _call_soon(loop, self._on_done, done))

    def _on_done(self, job: Future[_Done]) -> None:
        self._running = False
        if self._loop is None:
            return
        try:
            done = job.result()
        except (OSError, ValueError) as error:
            if str(error) != self._error:
                log.error("%s", error)
            self._error = str(error)
            self._installed = self._installed_for = None
            self._after("retry", RETRY)
        else:
            self._finish(done)
        self._strangers -= set(self._own)
        if self._strangers:
            self._after("verify", DELAY)
        self._pump()

    def _finish(self, done: _Done, start: bool = False) -> None:
        self._error = ""
        self._own.extend(done.processes)
        if done.installed is not None:
            self._installed, self._installed_for = done.installed, done.desired
        if done.differences and not start:
            log.warning(
                "our table of nftables was changed (%s) and is set right", "; ".join(done.differences)
            )
            self._count("nftables", 1)
        if done.counters is not None:
            self._counters = done.counters
        if done.problems is not None:
            for problem in set(done.problems) - set(self.problems):
                log.warning("%s; fix: %s", problem.what, problem.fix)
            self.problems = done.problems


def _call_soon(
    loop: asyncio.AbstractEventLoop, function: Callable[[Future[_Done]], None], job: Future[_Done]
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(function, job)


def _install(desired: Desired, cache: firewall.Cache, before: Ruleset | None) -> _Done:
    """Make our table what is wanted: by the difference, or anew where that is not all or does not fit."""
    wanted = firewall.build(desired, cache)
    delta = wanted.delta(before) if before is not None else None
    if delta is not None:
        try:
            return _Done(desired, wanted, (nft.apply(delta + "\n"),) if delta else ())
        except nft.NftError:
            log.warning("our table of nftables is not as we left it, and is made anew")
    return _Done(desired, wanted, (nft.apply(wanted.script()),))


def _check(desired: Desired, cache: firewall.Cache) -> _Done:
    """Compare our table with what is wanted, and make it anew if it differs."""
    wanted = firewall.build(desired, cache)
    listed = nft.list_table(firewall.FAMILY, firewall.TABLE)
    differences = tuple(wanted.differences(listed))
    if not differences:
        return _Done(desired, wanted, counters=counters(listed or []))
    return _Done(desired, wanted, (nft.apply(wanted.script()),), differences, made=listed is None)


def _look(desired: Desired) -> _Done:
    """Look at the tables of others."""
    return _Done(problems=tuple(foreign.find(desired)))


def remove_table() -> list[str]:
    """Delete our table in the calling thread's namespace; return what was deleted. Raises `NftError`."""
    try:
        if nft.list_table(firewall.FAMILY, firewall.TABLE) is None:
            return []
    except nft.NftMissingError:
        return []  # without nft we cannot have made one
    nft.apply(f"delete table {firewall.FAMILY} {firewall.TABLE}\n")
    return [f"table {firewall.FAMILY} {firewall.TABLE}"]
