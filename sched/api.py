"""The HTTP API: reports in, everything that is known out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, Final, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from crossedge.latency.feed import NeedsFull
from crossedge.latency.report import CONTENT_TYPE as REPORT_TYPE
from crossedge.latency.report import PATH as REPORTS
from crossedge.sched import apimodels as answers
from crossedge.sched import metrics, reads
from crossedge.sched.buckets import Buckets
from crossedge.sched.door import ApiError, Door
from crossedge.sched.pagefiles import page_files
from crossedge.sched.routes_extender import extender_routes
from crossedge.sched.routes_services import service_routes
from crossedge.sched.service import SchedulerService
from crossedge.sched.trust import is_bearer
from crossedge.wire.errors import IdentityError, WireError

REPORT_TYPES: Final = (REPORT_TYPE, "application/octet-stream")
TITLE: Final = "crossedge scheduler"
ROUND_MAX: Final = 2**62
STATUSES: Final = {"clock-skew": 422, "too-many-nodes": 503}
"""HTTP status of a report that is refused for a reason, where it is not 400."""

Order = Literal["group", "name"]
PageSize = Annotated[int, Query(ge=1, le=1000)]
Before = Annotated[int | None, Query(ge=0, le=ROUND_MAX)]


def fault(status: int, text: str) -> dict[int | str, dict[str, Any]]:
    """Return the description of one kind of refusal."""
    return {status: {"model": answers.Fault, "description": text}}


INVALID = fault(422, "A parameter or a field cannot be used")


class Cache:
    """The last answers that are expensive to write, each with the tag it was written for."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, bytes]] = {}

    async def get(self, key: str, tag: str, write: Callable[[], bytes]) -> bytes:
        """Return the answer, written in a thread where the one that is held is of another tag."""
        held = self._held.get(key)
        if held is not None and held[0] == tag:
            return held[1]
        content = await asyncio.to_thread(write)
        self._held[key] = (tag, content)
        return content


def dumped(value: object) -> bytes:
    """Return JSON; a number that is none would be an error, not `NaN`."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def create_app(service: SchedulerService, lifespan: bool = True) -> FastAPI:
    """Return the application; with `lifespan` it starts and stops the service."""

    @asynccontextmanager
    async def life(_: FastAPI) -> Any:
        service.start()
        yield
        await service.stop()

    def may_read(request: Request) -> None:
        if service.config.reads == "token":
            check_token(service, request)

    app = FastAPI(
        title=TITLE,
        version=version("crossedge"),
        description="Latency between the nodes of a mesh, their groups, and where services go.",
        docs_url=None,  # these pages would fetch their parts from elsewhere
        redoc_url=None,
        lifespan=life if lifespan else None,
    )
    app.add_middleware(Door, names=service.config.hosts, counters=service.scheduler.counters)
    add_faults(app)
    guard = [Depends(may_read)]
    report_route(app, service)
    plain_routes(app, service, guard)
    view_routes(app, service, guard)
    history_routes(app, service, guard)
    app.include_router(service_routes(service, guard))
    app.include_router(extender_routes(service, guard))
    describe_extender(app)
    page_routes(app)
    return app


def check_token(service: SchedulerService, request: Request) -> None:
    """Check that a request carries the token; 401 otherwise, 403 where there is none to carry."""
    if service.token is None:
        raise ApiError(403, "writes-off", "no token_file is configured, so nothing can be written")
    if not is_bearer(request.headers.get("authorization"), service.token):
        raise ApiError(401, "unauthenticated", "Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})


def add_faults(app: FastAPI) -> None:
    """Let every refusal have one form."""

    async def refused(_: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            raise error
        if isinstance(error, ApiError):
            content = {"error": error.error, "detail": error.detail}
        elif error.status_code == 400:  # FastAPI's own, for a body that it cannot parse
            content = {"error": "malformed", "detail": "the body is not JSON in UTF-8"}
        else:
            content = {"error": error.detail.lower().replace(" ", "-"), "detail": error.detail}
        return JSONResponse(content, error.status_code, headers=dict(error.headers or {}))

    async def invalid(_: Request, error: Exception) -> Response:
        if not isinstance(error, RequestValidationError):
            raise error
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return JSONResponse({"error": "invalid", "detail": f"{where}: {first['msg']}"[:500]}, 422)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)


def report_route(app: FastAPI, service: SchedulerService) -> None:
    """Take reports. The signature is their authentication."""
    scheduler, counters = service.scheduler, service.scheduler.counters
    limits = service.config.limits
    buckets = Buckets(limits.reports_per_second, limits.reports_burst)

    async def take_report(request: Request) -> Response:
        """Take a node's signed report: verified against the network's authority, applied whole or not."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() not in REPORT_TYPES:
            counters.add("reports_total", "content-type")
            raise ApiError(415, "content-type", f"expected {REPORT_TYPE}")
        source = request.client.host if request.client is not None else ""
        wait = buckets.take(source, service.clock.now())
        if wait > 0:
            counters.add("reports_total", "too-many")
            raise ApiError(429, "too-many", "too many reports from here", {"Retry-After": str(int(wait) + 1)})
        body = await request.body()
        known = len(scheduler.nodes)
        try:
            outcome = scheduler.report(body, service.clock.now(), service.clock.unix())
        except WireError as error:
            counters.add("reports_total", error.reason)
            status = 403 if isinstance(error, IdentityError) else STATUSES.get(error.reason, 400)
            headers = {"Retry-After": "60"} if status == 503 else None
            raise ApiError(status, error.reason, error.detail or error.reason, headers) from None
        if isinstance(outcome, NeedsFull):
            counters.add("reports_total", f"needs-full-{outcome.reason}")
            return JSONResponse({"error": "needs-full", "reason": outcome.reason, "seq": outcome.seq}, 409)
        counters.add("reports_total", "duplicate" if outcome.duplicate else "applied")
        if len(scheduler.nodes) > known:
            service.wake()
        medoids = scheduler.medoids_for(outcome)
        return Response(status_code=204) if medoids is None else JSONResponse({"medoids": medoids})

    schema = {"schema": {"type": "string", "format": "binary"}}
    body = {"content": dict.fromkeys(REPORT_TYPES, schema), "required": True}
    app.add_api_route(
        REPORTS,
        take_report,
        methods=["POST"],
        status_code=204,
        tags=["reports"],
        openapi_extra={"requestBody": body},
        responses={
            200: {
                "model": answers.ReportTaken,
                "description": "Taken; the sender is asked to measure these, too, no longer those before",
            },
            204: {"description": "Taken"},
            409: {"model": answers.NeedsFullAnswer, "description": "Its base is not here, or it is old"},
            **fault(400, "Malformed or absurd"),
            **fault(403, "Not signed by a node of this network, expired or revoked"),
            **fault(413, "Too long"),
            **fault(415, "Another content type"),
            **fault(422, "A clock that is off"),
            **fault(429, "Too many from one address"),
            **fault(503, "Too many nodes"),
        },
    )


