"""The plugin's server as the daemon runs it: started last, told what the mesh knows, stopped first.

Its threads ask for the verdict of STATUS; the loop writes it. A server that cannot be started is told of and
does not hold up the mesh: the plugin then works locally, as if there were no daemon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from crossedge.cni import spec
from crossedge.cni.install import publish
from crossedge.cni.node import Node, Paths
from crossedge.cni.serve import CniServer
from crossedge.cni.spec import CniError
from crossedge.host.tun import BIG_TCP, Tun
from crossedge.wire.endpoint import Network

NOT_READY: Final = (spec.UNAVAILABLE, "meshd is not ready", "it starts, or stops; try again")
"""Code, message and details of an error; the error itself is made anew for each that raises it."""

log = logging.getLogger("meshd")


class PodServer:
    """Serves the plugin's binary for one daemon."""

    def __init__(self, root: Path, prefixes: Iterable[Network], mtu: int, unreachable_after: float) -> None:
        """`mtu` in bytes, of every pod; `unreachable_after` in seconds, for what STATUS says."""
        self._paths = Paths(root.absolute())
        self._node = Node(tuple(prefixes), mtu)
        self._cut_off = (
            spec.IMPAIRED,
            f"no peer was reached for {unreachable_after:.0f} s: pods of this node are cut off",
            "crossedge status says what is wrong",
        )
        self._verdict: tuple[int, str, str] | None = NOT_READY
        self._server: CniServer | None = None
        self._problem = ""

    def start(self, loop: asyncio.AbstractEventLoop, tun: Tun) -> None:
        """Recover what crashes left and serve; STATUS says "not ready" until `ready`.

        Pods send and get super-packets that `tun` takes and gives.
        """
        self._node = replace(self._node, big_tcp=BIG_TCP in tun.offloads)
        try:
            server = CniServer(self._paths, self._node, self._health)
            server.start(loop)
        except (CniError, OSError) as error:
            self._problem = f"the CNI plugin is not served: {error}"
            log.error("%s", self._problem)
            return
        self._server = server

    def change(self, tun: Tun) -> None:
        """Have pods keep to what another device takes and gives."""
        node = replace(self._node, big_tcp=BIG_TCP in tun.offloads)
        if node == self._node:
            return
        self._node = node
        if self._server is not None:
            try:
                self._server.change(node)
            except OSError as error:
                log.error("%s cannot be written: %s", self._paths.node, error.strerror or error)

    def ready(self) -> None:
        """Say that pods can be served, and write the conflist if `crossedge-cni install` prepared one."""
        if self._server is None:
            return
        self._verdict = None
        try:
            if publish(self._paths):
                log.info("wrote %s: container runtimes find the network from now on", self._paths.conflist)
        except OSError as error:
            self._problem = f"{self._paths.conflist} cannot be written: {error.strerror or error}"
            log.error("%s", self._problem)

    def reached(self, cut_off: bool) -> None:
        """Take the mesh's verdict: whether no peer was reached for too long."""
        if self._verdict is not NOT_READY:
            self._verdict = self._cut_off if cut_off else None

    def stop(self) -> None:
        """Finish what is being served, then stop; pods and the conflist stay."""
        self._verdict = NOT_READY
        if self._server is not None:
            self._server.stop()
            self._server = None

    def _health(self) -> CniError | None:
        verdict = self._verdict
        return None if verdict is None else CniError(*verdict)

    def report(self) -> dict[str, Any]:
        """Return what `crossedge status` says of it."""
        server, verdict = self._server, self._verdict
        problems = [] if not self._problem else [{"what": self._problem, "fix": "mend it and restart meshd"}]
        return {
            "socket": str(self._paths.socket) if server is not None else None,
            "status": 0 if verdict is None else verdict[0],
            "served": dict(sorted(server.served.items())) if server is not None else {},
            "problems": problems,
        }
