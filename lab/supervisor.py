"""The process that holds a lab: it answers `crossedge lab status` and `down` until it is told to end."""

from __future__ import annotations

import json
import os
import selectors
import socket
from contextlib import suppress
from typing import Any

from crossedge.lab.launch import SOCKET, reap
from crossedge.lab.network import Network

REQUEST_LIMIT = 4096
BACKLOG = 8
REAP_EVERY = 1.0
TIMEOUT = 5.0


class Supervisor:
    """Serves one lab; whoever asks from its construction on is answered by `serve`."""

    def __init__(self, network: Network, listener: socket.socket) -> None:
        self._network = network
        self._listener = listener
        listener.listen(BACKLOG)  # from now on `crossedge lab` finds it
        self._running = True

    def serve(self) -> None:
        """Answer until `down` is asked for or a signal raises `KeyboardInterrupt`."""
        self._listener.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while self._running:
                if selector.select(REAP_EVERY):
                    with suppress(OSError, ValueError):
                        self._answer(self._listener.accept()[0])
                reap(self._network.processes())

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(TIMEOUT)
        with connection.makefile("rb") as lines:
            line = lines.readline(REQUEST_LIMIT)
        request = json.loads(line) if line else {}
        command = request.get("command")
        with connection:
            connection.sendall(json.dumps(self._do(command)).encode() + b"\n")

    def _do(self, command: object) -> dict[str, Any]:
        if command == "down":
            self._running = False
            return {"ok": True}
        if command == "status":
            return {"ok": True, **self._network.status()}
        return {"ok": False, "error": f"a lab does not know {command!r}"}


def inherited_listener() -> socket.socket:
    """Return the socket that the launcher bound."""
    return socket.socket(fileno=int(os.environ.pop(SOCKET)))


def ask(connection: socket.socket, command: str) -> dict[str, Any]:
    """Send one request over a connection to a supervisor; return the answer, {} where it only hangs up."""
    with connection:
        connection.sendall(json.dumps({"command": command}).encode() + b"\n")
        with connection.makefile("rb") as lines:
            line = lines.readline()
    answer: dict[str, Any] = json.loads(line) if line else {}
    return answer
