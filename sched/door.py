"""What every request passes first: is it for us, is it small enough; and what every answer carries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from crossedge.latency.report import MAX_REPORT
from crossedge.latency.report import PATH as REPORTS
from crossedge.sched.metrics import Counters
from crossedge.sched.pagefiles import POLICY
from crossedge.sched.trust import is_own_name

BODY_MAX: Final = 4 * 1024 * 1024
EXTENDER_BODY_MAX: Final = 64 * 1024 * 1024
"""Nodes as whole objects, should kube-scheduler send those, have about 10 kB each."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class ApiError(HTTPException):
    """A request that is refused: status, short name, sentence."""

    def __init__(self, status: int, error: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.error = error


def body_limit(path: str) -> int:
    """Return how many bytes a request may bring to a path."""
    if path == REPORTS:
        return MAX_REPORT
    return EXTENDER_BODY_MAX if path.startswith("/extender/") else BODY_MAX


class Door:
    """The outermost layer of the application."""

    def __init__(self, app: App, names: tuple[str, ...], counters: Counters) -> None:
        """Stand before `app`; `names` are those beside localhost under which we may be called."""
        self._app = app
        self._names = frozenset(name.lower() for name in names)
        self._counters = counters

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = body_limit(scope["path"])
        length = headers.get("content-length", "0")
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise ApiError(413, "too-long", f"more than {limit} bytes")
            return message

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counters.add("requests_total", str(message["status"]))
                answer = MutableHeaders(scope=message)
                answer.setdefault("Cache-Control", "no-store")
                answer["X-Content-Type-Options"] = "nosniff"
                answer["Referrer-Policy"] = "no-referrer"
                answer["Cross-Origin-Resource-Policy"] = "same-origin"
                answer["Content-Security-Policy"] = POLICY
            await send(message)

        if not is_own_name(headers.get("host", ""), self._names):
            detail = (
                "this server is called by an IP address, localhost, or a name in `hosts` of its configuration"
            )
            refusal = JSONResponse({"error": "misdirected", "detail": detail}, 421)
            await refusal(scope, receive, dressed)
        elif not length.isascii() or not length.isdigit() or int(length) > limit:
            refusal = JSONResponse(
                {"error": "too-long", "detail": f"{length[:20]} bytes, {limit} allowed"}, 413
            )
            await refusal(scope, receive, dressed)
        else:
            await self._app(scope, bounded, dressed)
