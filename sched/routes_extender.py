"""kube-scheduler's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from crossedge.sched import apimodels as answers
from crossedge.sched import extender
from crossedge.sched.door import ApiError
from crossedge.sched.service import SchedulerService

BODY = {
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ExtenderArgs"}}},
    "required": True,
}


def extender_routes(service: SchedulerService, guard: list[Any]) -> APIRouter:
    """Return filter and prioritize; `guard` stands before them."""
    router = APIRouter(prefix="/extender", tags=["kube-scheduler"], dependencies=guard)
    scheduler = service.scheduler
    refused: dict[int | str, dict[str, Any]] = {
        400: {"model": answers.Fault, "description": "No ExtenderArgs, or annotations that make no sense"}
    }

    def answer(call: str, body: bytes, answered: Callable[[extender.Args, extender.Demand], Any]) -> Any:
        args = extender.parsed_args(body)
        known = {node.name for node in scheduler.nodes.values()}
        services = {
            name: (held.spec, held.current if held.decision is not None else ())
            for name, held in scheduler.services.items()
        }
        result = answered(args, extender.demand_of(args, known, services, scheduler.view))
        scheduler.counters.add("extender_total", f"{call}-done")
        return result

    @router.post(
        "/filter",
        responses={200: {"model": answers.ExtenderFilterResult}, **refused},
        openapi_extra={"requestBody": BODY},
    )
    async def filter_nodes(request: Request) -> Response:
        """Say which nodes a pod may go to. Annotations that make no sense are said in `Error`."""
        body = await request.body()
        try:
            result = answer(
                "filter", body, lambda args, demand: extender.filtered(args, demand, scheduler.view)
            )
        except extender.MalformedError as error:
            scheduler.counters.add("extender_total", "filter-malformed")
            raise ApiError(400, "malformed", str(error)) from None
        except extender.ExtenderError as error:
            scheduler.counters.add("extender_total", "filter-refused")
            result = extender.refusal(f"crossedge: {error}")
        return JSONResponse(result)

    @router.post(
        "/prioritize",
        responses={200: {"model": list[answers.HostPriority]}, **refused},
        openapi_extra={"requestBody": BODY},
    )
    async def prioritize_nodes(request: Request) -> Response:
        """Score nodes from 0 to 10 by how near they are to the users of a pod."""
        body = await request.body()
        try:
            result = answer(
                "prioritize", body, lambda args, demand: extender.prioritized(args, demand, scheduler.view)
            )
        except extender.ExtenderError as error:
            scheduler.counters.add("extender_total", "prioritize-refused")
            raise ApiError(400, "malformed", str(error)) from None
        return JSONResponse(result)

    return router
