"""The scheduler over HTTP: what goes in, what comes out, who may, and what is refused with which reason."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from pydantic import BaseModel

from crossedge.latency.report import MAX_REPORT
from crossedge.sched import apimodels
from crossedge.sched.service import SchedulerService
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.identity import SIGNATURE, SigningKey
from tests.sched_fleet import (
    BEARER,
    CA,
    NETWORK,
    START,
    Fleet,
    FleetNode,
    VirtualClock,
    client_of,
    make_service,
    pair,
    post_report,
    two_regions,
)

pytestmark = pytest.mark.asyncio
STRANGER = SigningKey(b"\x09" * 32)


class World:
    """A scheduler with a client, and eight nodes in two regions."""

    def __init__(self, service: SchedulerService, client: httpx.AsyncClient, clock: VirtualClock) -> None:
        self.service, self.client, self.clock = service, client, clock
        self.fleet = Fleet(two_regions())

    async def round(self, seconds: float = 30.0, silent: tuple[str, ...] = ()) -> None:
        self.clock.at += seconds
        self.fleet.report_all(self.service, silent)
        await self.service.round()
        assert not self.service.problems

    async def get(self, path: str) -> Any:
        response = await self.client.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    async def put(self, name: str = "shop", expect: tuple[int, ...] = (200, 201), **spec: Any) -> Any:
        response = await self.client.put(f"/v1/services/{name}", json=spec, headers=BEARER)
        assert response.status_code in expect, response.text
        return response.json()


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    clock = VirtualClock()
    service = make_service(tmp_path, clock)
    async with client_of(service) as client:
        yield World(service, client, clock)
    await service.stop()


def snapshot_of(service: SchedulerService) -> tuple[object, ...]:
    feed = service.scheduler.feed.nodes
    return (
        sorted(service.scheduler.nodes),
        {key: (held.seq, dict(held.pairs)) for key, held in feed.items()},
    )


async def test_every_answer_is_as_the_description_says(world: World) -> None:
    checks: dict[str, type[BaseModel]] = {
        "/v1/status": apimodels.Status,
        "/v1/nodes": apimodels.Nodes,
        "/v1/groups": apimodels.Groups,
        "/v1/matrix": apimodels.Matrix,
        "/v1/matrix?order=name": apimodels.Matrix,
        "/v1/map": apimodels.Map,
        "/v1/services": apimodels.Services,
        "/v1/history": apimodels.Rounds,
        "/v1/decisions": apimodels.PastDecisions,
        "/v1/services/shop": apimodels.ServiceAnswer,
        "/v1/services/shop/decision": apimodels.DecisionAnswer,
        "/v1/history/1": apimodels.RoundDetail,
    }
    for path, model in list(checks.items())[:9]:
        model.model_validate(await world.get(path))
    world.fleet.rtt[0, 5] = world.fleet.rtt[5, 0] = np.inf
    await world.round()
    await world.put(replicas=2)
    for path, model in checks.items():
        model.model_validate(await world.get(path))
    status = await world.get("/v1/status")
    assert (status["round"], status["groups"], status["services"], status["problems"]) == (1, 2, 1, [])
    assert status["pairs"] == {"measured": 27, "unreachable": 1, "estimated": 0, "unmeasured": 0}
    assert await world.get("/readyz") == {"ready": True, "detail": "ready"}
    metrics = (await world.client.get("/metrics")).text
    assert 'crossedge_sched_nodes{state="fresh"} 8' in metrics
    assert 'crossedge_sched_reports_total{result="applied"}' not in metrics  # those came in without HTTP
    for line in metrics.splitlines():
        assert line.startswith("# ") or float(line.rpartition(" ")[2]) >= 0


async def test_an_unreachable_pair_has_no_number_anywhere(world: World) -> None:
    world.fleet.rtt[0, 5] = world.fleet.rtt[5, 0] = np.inf
    await world.round()
    matrix = await world.get("/v1/matrix?order=name")
    assert (matrix["rtt_ms"][0][5], matrix["kind"][0][5], matrix["confidence"][0][5]) == (None, 2, 0)
    assert [0, 5, None, 2] in (await world.get("/v1/map"))["links"]
    assert (await world.get("/v1/nodes"))["nodes"][0]["peers"]["unreachable"] == 1
    body = (await world.client.get("/v1/matrix?order=name&format=binary")).content
    magic, n, number, length = struct.unpack_from("<4sIII", body)
    assert (magic, n, number, (16 + length) % 8) == (b"CEM1", 8, 1, 0)
    assert json.loads(body[16 : 16 + length])["names"] == matrix["names"]
    steps = np.frombuffer(body, "<u2", n * n, 16 + length).reshape(n, n)
    assert steps[0, 5] == 65535
    assert steps[0, 1] == round(matrix["rtt_ms"][0][1] * 10)
    assert list(body[16 + length + 2 * n * n :][:6]) == [4, 1, 1, 1, 1, 2]


async def test_a_service_goes_to_its_users_and_follows_them_one_replica_per_round(world: World) -> None:
    await world.round()
    first = await world.put(replicas=2, users={"n0": 5, "n1": 5, "n2": 5})
    assert set(first["current"]) <= {"n0", "n1", "n2"}
    await world.put(replicas=2, users={"n5": 5, "n6": 5, "n7": 5})
    placed = [first["current"]]
    for _ in range(4):
        await world.round()
        placed.append((await world.get("/v1/services/shop"))["current"])
    moved = [len(set(b) - set(a)) for a, b in pairwise(placed)]
    assert moved[:2] == [1, 1] or moved[:3] == [1, 0, 0]  # the second may not be worth a move of its own
    assert max(moved) == 1
    assert set(placed[-1]) & {"n5", "n6", "n7"}
    decisions = (await world.get("/v1/decisions?service=shop"))["decisions"]
    assert decisions[-1]["reason"] == "placed for the first time"
    assert decisions[0]["moves"]


async def test_a_dry_run_says_why_and_stores_nothing(world: World) -> None:
    early = await world.client.post("/v1/placements", json={"replicas": 1})
    assert (early.status_code, early.json()["error"]) == (409, "no-matrix-yet")
    await world.round()
    response = await world.client.post("/v1/placements", json={"replicas": 2, "users": {"n0": 3, "n7": 1}})
    answer = response.json()
    apimodels.DryRun.model_validate(answer)
    assert set(answer["nodes"]) == {"n0", "n7"}
    assert answer["mean_ms"] == answer["bound_ms"] == 0
    assert set(answer["baselines"]) == {"random", "spread-evenly", "one-per-group", "greedy"}
    refused = [item for item in answer["candidates"] if not item["chosen"]]
    assert len(refused) == 6
    assert all("in place of node n" in item["verdict"] for item in refused)
    assert await world.get("/v1/services") == {"services": []}
    assert world.service.history.decisions(10, None, None) == []


@pytest.mark.parametrize(
    ("spec", "status", "error", "says"),
    [
        ({"replicas": 1, "users": {"nowhere": 1}}, 422, "unknown-node", "users: no node is called 'nowhere'"),
        ({"replicas": 1, "allowed": ["n0", "n0"]}, 422, "doubled-node", "allowed: a node stands twice"),
        ({"replicas": 1, "users": {"n0": 0}}, 422, "no-demand", "users: somebody"),
        ({"replicas": 2, "capacity": 1}, 422, "infeasible", "hold 2 of a demand of 8"),
        ({"replicas": 9}, 422, "infeasible", "9 replicas on 8 nodes"),
        ({"replicas": 0}, 422, "invalid", "body.replicas"),
        ({"replicas": 1, "users": {"n0": -1}}, 422, "invalid", "body.users"),
        ({"replicas": 1, "colour": "red"}, 422, "invalid", "body.colour"),
        ({}, 422, "invalid", "body.replicas"),
    ],
)
async def test_what_cannot_be_had_is_refused_with_the_reason(
    world: World, spec: dict[str, Any], status: int, error: str, says: str
) -> None:
    await world.round()
    for response in (
        await world.client.put("/v1/services/shop", json=spec, headers=BEARER),
        await world.client.post("/v1/placements", json=spec),
    ):
        assert (response.status_code, response.json()["error"]) == (status, error)
        assert says in response.json()["detail"]
    assert await world.get("/v1/services") == {"services": []}
    assert world.service.history.services() == []


async def test_not_a_number_is_no_demand(world: World) -> None:
    await world.round()
    for text in (
        '{"replicas": 1, "users": {"n0": NaN}}',
        '{"replicas": 1, "capacity": Infinity}',
        "{",
        "[" * 9999,
    ):
        headers = {**BEARER, "Content-Type": "application/json"}
        response = await world.client.put("/v1/services/shop", content=text, headers=headers)
        assert response.status_code in (400, 422), text[:50]
        assert response.json()["detail"]


async def test_writing_wants_the_token(world: World) -> None:
    await world.round()
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic eA=="},
        {"Authorization": "Bearer"},
    ):
        for response in (
            await world.client.put("/v1/services/shop", json={"replicas": 1}, headers=headers),
            await world.client.delete("/v1/services/shop", headers=headers),
        ):
            assert (response.status_code, response.json()["error"]) == (401, "unauthenticated")
    await world.put(replicas=1)
    assert (await world.client.delete("/v1/services/shop", headers=BEARER)).status_code == 204
    assert (await world.client.delete("/v1/services/shop", headers=BEARER)).status_code == 404


async def test_without_a_token_nothing_can_be_written_and_reading_can_want_it(tmp_path: Path) -> None:
    service = make_service(tmp_path / "off", token=False)
    async with client_of(service) as client:
        response = await client.put("/v1/services/shop", json={"replicas": 1}, headers=BEARER)
        assert (response.status_code, response.json()["error"]) == (403, "writes-off")
    await service.stop()
    service = make_service(tmp_path / "closed", reads="token")
    async with client_of(service) as client:
        for path in ("/v1/status", "/v1/nodes", "/v1/matrix", "/v1/services", "/metrics", "/v1/history"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=BEARER)).status_code == 200
        assert (await client.post("/v1/placements", json={"replicas": 1})).status_code == 401
        assert (await client.get("/healthz")).status_code == 200
    await service.stop()


async def test_a_report_is_believed_or_changes_nothing(world: World) -> None:
    clock, client = world.clock, world.client
    one = world.fleet.nodes[0]
    peers = world.fleet.pairs(0)
    assert (await post_report(client, one.report(clock.unix(), peers))).status_code == 204
    held = snapshot_of(world.service)
    good = one.report(clock.unix(), peers)
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    unsigned = good[:-SIGNATURE] + bytes(SIGNATURE)
    foreign = FleetNode("n1", STRANGER)
    expired = FleetNode("n1", not_after=START)
    slow = FleetNode("n1")
    absurd = one.report(clock.unix(), [pair(slow.id, 12_345.678)])
    needle = (12_345_678).to_bytes(4, "big")
    assert needle in absurd
    body = absurd[:-SIGNATURE].replace(needle, (60_000_001).to_bytes(4, "big"))
    absurd = body + one.key.sign(b"crossedge/report/v1", body)
    cases = {
        "bad-signature": (403, [flipped, unsigned, one.report(clock.unix(), peers, STRANGER)]),
        "other-network": (403, [foreign.report(clock.unix(), [])]),
        "expired": (403, [expired.report(clock.unix(), [])]),
        "clock-skew": (422, [slow.report(clock.unix() - 301, []), slow.report(clock.unix() + 302, [])]),
        "absurd-rtt": (400, [absurd]),
        "truncated": (400, [b"x", good[:50]]),
        "malformed": (400, [bytes(200), b"\x81" * 300]),
    }
    for reason, (status, bodies) in cases.items():
        for content in bodies:
            response = await post_report(client, content)
            assert (response.status_code, response.json()["error"]) == (status, reason), response.text
            assert response.json()["detail"]
        assert world.service.scheduler.counters.get("reports_total", reason) == len(bodies)
    response = await post_report(client, bytes(MAX_REPORT + 1))
    assert (response.status_code, response.json()["error"]) == (413, "too-long")
    response = await client.post("/v1/reports", content=good, headers={"Content-Type": "application/json"})
    assert response.status_code == 415
    assert snapshot_of(world.service) == held


async def test_a_report_that_comes_again_is_told_so(world: World) -> None:
    one, peers = world.fleet.nodes[0], world.fleet.pairs(0)
    old = one.report(world.clock.unix(), peers)
    new = one.report(world.clock.unix(), peers)
    assert (await post_report(world.client, new)).status_code == 204
    response = await post_report(world.client, old)
    assert (response.status_code, response.json()) == (
        409,
        {"error": "needs-full", "reason": "old", "seq": 2},
    )
    assert (await post_report(world.client, new)).status_code == 204
    assert world.service.scheduler.counters.get("reports_total", "duplicate") == 1
    response = await post_report(world.client, one.report(world.clock.unix(), [], base=1000, seq=2000))
    assert response.json()["reason"] == "unknown-base"


async def test_a_revoked_node_is_dropped_and_refused(world: World, tmp_path: Path) -> None:
    await world.round()
    listed = Blocklist(network=NETWORK, serial=2, issued=START, revoked={"n3": 5}).sign(CA)
    world.service.blocklists.paths = (tmp_path / "list",)
    (tmp_path / "list").write_bytes(b"nonsense")
    await world.service.round()
    assert "no blocklist of this network" in (await world.get("/v1/status"))["problems"][0]
    (tmp_path / "list").write_text(listed.to_text())
    await world.service.round()
    assert len((await world.get("/v1/nodes"))["nodes"]) == 7
    response = await post_report(world.client, world.fleet.nodes[3].report(world.clock.unix(), []))
    assert (response.status_code, response.json()["error"]) == (403, "revoked")
    assert (await world.get("/v1/status"))["problems"] == []


async def test_one_address_cannot_send_without_end(tmp_path: Path) -> None:
    clock = VirtualClock()
    service = make_service(tmp_path, clock, limits={"reports_per_second": 1, "reports_burst": 2})
    async with client_of(service) as client:
        codes = [(await post_report(client, b"x" * 99)).status_code for _ in range(4)]
        assert codes == [400, 400, 429, 429]
        clock.at += 1
        assert (await post_report(client, b"x" * 99)).status_code == 400
    await service.stop()


async def test_another_name_in_host_is_not_ours(world: World) -> None:
    for host, status in (
        ("evil.example", 421),
        ("localhost:8478", 200),
        ("[::1]:8478", 200),
        ("10.1.2.3", 200),
        ("", 421),
    ):
        assert (await world.client.get("/healthz", headers={"Host": host})).status_code == status


async def test_the_page_may_load_nothing_from_elsewhere(world: World) -> None:
    response = await world.client.get("/healthz")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    for name in ("../config.py", "%2e%2e/config.py", ".hidden", "nothing.js"):
        assert (await world.client.get(f"/static/{name}")).status_code == 404


async def test_large_answers_are_not_sent_twice(world: World) -> None:
    await world.round()
    for path in ("/v1/groups", "/v1/matrix", "/v1/map", "/v1/matrix?format=binary"):
        tag = (await world.client.get(path)).headers["etag"]
        assert (await world.client.get(path, headers={"If-None-Match": tag})).status_code == 304
        await world.round()
        assert (await world.client.get(path, headers={"If-None-Match": tag})).status_code == 200
