"""The server's control socket: one JSON object per line in, one out; and its client for `status`.

A request is {"command": "status"}; the answer is {"ok": true, ...} or {"ok": false, "error": TEXT}. The
socket is 0600: root and the server's own user.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

REQUEST_LIMIT = 4096
CONNECTION_LIMIT = 8
REQUEST_TIMEOUT = 5.0

Handler = Callable[[], Mapping[str, Any]]


class ControlSocket:
    """Answers commands on a Unix socket."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)
        self._server: asyncio.Server | None = None
        self._path: Path | None = None
        self._connections = 0

    async def start(self, path: Path) -> None:
        """Listen at a path, in place of what an earlier life left there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            fresh.unlink(missing_ok=True)
            old = os.umask(0o177)
            try:
                listener.bind(str(fresh))
            finally:
                os.umask(old)
            listener.listen(CONNECTION_LIMIT)
            fresh.rename(path)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        self._path = path
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=REQUEST_LIMIT)

    async def stop(self) -> None:
        """Close the socket and remove it."""
        if self._server is not None:
            self._server.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= CONNECTION_LIMIT:
            writer.close()
            return
        self._connections += 1
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                line = await reader.readline()
                writer.write(json.dumps(self._answer(line)).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ValueError, ConnectionError):
            pass  # The asker went away, sent no line in time, or a longer one than may be.
        finally:
            self._connections -= 1
            with suppress(OSError):
                writer.close()

    def _answer(self, line: bytes) -> Mapping[str, Any]:
        try:
            handler = self._handlers[json.loads(line)["command"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = ", ".join(sorted(self._handlers))
            return {"ok": False, "error": f"a request is a JSON object whose command is one of {known}"}
        return {"ok": True, **handler()}


def ask(path: Path, command: str) -> dict[str, Any]:
    """Return the running server's answer to a command.

    Raises:
        OSError: no server listens there, or it does not answer.
        ValueError: what answers is not our server, or it refuses.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(REQUEST_TIMEOUT)
        connection.connect(str(path))
        connection.sendall(json.dumps({"command": command}).encode() + b"\n")
        with connection.makefile("rb") as stream:
            answer = json.loads(stream.readline())
    if not isinstance(answer, dict) or not answer.get("ok"):
        raise ValueError(answer.get("error", "no answer") if isinstance(answer, dict) else "no answer")
    return answer
