"""Services over HTTP: stored with the token, read and tried freely."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from crossedge.sched import apimodels as answers
from crossedge.sched.door import ApiError
from crossedge.sched.placement import PlacementError
from crossedge.sched.service import BusyError, SchedulerService
from crossedge.sched.services import ServiceError, ServiceSpec
from crossedge.sched.trust import is_bearer
from crossedge.wire.identity import NAME_PATTERN

ServiceName = Annotated[str, Path(pattern=NAME_PATTERN, description="1 to 63 of a-z, 0-9, - and .")]
CONFLICTS = frozenset({"no-matrix-yet"})


class DryRunRequest(ServiceSpec):
    """A service to try."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    """What it would be called."""
    listed: int = Field(default=10, ge=0, le=200)
    """Candidates to account for beside the chosen."""
    baselines: bool = True
    """Whether to compare with random, spread-evenly, one-per-group and greedy placements."""


def fault(status: int, text: str) -> dict[int | str, dict[str, Any]]:
    """Return the description of one kind of refusal."""
    return {status: {"model": answers.Fault, "description": text}}


def service_routes(service: SchedulerService, guard: list[Any]) -> APIRouter:
    """Return the routes of services and dry runs; `guard` stands before those that read."""
    router = APIRouter(tags=["services"])
    scheduler = service.scheduler

    def may_write(request: Request) -> None:
        if service.token is None:
            raise ApiError(403, "writes-off", "no token_file is configured, so nothing can be written")
        if not is_bearer(request.headers.get("authorization"), service.token):
            raise ApiError(
                401, "unauthenticated", "Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    def found(name: str) -> Any:
        held = scheduler.services.get(name)
        if held is None:
            raise ApiError(404, "unknown-service", f"no service is called {name!r}")
        return held

    writing = [Depends(may_write)]
    denied = {**fault(401, "No token, or a wrong one"), **fault(403, "No token is configured")}
    missing = fault(404, "There is no such service, or no decision yet")
    invalid = fault(422, "A field cannot be used, a node is unknown, or it does not fit")

    @router.get("/v1/services", responses={200: {"model": answers.Services}}, dependencies=guard)
    async def services() -> Response:
        """Return all services."""
        listed = [held.as_json() for _, held in sorted(scheduler.services.items())]
        return JSONResponse({"services": listed})

    @router.get(
        "/v1/services/{name}",
        responses={200: {"model": answers.ServiceAnswer}, **missing, **invalid},
        dependencies=guard,
    )
    async def one_service(name: ServiceName) -> Response:
        """Return one service."""
        return JSONResponse(found(name).as_json())

    @router.get(
        "/v1/services/{name}/decision",
        responses={200: {"model": answers.DecisionAnswer}, **missing, **invalid},
        dependencies=guard,
    )
    async def decision(name: ServiceName) -> Response:
        """Return where a service is to be, and why."""
        held = found(name)
        if held.decision is None:
            raise ApiError(404, "no-decision-yet", f"{name} is decided in the next round")
        return JSONResponse(held.decision)

    created: dict[int | str, dict[str, Any]] = {201: {"model": answers.ServiceAnswer, "description": "New"}}
    full = {**fault(409, "Too many services"), **fault(503, "It could not be written")}

    @router.put(
        "/v1/services/{name}",
        responses={200: {"model": answers.ServiceAnswer}, **created, **denied, **full, **invalid},
        dependencies=writing,
    )
    async def put_service(name: ServiceName, spec: ServiceSpec) -> Response:
        """Store a service. A new one is placed at once; one that changed is decided in the next round."""
        try:
            held, fresh = await service.put_service(name, spec)
        except ServiceError as error:
            status = 409 if error.reason == "too-many-services" else 422
            raise ApiError(status, error.reason, str(error)) from None
        except OSError as error:
            raise ApiError(503, "not-stored", str(error)) from None
        return JSONResponse(held.as_json(), 201 if fresh else 200)

    @router.delete(
        "/v1/services/{name}",
        status_code=204,
        responses={**denied, **missing, **invalid, **fault(503, "It could not be written")},
        dependencies=writing,
    )
    async def drop_service(name: ServiceName) -> Response:
        """Forget a service. Its past decisions stay in the history."""
        try:
            if not await service.drop_service(name):
                raise ApiError(404, "unknown-service", f"no service is called {name!r}")
        except OSError as error:
            raise ApiError(503, "not-stored", str(error)) from None
        return Response(status_code=204)

    waiting = {**fault(409, "No round has ended yet"), **fault(429, "Too many dry runs at once")}

    @router.post(
        "/v1/placements",
        responses={200: {"model": answers.DryRun}, **waiting, **invalid},
        dependencies=guard,
    )
    async def placements(request: DryRunRequest) -> Response:
        """Say where a service would go, and why; nothing is stored."""
        counters = scheduler.counters
        try:
            result = await service.dry_run(request, request.listed, request.baselines)
        except BusyError:
            counters.add("placements_total", "busy")
            raise ApiError(429, "busy", "too many dry runs at once", {"Retry-After": "2"}) from None
        except ServiceError as error:
            counters.add("placements_total", error.reason)
            raise ApiError(409 if error.reason in CONFLICTS else 422, error.reason, str(error)) from None
        except PlacementError as error:
            counters.add("placements_total", "infeasible")
            raise ApiError(422, "infeasible", str(error)) from None
        counters.add("placements_total", "done")
        return JSONResponse({"service": request.name, **result})

    return router
