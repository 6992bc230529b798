"""kube-scheduler's extender: the exact JSON of version 1, and what pods' annotations do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio

from crossedge.sched.service import SchedulerService
from tests.sched_fleet import BEARER, Fleet, VirtualClock, client_of, make_service, two_regions

pytestmark = pytest.mark.asyncio
NAMES = [f"n{i}" for i in range(8)]
Pair = tuple[httpx.AsyncClient, SchedulerService]


def pod(**annotations: Any) -> dict[str, Any]:
    keys = {f"crossedge.io/{key.replace('_', '-')}": value for key, value in annotations.items()}
    return {
        "metadata": {"name": "web-1", "namespace": "shop", "annotations": keys},
        "spec": {"containers": []},
    }


@pytest_asyncio.fixture
async def scheduler(tmp_path: Path) -> AsyncIterator[Pair]:
    service = make_service(tmp_path, VirtualClock())
    fleet = Fleet(two_regions())
    fleet.rtt[6, :6] = fleet.rtt[:6, 6] = np.inf
    fleet.report_all(service)
    await service.round()
    async with client_of(service) as client:
        yield client, service
    await service.stop()


async def call(scheduler: Pair, verb: str, expect: int = 200, **args: Any) -> Any:
    response = await scheduler[0].post(f"/extender/{verb}", json=args)
    assert response.status_code == expect, response.text
    return response.json()


async def test_filter_answers_names_with_names_and_says_why_others_failed(scheduler: Pair) -> None:
    answer = await call(
        scheduler,
        "filter",
        Pod=pod(users="n0=3,n1", max_rtt_ms="20"),
        NodeNames=["n0", "n2", "n5", "n6", "other"],
    )
    assert answer == {
        "Nodes": None,
        "NodeNames": ["n0", "n2"],
        "FailedNodes": {"n6": "crossedge: too little data: no RTT to any user is known"},
        "FailedAndUnresolvableNodes": {
            "n5": "crossedge: mean user RTT 40.6 ms, above 20 ms",
            "other": "crossedge: it is no node of the mesh, or never reported",
        },
        "Error": "",
    }


async def test_filter_answers_objects_with_objects(scheduler: Pair) -> None:
    items = [{"metadata": {"name": name, "labels": {"a": "b"}}, "status": {}} for name in ("n0", "n5")]
    nodes = {"metadata": {}, "items": items}
    answer = await call(
        scheduler, "filter", Pod=pod(users="n0", max_rtt_ms="20"), Nodes=nodes, NodeNames=None
    )
    assert answer["Nodes"] == {"metadata": {}, "items": items[:1]}
    assert answer["NodeNames"] is None
    assert list(answer["FailedAndUnresolvableNodes"]) == ["n5"]
    scores = await call(scheduler, "prioritize", Pod=pod(users="n0"), Nodes=nodes)
    assert [item["Host"] for item in scores] == ["n0", "n5"]


async def test_prioritize_scores_near_nodes_high(scheduler: Pair) -> None:
    scores = await call(scheduler, "prioritize", Pod=pod(users="n5=2,n4=1"), NodeNames=[*NAMES, "other"])
    assert [set(item) for item in scores] == [{"Host", "Score"}] * 9
    by_name = {item["Host"]: item["Score"] for item in scores}
    assert all(type(score) is int and 0 <= score <= 10 for score in by_name.values())
    assert by_name["n5"] == 10
    assert min(by_name["n4"], by_name["n7"]) > 5
    assert max(by_name["n0"], by_name["n1"]) <= 2
    assert by_name["other"] == 0


async def test_pods_that_say_nothing_are_none_of_our_business(scheduler: Pair) -> None:
    for silent in (pod(), {}, {"metadata": {"annotations": None}}):
        answer = await call(scheduler, "filter", Pod=silent, NodeNames=["n0", "other"])
        assert answer["NodeNames"] == ["n0", "other"]
        assert answer["FailedNodes"] == answer["FailedAndUnresolvableNodes"] == {}
        scores = await call(scheduler, "prioritize", Pod=silent, NodeNames=["n0", "other"])
        assert {item["Score"] for item in scores} == {0}


async def test_a_service_sends_its_pods_where_it_was_decided_to_be(scheduler: Pair) -> None:
    client, service = scheduler
    spec = {"replicas": 2, "users": {"n0": 1, "n5": 1}}
    assert (await client.put("/v1/services/shop", json=spec, headers=BEARER)).status_code == 201
    scores = await call(scheduler, "prioritize", Pod=pod(service="shop"), NodeNames=NAMES)
    assert {item["Host"] for item in scores if item["Score"] == 10} == {"n0", "n5"}
    assert service.scheduler.services["shop"].current == ("n0", "n5")


@pytest.mark.parametrize(
    ("annotations", "says"),
    [
        ({"users": "nowhere=1"}, "no node is called 'nowhere'"),
        ({"users": "n0=lots"}, "'lots' is no weight for n0"),
        ({"users": "n0=-1"}, "'-1' is no weight for n0"),
        ({"users": "n0=nan"}, "'nan' is no weight for n0"),
        ({"users": ""}, "expected node=weight"),
        ({"users": "n0=0"}, "nobody uses it"),
        ({"users": "n0,n0"}, "n0 stands twice"),
        ({"service": "shop"}, "no service is called 'shop'"),
        ({"max_rtt_ms": "20"}, "without crossedge.io/users"),
        ({"users": "n0", "max_rtt_ms": "soon"}, "expected milliseconds"),
    ],
)
async def test_annotations_that_make_no_sense_are_said(
    scheduler: Pair, annotations: dict[str, str], says: str
) -> None:
    answer = await call(scheduler, "filter", Pod=pod(**annotations), NodeNames=["n0"])
    assert says in answer["Error"]
    assert answer["NodeNames"] is None
    refused = await call(scheduler, "prioritize", 400, Pod=pod(**annotations), NodeNames=["n0"])
    assert says in refused["detail"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b'{"Pod":', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[]", "the body is not an object"),
        (b"{}", "Pod is not an object"),
        (b'{"Pod": {}}', "Nodes (or NodeNames) is not an object"),
        (b'{"Pod": {"metadata": []}, "NodeNames": []}', "NodeNames"),
        (b'{"Pod": {"metadata": 7}, "NodeNames": []}', "Pod.metadata is not an object"),
        (b'{"Pod": {}, "NodeNames": [1]}', "NodeNames is not a list of text"),
        (b'{"Pod": {}, "Nodes": {"items": [{}]}}', "Nodes.items[0].metadata is not an object"),
        (
            b'{"Pod": {"metadata": {"annotations": {"crossedge.io/users": 5}}}, "NodeNames": []}',
            "is not text",
        ),
    ],
)
async def test_a_body_that_is_no_request_is_refused(scheduler: Pair, body: bytes, says: str) -> None:
    for verb in ("filter", "prioritize"):
        response = await scheduler[0].post(f"/extender/{verb}", content=body)
        if says == "NodeNames":  # an empty list where an object should be is as good as nothing
            assert response.status_code == 200
            continue
        assert (response.status_code, response.json()["error"]) == (400, "malformed")
        assert says in response.json()["detail"]
