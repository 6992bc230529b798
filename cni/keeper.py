"""Keeps what pods have: what somebody deletes of it, on the host or in the pod, is back within a second.

Netlink events tell that something changed: of the host's namespace each one, of the pods' only in which
something was taken away. What is wrong is then found by comparing all of the host's side at once, and the
pods' sides that an event concerns, and set right attachment by attachment, each held while that is done.
Those that a request is working on are left.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from crossedge.cni import device
from crossedge.cni.commands import open_netns
from crossedge.cni.ipam import ADDED, Entry
from crossedge.cni.spec import CniError
from crossedge.host.bpf import losses
from crossedge.host.links import Link
from crossedge.host.losses import Losses
from crossedge.host.monitor import Event, Monitor
from crossedge.host.namespaces import Namespace
from crossedge.host.neighbours import Neighbour, list_neighbours
from crossedge.host.netlink import Address, Netlink
from crossedge.host.routes import Route, list_routes

if TYPE_CHECKING:
    from crossedge.cni.commands import Host

DELAY: Final = 0.1
"""Seconds between hearing of a change and looking at all: pods come and go in crowds."""
RETRY: Final = 0.5
"""Seconds before another look, where an attachment was being worked on or could not be set right."""
REST: Final = 3.0
"""Rest between two looks, in units of what the last one took, up to `RETRY`: a pod that breaks its own
interface over and over costs a quarter of a thread at most."""
LEAVING_MOST: Final = 4096
"""Most links that go of which it is remembered."""
LOOK_AT_ALL: Final = 5.0
"""Least seconds between two looks into all pods, where events were lost."""

log = logging.getLogger(__name__)


class Keeper:
    """Watches the host's namespace, and those of pods, for what belongs to pods."""

    def __init__(self, host: Host, background: Callable[[Callable[[], None]], None]) -> None:
        """`background` runs a job on a thread of its own."""
        self._host = host
        self._background = background
        self._loop: asyncio.AbstractEventLoop | None = None
        self._monitor: Monitor | None = None
        self._losses: Losses | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._busy = threading.Lock()
        self._rest = 0.0
        self._unseen = True
        """Whether there may be pods that lost something unseen."""
        self._seen = 0.0
        """When all pods were last looked into."""
        self._leaving: set[int] = set()
        """Indexes of links that DEL took down: what goes with them is no loss."""
        self._outside = True
        """Whether the host's side may lack something."""
        self._left: set[int] = set()
        """Serial numbers of attachments that the last look had to leave."""
        self._times: Counter[int] = Counter()
        """How often an attachment was set right, by serial number."""
        self.repaired: Counter[str] = Counter()
        """Attachments that were set right, by what became of it: "repaired", "failed"."""

    def start(self, loop: asyncio.AbstractEventLoop, namespace: Namespace) -> None:
        """Watch, and look once; raises `OSError`."""
        self._loop = loop
        self._unseen, self._seen, self._outside = True, 0.0, True
        with namespace:
            kinds, only = ("link", "route", "neighbour"), losses(links=True, protocol=device.PROTOCOL)
            self._monitor = Monitor(self._on_event, kinds, only)
            try:
                self._losses = Losses()
            except OSError as error:
                log.warning("what is deleted inside of pods is not set right: %s", error)
        self._monitor.start(loop)
        self._listen(True)
        self._schedule(0.0)

    def look_again(self) -> None:
        """Look into all pods, for what they should have has changed."""
        self._unseen, self._seen = True, 0.0
        self._schedule(0.0)

    def stop(self) -> None:
        """Stop watching; what is being set right is finished by its thread."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        self._listen(False)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop = None
        with self._busy:  # the thread that looks may be reading it
            if self._losses is not None:
                self._losses.close()
                self._losses = None

    def _listen(self, on: bool) -> None:
        """Be woken by the pods' events, or not: they wait to be read by the look that one of them causes."""
        if self._losses is None or self._loop is None:
            return
        if on:
            self._loop.add_reader(self._losses.fileno(), self._on_loss)
        else:
            self._loop.remove_reader(self._losses.fileno())

    def _has(self, address: Address) -> bool:
        """Tell whether an address may be a pod's here."""
        try:
            return any(address in prefix for prefix in self._host.node().prefixes)
        except CniError:
            return True

    def _on_loss(self) -> None:
        self._listen(False)
        self._schedule(DELAY)

    def _on_event(self, event: Event) -> None:
        item = event.item
        concerned = event.kind == "overrun"
        if isinstance(item, Link):
            if event.deleted:
                self._leaving.discard(item.index)
            elif item.group == device.LEAVING and len(self._leaving) < LEAVING_MOST:
                self._leaving.add(item.index)
            concerned = item.group == device.GROUP
        elif isinstance(item, Route):
            concerned = item.device not in self._leaving
        elif isinstance(item, Neighbour):
            concerned = item.device not in self._leaving and self._has(item.address)
        if concerned:
            self._outside = True
            self._schedule(DELAY)

    def _schedule(self, delay: float) -> None:
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(max(delay, self._rest), self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._background(self._reconcile)

    def _after(self, again: bool) -> None:
        """Go on after a look, on the loop."""
        self._listen(True)
        if again:
            self._schedule(RETRY)

    def _reconcile(self) -> None:
        again = True
        if self._busy.acquire(blocking=False):
            begin = time.monotonic()
            try:
                again = not self._look()
            finally:
                self._rest = min(REST * (time.monotonic() - begin), RETRY)
                self._busy.release()
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._after, again)

    def _look(self) -> bool:
        """Compare and set right; return whether nothing is left to be done."""
        concerned: set[int] = set()
        if self._losses is not None:
            concerned, missed = self._losses.drain()
            self._unseen = self._unseen or missed
        now = time.monotonic()
        everywhere = self._unseen and (not self._seen or now - self._seen >= LOOK_AT_ALL)
        if everywhere:
            self._unseen, self._seen = False, now
        wrong, suspected = self._suspects(concerned, everywhere)
        left = [entry for entry in wrong if not self._repair(entry, True)]
        left += [entry for entry in suspected if not self._repair(entry, False)]
        self._left = {entry.serial for entry in left}
        return not self._left and not self._unseen

    def _suspects(self, concerned: set[int], everywhere: bool) -> tuple[list[Entry], list[Entry]]:
        """Return the attachments of which the host's side lacks something, and others to be looked into."""
        outside, self._outside = self._outside or everywhere or bool(self._left), False
        # The ledger first: what is added in it now had all of its host's side before.
        entries = list(self._host.store.look().live.values())
        netlink = self._host.netlink()
        links = device.host_links(netlink)
        self._widen(netlink, links.values())
        routes, known = set(), set()
        if outside:
            listed = list_routes(netlink, table=254, protocol=device.PROTOCOL)
            routes = {(route.destination, route.device) for route in listed}
            known = {(each.device, each.address) for each in list_neighbours(netlink)}
        wrong, suspected = [], []
        for serial in self._times.keys() - {entry.serial for entry in entries}:
            del self._times[serial]
        for entry in entries:
            if entry.state != ADDED or entry.serial in self._host.owed:
                continue
            link = links.get(entry.host)
            lacks = link is None or not link.up
            if link is not None and outside:
                lacks = lacks or any(
                    (device.host_route(address, 0).destination, link.index) not in routes
                    or (link.index, address) not in known
                    for address in entry.addresses
                )
            if link is None or lacks:
                wrong.append(entry)
            elif everywhere or link.namespace in concerned or entry.serial in self._left:
                suspected.append(entry)
        return wrong, suspected

    def _widen(self, netlink: Netlink, links: Iterable[Link]) -> None:
        try:
            if self._host.node().big_tcp:
                device.widen(netlink, links)
        except CniError as error:
            log.error("long packets to pods are cut on their way: %s", error)

    def _repair(self, entry: Entry, outside_lacks: bool) -> bool:
        """Set an attachment right; return whether there is nothing left to be done about it."""
        with self._host.store.attachment(entry.key, wait=False) as held:
            if not held:
                return False
            current = self._host.store.look().live.get(entry.key)
            if current is None or current.serial != entry.serial or current.state != ADDED:
                return True
            netns = open_netns(current.netns)
            if netns is None:
                return True  # the pod is gone, or ends: its DEL or the recovery sees to the rest
            try:
                if netns.inode != current.inode:
                    return True
                netlink, node = self._host.netlink(), self._host.node()
                if missing := device.repair(netlink, current, netns, node, outside_lacks):
                    self._tell(current, missing)
            except (CniError, OSError) as error:
                self.repaired["failed"] += 1
                log.error("%s/%s cannot be set right yet: %s", *current.key, error)
                return False
            finally:
                netns.close()
        return True

    def _tell(self, entry: Entry, missing: list[str]) -> None:
        self.repaired["repaired"] += 1
        self._times[entry.serial] = times = self._times[entry.serial] + 1
        if not times & (times - 1):  # 1, 2, 4, 8...: a pod may break its own interface for ever
            log.warning("%s/%s is set right (%d): %s", *entry.key, times, "; ".join(missing))
