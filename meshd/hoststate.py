"""Keeps the host as it should be: TUN, addresses, routes, rules, sysctls, nftables.

What is desired is a value (`Desired`). A change of it costs the difference: one batch of netlink messages,
sent at once, and one transaction of nftables, made by a worker thread. What others change is heard of by
netlink events, not by polling, and is repaired within a second.

Stopping leaves everything in place, and starting adopts what is there: only what is no longer desired goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from crossedge.host import sysctl
from crossedge.host.addresses import LinkAddress
from crossedge.host.device import remove_device
from crossedge.host.interfaces import connected_networks
from crossedge.host.links import Link
from crossedge.host.monitor import Event, Monitor
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import NetlinkError
from crossedge.host.sysctl import Change, Sysctls
from crossedge.host.tun import Tun
from crossedge.meshd import desired as plan
from crossedge.meshd.desired import Desired, InboundRule, PeerRoute
from crossedge.meshd.firewallstate import FirewallState, remove_table
from crossedge.meshd.hostkernel import HostKernel, remove_routing
from crossedge.meshd.hostsysctls import FORWARD6, Record, load_record, needed_sysctls, save_record

__all__ = ["Desired", "HostConflictError", "HostState", "InboundRule", "PeerRoute"]

DELAY = 0.03
"""Seconds between hearing of a change and repairing it: what comes together is repaired together."""
PATIENCE = 20
"""Repairs within `BUSY` seconds, after which somebody is taken to work against us."""
BUSY = 10.0
SLOW = 0.5
"""Seconds between repairs when somebody works against us, and between tries that fail."""
ERRORS_LOGGED = 3

log = logging.getLogger(__name__)


class HostConflictError(ValueError):
    """Our prefixes would swallow a network that the host is connected to; the text names both."""


class HostState:
    """The host's network as one daemon needs it, in the namespace of the thread that makes this object."""

    def __init__(
        self,
        desired: Desired,
        *,
        record: Path | None = None,
        tun_descriptor: int | None = None,
        disable: frozenset[str] = frozenset(),
        on_tun: Callable[[Tun], None] | None = None,
    ) -> None:
        """Nothing is done before `start`.

        `record` is a file for the TUN's name and the sysctls that were changed, so that `cleanup` can undo
        them in another life; its place is below /run. `tun_descriptor` is an inherited open TUN, then ours.
        `disable` names TUN offloads not to use. `on_tun` is called with each TUN that is opened after the
        first, because somebody deleted that: when it returns, the old descriptor is closed.
        """
        self._desired = self._asked = desired
        self._record = record
        self._tun_descriptor = tun_descriptor
        self._namespace = Namespace.current()
        self._versions = frozenset({4, 6} if sysctl.read(FORWARD6) is not None else {4})
        self._earlier = load_record(record)
        self._sysctls = Sysctls(self._earlier.changes, self._remember)
        self._firewall = FirewallState(self._namespace, self._count)
        self._kernel = HostKernel(self._namespace, desired, self._versions, self._count, disable, on_tun)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._monitor: Monitor | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._dirty: set[str] = set()
        self._recent: deque[float] = deque(maxlen=PATIENCE)
        self._conflicts: list[str] = []
        self._error = ""
        self.repaired: Counter[str] = Counter()
        """How much of what others deleted or changed was set right, by kind."""

    @property
    def tun(self) -> Tun:
        """The open TUN, whose descriptor stays ours to close; raises `RuntimeError` unless started."""
        if self._kernel.tun is None:
            raise RuntimeError("the host's state is not started")
        return self._kernel.tun

    def start(self, loop: asyncio.AbstractEventLoop) -> Tun:
        """Bring the host to what is desired, waiting for it, and keep it so; return the open TUN.

        The firewall stands before the first packet can pass. Raises `HostConflictError` or
        `OSError` (`NftError`, `NetlinkError`, a TUN that another process holds); then nothing keeps running,
        and the host is as it was.
        """
        if self._loop is not None:
            raise RuntimeError("the host's state is started already")
        self._desired = self._checked(self._asked)
        with contextlib.ExitStack() as undo:
            undo.callback(self.withdraw)
            with self._namespace:
                self._monitor = Monitor(self._on_event, ("link", "address", "route", "rule", "settings"))
                undo.callback(self._monitor.close)
                undo.callback(self._firewall.stop)
                self._firewall.start(loop, self._desired)
                undo.callback(self._kernel.close)
                self._remove_renamed_tun()
                self._kernel.desired = self._desired
                descriptor, self._tun_descriptor = self._tun_descriptor, None
                self._kernel.open(descriptor)
                self._apply_sysctls()
            for error in self._kernel.synchronise({"link", "address", "rule", "route"}, repair=False):
                raise error
            self._loop = loop
            self._monitor.start(loop)
            undo.pop_all()
        return self.tun

    def apply(self, desired: Desired) -> None:
        """Bring the host to another value; before `start` it only replaces what is desired.

        Addresses and routes are set when this returns, nftables follow (see `settled`). What the kernel
        refuses is logged, reported and tried again. Raises `HostConflictError`, and `ValueError` for another
        TUN name; then nothing has changed.
        """
        if self._loop is None:
            self._desired = self._asked = desired
            return
        if desired.tun != self._desired.tun:
            raise ValueError("the TUN's name cannot change while it is in use")
        if (desired.mesh, desired.stock) == (self._asked.mesh, self._asked.stock):
            allowed = replace(desired, stock=self._desired.stock)
        else:
            allowed = self._checked(desired, routed=desired.mesh == self._asked.mesh)
        self._asked = desired
        self._become(allowed)

    def _become(self, desired: Desired) -> None:
        before, self._desired = self._desired, desired
        self._firewall.want(desired)
        if (desired.pods, desired.stock) != (before.pods, before.stock):
            with self._namespace:
                self._apply_sysctls()
        if errors := self._kernel.change(desired):
            self._refused(errors)
            self._schedule({"link", "address", "route"}, SLOW)

    async def settled(self) -> None:
        """Wait until what was asked for and heard of is done, or has failed and waits for its next try."""
        while (self._timer is not None and not self._error) or self._firewall.busy:
            await asyncio.sleep(0.01)

    async def refresh(self) -> None:
        """Look at the firewall's counters and at the tables of others, so that `report` is fresh."""
        await self._firewall.refresh()

    def stop(self) -> None:
        """Stop keeping the host; all stays in place, the TUN's descriptor is closed. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None
        self._firewall.stop()
        self._kernel.close()
        self._loop = None

    def withdraw(self) -> None:
        """Stop, and take back what `start` made and no earlier life had: the daemon cannot run after all."""
        self.stop()
        with self._namespace:
            try:
                if self._earlier == Record():
                    self._sysctls.restore()
                    if self._record is not None:
                        self._record.unlink(missing_ok=True)
                if self._kernel.made_routing:
                    remove_routing()
                if self._kernel.made_tun:
                    remove_device(self._desired.tun)
                if self._firewall.made:
                    remove_table()
            except OSError as error:
                log.error("something of us is left: %s; meshd cleanup removes it", error)

    def close(self) -> None:
        """Stop, and give up the namespace; the object is of no use afterwards."""
        self.stop()
        self._namespace.close()

    def cleanup(self) -> list[str]:
        """Stop, and remove every trace from the host: TUN, routes, rules, table, sysctls; return what went.

        Works without `start` too, for what another life left; of what is desired only the TUN's name is
        looked at. Raises `OSError`, after all that could be removed is.
        """
        self.stop()
        removed: list[str] = []
        with self._namespace, contextlib.ExitStack() as finish:
            if self._record is not None:
                finish.callback(self._record.unlink, missing_ok=True)
            finish.callback(lambda: removed.extend(remove_table()))
            finish.callback(lambda: removed.extend(self._remove_tun()))
            finish.callback(lambda: removed.extend(remove_routing()))
            removed += [f"sysctl {name}" for name in self._sysctls.restore()]
        return removed

    def _remove_tun(self) -> list[str]:
        names = {self._desired.tun, self._earlier.tun} - {""}
        return [f"link {name}" for name in sorted(names) if remove_device(name)]

    def report(self) -> dict[str, Any]:
        """Return what is in place, for people and programs: plain values only, as JSON has them."""
        with self._namespace:
            sysctls = self._sysctls.report()
        tun = self._kernel.tun
        return {
            "tun": {
                "name": self._desired.tun,
                "kind": tun.kind if tun is not None else "",
                "index": self._kernel.index,
                "mtu": self._desired.mtu,
                "offloads": sorted(tun.offloads) if tun is not None else [],
            },
            "overlay": [str(address) for address in self._desired.overlay],
            "routes": {"table": plan.TABLE, "protocol": plan.PROTOCOL, "count": len(self._kernel.routes)},
            "rules": [
                {
                    "family": f"ipv{version}",
                    "rule": f"{plan.PRIORITY}: not fwmark {plan.MARK:#x} lookup {plan.TABLE}",
                }
                for version in sorted(self._versions)
            ],
            "sysctls": [
                {"name": each.name, "wanted": each.wanted, "now": each.now, "before": each.before}
                for each in sysctls
            ],
            "nftables": self._firewall.report(),
            "repaired": dict(self.repaired),
            "problems": [
                *(
                    {"what": what, "fix": "renumber that network, or choose other prefixes"}
                    for what in self._conflicts
                ),
                *(problem._asdict() for problem in self._firewall.problems),
                *(
                    {"what": f"{each.name} is {each.now}, not {each.wanted}", "fix": f"set it ({each.error})"}
                    for each in sysctls
                    if not each.met
                ),
                *self._trouble(),
            ],
        }

    def _trouble(self) -> list[dict[str, str]]:
        found = []
        if self._error:
            found.append({"what": self._error, "fix": "it is tried again twice a second"})
        if self._working_against_us():
            what = f"something keeps undoing our changes ({dict(self.repaired)})"
            fix = "systemd-networkd: ManageForeignRoutes=no and ManageForeignRoutingPolicyRules=no"
            found.append({"what": what, "fix": fix})
        return found

    # What the kernel tells, and what is done about it

    def _on_event(self, event: Event) -> None:
        kinds = self._kernel.concerned(event)
        item = event.item
        if event.kind == "overrun":
            kinds |= {"settings", "conflicts", "uplinks"}
        elif event.kind == "settings":
            kinds |= {"settings"}
        elif isinstance(item, LinkAddress) and item.index != self._kernel.index:
            kinds |= {"conflicts"}
        elif isinstance(item, Link) and not item.kind and not event.deleted:
            kinds |= {"uplinks"}
        if kinds:
            self._schedule(kinds)

    def _schedule(self, kinds: Iterable[str], delay: float = DELAY) -> None:
        self._dirty |= set(kinds)
        if self._timer is None and self._loop is not None:
            if self._working_against_us():
                delay = max(delay, SLOW)
            self._timer = self._loop.call_later(delay, self._reconcile)

    def _reconcile(self) -> None:
        self._timer = None
        kinds, self._dirty = self._dirty, set()
        try:
            if "conflicts" in kinds:
                self._look_for_conflicts()
            errors = self._kernel.synchronise(kinds)
            with self._namespace:
                if "uplinks" in kinds or "link" in kinds:
                    self._apply_sysctls()
                if ("settings" in kinds) and (changed := self._sysctls.enforce()):
                    self._count("settings", len(changed))
        except OSError as error:
            self._fail(str(error))
            self._schedule(kinds, SLOW)
            return
        if errors:
            self._refused(errors)
            self._schedule(kinds, SLOW)
        else:
            self._error = ""

    def _remember(self, changes: Mapping[str, Change]) -> None:
        save_record(self._record, Record(self._desired.tun, changes))

    def _remove_renamed_tun(self) -> None:
        """Remove the TUN of an earlier life that had another name."""
        name = self._earlier.tun
        if name and name != self._desired.tun and remove_device(name):
            log.warning("the TUN of an earlier life, %s, is removed", name)
        self._remember(self._sysctls.changes)

    def _apply_sysctls(self) -> None:
        for name, value in needed_sysctls(self._desired, self._versions, self._sysctls.changes):
            self._sysctls.require(name, value)

    def _checked(self, desired: Desired, *, routed: bool = False) -> Desired:
        """Return what may be done of what is desired: all, but for stock peers' prefixes that are in the way.

        Raises `HostConflictError` where the mesh itself is, unless it is `routed` already: then that is told.
        """
        with self._namespace:
            connected = connected_networks({desired.tun, self._earlier.tun})
        found = [f"mesh {text}" for text in plan.overlaps(desired.mesh, desired.pods, connected).values()]
        if found and not routed:
            raise HostConflictError("; ".join(found))
        refused = plan.overlaps([peer.prefix for peer in desired.stock], desired.pods, connected)
        self._set_conflicts(found + [f"a stock peer's {text}" for text in refused.values()])
        kept = frozenset(peer for peer in desired.stock if peer.prefix not in refused)
        return replace(desired, stock=kept) if refused else desired

    def _look_for_conflicts(self) -> None:
        """Tell of networks that the host was connected to since: what is routed stays so."""
        with self._namespace:
            connected = connected_networks({self._desired.tun})
        pods = self._desired.pods
        refused = plan.overlaps([peer.prefix for peer in self._asked.stock], pods, connected)
        found = [f"mesh {text}" for text in plan.overlaps(self._desired.mesh, pods, connected).values()]
        self._set_conflicts(found + [f"a stock peer's {text}" for text in refused.values()])
        left_out = self._asked.stock - self._desired.stock
        if free := frozenset(peer for peer in left_out if peer.prefix not in refused):
            self._become(replace(self._desired, stock=self._desired.stock | free))

    def _set_conflicts(self, found: list[str]) -> None:
        for conflict in set(found) - set(self._conflicts):
            log.error("%s", conflict)
        self._conflicts = found

    def _count(self, kind: str, times: int) -> None:
        self.repaired[kind] += times
        log.warning("%d of ours (%s) had been deleted or changed, and is set right", times, kind)
        if self._loop is not None:
            self._recent.append(self._loop.time())

    def _working_against_us(self) -> bool:
        if self._loop is None or len(self._recent) < PATIENCE:
            return False
        return self._loop.time() - self._recent[0] < BUSY

    def _refused(self, errors: list[NetlinkError]) -> None:
        for error in errors[1:ERRORS_LOGGED]:
            log.error("%s", error.strerror)
        more = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        self._fail(f"{errors[0].strerror}{more}")

    def _fail(self, why: str) -> None:
        if why != self._error:
            log.error("%s", why)
        self._error = why
