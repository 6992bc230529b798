"""The daemon's control socket: one JSON object per line in, one or more per line out.

A request is {"command": NAME, ...}; each answer is {"ok": true, ...} or {"ok": false, "error": TEXT}, and the
last one of a request carries "done": true. Only root and the daemon's own user and group get in.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

Handler = Callable[[Mapping[str, Any]], AsyncIterator[Mapping[str, Any]]]
"""Takes the request, yields its answers; a ValueError becomes the error that the asker reads."""

REQUEST_LIMIT = 64 * 1024
CONNECTION_LIMIT = 32
REQUEST_TIMEOUT = 10.0

log = logging.getLogger(__name__)


class ControlServer:
    """Serves the control socket; holds no rules of its own."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self._handlers = dict(handlers)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._path: Path | None = None

    async def start(self, path: Path) -> None:
        """Listen at a path, replacing what an earlier life left there; a missing directory is made."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            fresh.unlink(missing_ok=True)
            listener.bind(str(fresh))
            fresh.chmod(0o660)
            listener.listen(CONNECTION_LIMIT)
            fresh.rename(path)
        except OSError:
            listener.close()
            raise
        listener.setblocking(False)
        self._path = path
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=REQUEST_LIMIT)

    async def stop(self) -> None:
        """Close the socket and end what is being answered."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._tasks) >= CONNECTION_LIMIT or not self._permitted(writer):
            writer.close()
            return
        self._tasks.add(task)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                line = await reader.readline()
            async for answer in self._answers(line):
                writer.write(json.dumps(answer, default=str).encode() + b"\n")
                await writer.drain()
        except (TimeoutError, ValueError, ConnectionError, asyncio.CancelledError):
            pass  # The asker went away, sent no line in time, or a longer one than may be.
        finally:
            self._tasks.discard(task)
            with suppress(OSError):
                writer.close()

    @staticmethod
    def _permitted(writer: asyncio.StreamWriter) -> bool:
        sock = writer.get_extra_info("socket")
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, gid = struct.unpack("3i", credentials)
        return uid in (0, os.geteuid()) or gid == os.getegid()

    async def _answers(self, line: bytes) -> AsyncIterator[Mapping[str, Any]]:
        try:
            request = json.loads(line)
            handler = self._handlers[request["command"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = ", ".join(sorted(self._handlers))
            yield {
                "ok": False,
                "error": f"a request is a JSON object whose command is one of {known}",
                "done": True,
            }
            return
        try:
            async for answer in handler(request):
                yield {"ok": True, **answer}
            yield {"ok": True, "done": True}
        except ValueError as error:
            yield {"ok": False, "error": str(error), "done": True}
        except Exception:  # a fault in one answer must not end the daemon
            log.exception("control request %r failed", request.get("command"))
            yield {"ok": False, "error": "the daemon failed to answer; its log says why", "done": True}
