"""Keeps what pods have: a link, route or neighbour that somebody deletes is back within a second.

Netlink events tell that something changed; what is wrong is then found by comparing all at once, and set
right attachment by attachment, each held while that is done. Those that a request is working on are left.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from crossedge.cni import device
from crossedge.cni.commands import open_netns
from crossedge.cni.ipam import ADDED, Entry
from crossedge.cni.spec import CniError
from crossedge.host.links import Link
from crossedge.host.monitor import Event, Monitor
from crossedge.host.namespaces import Namespace
from crossedge.host.neighbours import Neighbour, list_neighbours
from crossedge.host.routes import Route, list_routes

if TYPE_CHECKING:
    from crossedge.cni.commands import Host

DELAY: Final = 0.1
"""Seconds between hearing of a change and looking at all: pods come and go in crowds."""
RETRY: Final = 0.5
"""Seconds before another look, where an attachment was being worked on or could not be set right."""

log = logging.getLogger(__name__)


class Keeper:
    """Watches the host's namespace for what belongs to pods."""

    def __init__(self, host: Host, background: Callable[[Callable[[], None]], None]) -> None:
        """`background` runs a job on a thread of its own."""
        self._host = host
        self._background = background
        self._loop: asyncio.AbstractEventLoop | None = None
        self._monitor: Monitor | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._busy = threading.Lock()
        self.repaired: Counter[str] = Counter()
        """Attachments that were set right, by what became of it: "repaired", "failed"."""

    def start(self, loop: asyncio.AbstractEventLoop, namespace: Namespace) -> None:
        """Watch, and look once; raises `OSError`."""
        self._loop = loop
        with namespace:
            self._monitor = Monitor(self._on_event, ("link", "route", "neighbour"))
        self._monitor.start(loop)
        self._schedule(0.0)

    def stop(self) -> None:
        """Stop watching; what is being set right is finished by its thread."""
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop = None

    def _on_event(self, event: Event) -> None:
        item = event.item
        concerned = event.kind == "overrun"
        if isinstance(item, Link):
            concerned = item.group == device.GROUP
        elif isinstance(item, Route):
            concerned = event.deleted and item.protocol == device.PROTOCOL
        elif isinstance(item, Neighbour):
            concerned = event.deleted
        if concerned:
            self._schedule(DELAY)

    def _schedule(self, delay: float) -> None:
        if self._timer is None and self._loop is not None:
            self._timer = self._loop.call_later(delay, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self._background(self._reconcile)

    def _again(self) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._schedule, RETRY)

    def _reconcile(self) -> None:
        if not self._busy.acquire(blocking=False):
            self._again()
            return
        try:
            wrong = self._wrong()
            left = [entry for entry in wrong if not self._repair(entry)]
        finally:
            self._busy.release()
        if left:
            self._again()

    def _wrong(self) -> list[Entry]:
        """Return the attachments of which the host's side lacks something."""
        netlink = self._host.netlink()
        links = device.host_links(netlink)
        routes = {
            (r.destination, r.device) for r in list_routes(netlink, table=254, protocol=device.PROTOCOL)
        }
        known = {(each.device, each.address) for each in list_neighbours(netlink)}
        found = []
        for entry in list(self._host.store.look().live.values()):
            if entry.state != ADDED:
                continue
            link = links.get(entry.host)
            if (
                link is None
                or not link.up
                or any(
                    (device.host_route(address, 0).destination, link.index) not in routes
                    or (link.index, address) not in known
                    for address in entry.addresses
                )
            ):
                found.append(entry)
        return found

    def _repair(self, entry: Entry) -> bool:
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
                if device.repair(self._host.netlink(), current, netns, self._host.node().mtu):
                    self.repaired["repaired"] += 1
                    log.warning("what %s/%s had lost is set right", *current.key)
            except (CniError, OSError) as error:
                self.repaired["failed"] += 1
                log.error("%s/%s cannot be set right yet: %s", *current.key, error)
                return False
            finally:
                netns.close()
        return True
