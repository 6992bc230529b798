"""What meshd does for the plugin, alone: CniServer on an event loop, for tests that start and kill it.

python tests/cni_daemon.py ROOT PREFIX...
"""

import asyncio
import ipaddress
import signal
import sys
from dataclasses import replace
from pathlib import Path

from crossedge.cni.node import Paths, read_node
from crossedge.cni.serve import CniServer
from crossedge.cni.spec import CniError


async def serve(root: Path, prefixes: list[str]) -> None:
    def health() -> CniError | None:
        cut_off = root / "cut-off"
        return CniError(51, "no peer is reachable") if cut_off.exists() else None

    node = replace(read_node(Paths(root)), prefixes=tuple(map(ipaddress.ip_network, prefixes)))
    server = CniServer(Paths(root), node, health)
    loop = asyncio.get_running_loop()
    server.start(loop)
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", flush=True)
    await ended.wait()
    server.stop()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2:]))
