"""A real rendezvous process on loopback, for the fleet, the flood and the benchmark of both."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from crossedge.wire.bundle import RendezvousAddress
from crossedge.wire.endpoint import UdpEndpoint

COMMAND = str(Path(sys.executable).parent / "crossedge-rendezvous")
PATIENCE = 30.0


class RendezvousProcess:
    """A server under a root directory of its own, on 127.0.0.1 and all other addresses."""

    def __init__(self, root: Path, ca_public: bytes, *lines: str) -> None:
        """Make its key and configuration, `lines` first, and start it."""
        self.root = str(root)
        key = base64.b64encode(ca_public).decode()
        made = self._run("init", "--root", self.root, "--network", key)
        self.public_key = RendezvousAddress.parse(made.strip()).public_key
        file = root / "etc/crossedge/rendezvous.toml"
        file.write_text("\n".join([*lines, file.read_text()]))
        self.process = subprocess.Popen(
            [COMMAND, "run", "--root", self.root], stderr=subprocess.PIPE, text=True, bufsize=1
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if "listening on" in line:
                break

    def status(self) -> dict[str, Any]:
        """Return what `crossedge-rendezvous status` shows."""
        answer: dict[str, Any] = json.loads(self._run("status", "--json", "--root", self.root))
        return answer

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.communicate(timeout=PATIENCE)

    @staticmethod
    def _run(*arguments: str) -> str:
        return subprocess.run(
            [COMMAND, *arguments], capture_output=True, text=True, check=True, timeout=PATIENCE
        ).stdout


def lost_in_kernel(server: UdpEndpoint) -> int:
    """Return how many datagrams the kernel dropped because the buffer of a server's socket was full."""
    lines = Path("/proc/net/udp").read_text().splitlines()[1:]
    return sum(int(line.split()[-1]) for line in lines if line.split()[1].endswith(f":{server.port:04X}"))