def plain_routes(app: FastAPI, service: SchedulerService, guard: list[Any]) -> None:
    """Health, readiness, metrics and status."""

    @app.get("/healthz", tags=["health"], responses={200: {"model": answers.Healthy}})
    async def healthz() -> Response:
        """Say that the process answers."""
        return JSONResponse({"ok": True})

    # Not in the description: 503 is what a probe expects of it, and what nobody should expect of all else.
    @app.get("/readyz", include_in_schema=False)
    async def readyz() -> Response:
        """Say whether there is a matrix to decide by."""
        why = reads.ready(service.scheduler, service.clock.now())
        return JSONResponse({"ready": not why, "detail": why or "ready"}, 503 if why else 200)

    text: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text"}
    }

    @app.get("/metrics", tags=["health"], response_class=Response, responses=text, dependencies=guard)
    async def metrics_page() -> Response:
        """Return the metrics."""
        now, unix = service.clock.now(), service.clock.unix()
        size = await service.past(lambda: service.history.size)
        gauges = reads.gauges(service.scheduler, now, unix, service.last_seconds, size)
        return Response(metrics.rendered(service.scheduler.counters, gauges), media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/status", tags=["reading"], responses={200: {"model": answers.Status}}, dependencies=guard)
    async def status() -> Response:
        """Say how the scheduler is, and what is wrong."""
        shown = reads.status(service.scheduler, service.clock.now(), service.clock.unix())
        files = [f"{name}: {text}" for name, text in service.blocklists.problems.items()]
        shown["problems"] = [*shown["problems"], *service.problems.values(), *files]
        writes = "off" if service.token is None else "token"
        return JSONResponse(
            {"version": app.version, **shown, "writes": writes, "reads": service.config.reads}
        )


def view_routes(app: FastAPI, service: SchedulerService, guard: list[Any]) -> None:
    """Nodes, groups, matrix and map; with entity tags, because they are large and change seldom."""
    cache = Cache()
    scheduler = service.scheduler

    async def answer(
        request: Request, key: str, number: int, media: str, write: Callable[[], bytes]
    ) -> Response:
        tag = f'W/"{service.boot}-{number}"'
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(await cache.get(key, tag, write), media_type=media, headers=headers)

    not_modified: dict[int | str, dict[str, Any]] = {304: {"description": "As it was"}}

    @app.get("/v1/nodes", tags=["reading"], responses={200: {"model": answers.Nodes}}, dependencies=guard)
    async def nodes() -> Response:
        """Return every node with the age of its report."""
        shown = reads.nodes(scheduler, service.clock.now(), service.clock.unix())
        return Response(await asyncio.to_thread(dumped, shown), media_type="application/json")

    @app.get(
        "/v1/groups",
        tags=["reading"],
        responses={200: {"model": answers.Groups}, **not_modified},
        dependencies=guard,
    )
    async def groups(request: Request) -> Response:
        """Return the groups of the last round."""
        view, outcome = scheduler.view, scheduler.outcome
        return await answer(
            request, "groups", view.round, "application/json", lambda: dumped(reads.groups(outcome, view))
        )

    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

    @app.get(
        "/v1/matrix",
        tags=["reading"],
        responses={
            200: {"model": answers.Matrix, "content": binary},
            **not_modified,
            **fault(400, "Too large"),
            **INVALID,
        },
        dependencies=guard,
    )
    async def matrix(
        request: Request, order: Order = "group", format: Literal["json", "binary"] = "json"
    ) -> Response:  # the name of the parameter
        """Return the matrix; as JSON up to 300 nodes, as compact bytes always."""
        view = scheduler.view
        if format == "binary":
            return await answer(
                request,
                f"matrix-{order}",
                view.round,
                "application/octet-stream",
                lambda: reads.matrix_bytes(view, order),
            )
        if len(view.names) > reads.JSON_NODES:
            detail = (
                f"{len(view.names)} nodes; JSON is given for {reads.JSON_NODES} at most, take format=binary"
            )
            raise ApiError(400, "too-large", detail)
        return await answer(
            request,
            f"json-{order}",
            view.round,
            "application/json",
            lambda: dumped(reads.matrix(view, order)),
        )

    @app.get(
        "/v1/map",
        tags=["reading"],
        responses={200: {"model": answers.Map}, **not_modified, **INVALID},
        dependencies=guard,
    )
    async def map_route(request: Request, links: bool = True) -> Response:
        """Return the nodes in the plane, near where latency is low, and the measured pairs."""
        now = service.clock.now()
        return await answer(
            request,
            f"map-{links}",
            scheduler.view.round,
            "application/json",
            lambda: dumped(reads.map_of(scheduler, now, links)),
        )


def history_routes(app: FastAPI, service: SchedulerService, guard: list[Any]) -> None:
    """Return what was."""
    history = service.history

    @app.get(
        "/v1/history",
        tags=["history"],
        responses={200: {"model": answers.Rounds}, **INVALID},
        dependencies=guard,
    )
    async def rounds(limit: PageSize = 100, before: Before = None) -> Response:
        """Return the figures of rounds, newest first."""
        return JSONResponse({"rounds": await service.past(history.rounds, limit, before)})

    missing = fault(404, "No such round, or not any more")

    @app.get(
        "/v1/history/{number}",
        tags=["history"],
        responses={200: {"model": answers.RoundDetail}, **missing, **INVALID},
        dependencies=guard,
    )
    async def one_round(number: int) -> Response:
        """Return one round with every node's group and the age of its report."""
        found = await service.past(history.round, number) if 0 <= number <= ROUND_MAX else None
        if found is None:
            raise ApiError(404, "unknown-round", f"no round {number} is kept")
        return JSONResponse(found)

    @app.get(
        "/v1/decisions",
        tags=["history"],
        responses={200: {"model": answers.PastDecisions}, **INVALID},
        dependencies=guard,
    )
    async def decisions(
        limit: PageSize = 100,
        before: Before = None,
        service_name: Annotated[str | None, Query(alias="service", max_length=63)] = None,
    ) -> Response:
        """Return the decisions that changed something, newest first."""
        return JSONResponse({"decisions": await service.past(history.decisions, limit, service_name, before)})


def describe_extender(app: FastAPI) -> None:
    """Add the model of a body that is parsed by hand to the description."""
    original = app.openapi

    def described() -> dict[str, Any]:
        schema = original()
        model = answers.ExtenderArgs.model_json_schema(ref_template="#/components/schemas/{model}")
        schema["components"]["schemas"].setdefault("ExtenderArgs", model)
        return schema

    app.openapi = described  # type: ignore[method-assign]  # the way FastAPI documents


def page_routes(app: FastAPI) -> None:
    """Serve the page."""
    files = page_files()

    def served(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise ApiError(404, "not-found", "there is no such file")
        headers = {"ETag": file.tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == file.tag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return served(request, "index.html")

    @app.get("/static/{name:path}", include_in_schema=False)
    async def static(request: Request, name: str) -> Response:
        return served(request, name)
