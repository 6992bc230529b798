"""The API held against its own description: whatever is sent, no answer is a fault of the server's."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.python import asgi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from crossedge.sched.api import create_app
from crossedge.sched.service import SchedulerService
from crossedge.sched.services import ServiceSpec
from tests.sched_fleet import BEARER, Fleet, VirtualClock, make_service, two_regions

EXAMPLES = 8  # of each kind per operation, beside those that schemathesis derives from boundaries
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


async def begin(service: SchedulerService) -> None:
    """Give a scheduler something to say."""
    fleet = Fleet(two_regions())
    fleet.rtt[0, 5] = fleet.rtt[5, 0] = np.inf
    fleet.report_all(service)
    await service.round()
    await service.put_service("0", ServiceSpec(replicas=2))


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_finds_a_fault_of_the_server(tmp_path: Path, mode: GenerationMode) -> None:
    service = make_service(tmp_path, VirtualClock(), limits={"services": 10_000}, hosts=(asgi.HOST,))
    asyncio.run(begin(service))
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service, lifespan=False))
    tried: Counter[str] = Counter()

    def try_case(case: Any) -> None:
        tried[case.operation.label] += 1
        case.call_and_validate(headers=BEARER, checks=CHECKS)

    limited = settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    operations = [result.ok() for result in schema.get_all_operations()]
    for operation in operations:
        with suppress(Unsatisfiable):  # nothing about it can be wrong
            seed(1)(limited(given(case=operation.as_strategy(generation_mode=mode))(try_case)))()
    asyncio.run(service.stop())
    assert len(operations) >= 19
    if mode is GenerationMode.POSITIVE:
        assert len(tried) == len(operations)
    assert tried["PUT /v1/services/{name}"] >= EXAMPLES
