"""Reports over HTTP: to a scheduler that takes them, forgets, refuses, hurries nobody, or talks nonsense."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence

import pytest

from crossedge.latency.feed import Applied, Feed, NeedsFull
from crossedge.latency.report import CONTENT_TYPE, MAX_REPORT, Pair, PairState
from crossedge.meshd import reporter as module
from crossedge.meshd.reporter import Reporter, Source
from crossedge.meshd.scheduler import Target
from crossedge.wire.errors import WireError
from crossedge.wire.identity import node_id
from tests.test_latency_report import CA, NODE, NOW, certificate

CERTIFICATE = certificate()


class Scheduler:
    """A server as the contract says, with answers that a test may choose."""

    def __init__(self) -> None:
        self.feed = Feed(CA.public)
        self.requests: list[bytes] = []
        self.bodies: list[bytes] = []
        self.answers: list[bytes] = []
        """What to say instead of what the feed says, first come first served."""

    def answer(self, body: bytes) -> bytes:
        try:
            found = self.feed.apply(body, 0.0, NOW)
        except WireError as error:
            return http(400, {"error": error.reason, "detail": error.detail})
        if isinstance(found, NeedsFull):
            return http(409, {"error": "needs-full", "reason": found.reason, "seq": found.seq})
        assert isinstance(found, Applied)
        return b"HTTP/1.1 204 No Content\r\n\r\n"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if ": " in line)
        body = await reader.readexactly(int(fields["Content-Length"]))
        self.requests.append(head)
        self.bodies.append(body)
        writer.write(self.answers.pop(0) if self.answers else self.answer(body))
        writer.close()


def http(status: int, body: object, *fields: str) -> bytes:
    text = json.dumps(body).encode()
    head = "".join(f"{field}\r\n" for field in (*fields, f"Content-Length: {len(text)}"))
    return f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + text


class World:
    def __init__(self, port: int, host: str) -> None:
        self.scheduler = Scheduler()
        self.pairs = [Pair(bytes([n]) * 16, PairState.DIRECT, 0.02, 0.02, 0.001, 0.0, 64) for n in (1, 2)]
        self.last = 100
        self.asked: list[tuple[str, list[bytes]]] = []
        source = Source(
            CERTIFICATE, NODE, self._number, lambda: float(NOW), lambda: self.pairs, lambda: None, self._ask
        )
        url = f"http://{host}:{port}/base"
        self.start = lambda: Reporter(url, source, b"instance", 15, frozenset({4, 6}))
        self.reporter = self.start()

    def _ask(self, url: str, nodes: Sequence[bytes]) -> int:
        self.asked.append((url, list(nodes)))
        return sum(node not in {pair.peer for pair in self.pairs} for node in nodes)

    def _number(self) -> int:
        self.last += 1
        return self.last

    @property
    def held(self) -> dict[bytes, Pair]:
        return self.scheduler.feed.nodes[CERTIFICATE.node_id].pairs


def play(script: Callable[[World], Awaitable[None]], host: str = "127.0.0.1") -> None:
    async def run() -> None:
        server = await asyncio.start_server(lambda r, w: world.scheduler.serve(r, w), host, 0)
        world = World(server.sockets[0].getsockname()[1], f"[{host}]" if ":" in host else host)
        async with server:
            await script(world)

    asyncio.run(run())


def test_reports_are_taken_first_full_then_what_changed() -> None:
    async def script(world: World) -> None:
        assert await world.reporter._once() == 15.0
        assert set(world.held) == {pair.peer for pair in world.pairs}
        assert world.scheduler.requests[0].startswith(b"POST /base/v1/reports HTTP/1.1\r\nHost: 127.0.0.1:")
        assert f"Content-Type: {CONTENT_TYPE}\r\n".encode() in world.scheduler.requests[0]
        world.pairs[1] = Pair(world.pairs[1].peer, PairState.UNREACHABLE)
        assert await world.reporter._once() == 15.0
        assert world.held[world.pairs[1].peer].state is PairState.UNREACHABLE
        assert len(world.scheduler.bodies[1]) < len(world.scheduler.bodies[0]) <= MAX_REPORT
        status = world.reporter.status()
        assert status["problem"] is None
        assert status["accepted_s_ago"] is not None

    play(script)


@pytest.mark.parametrize(
    ("medoids", "handed", "ignored"),
    [
        (["node-a", "node-b"], 2, 2),  # no members, so the prober takes none of them
        (["node-a", 7, None, "no name!", "x" * 400, ["node-b"], "\ud800"], 1, 7),
        ([f"node-{number}" for number in range(40)], 16, 40),
        ({"node-a": 1}, 0, 1),
        ("node-a", 0, 1),
        ([], 0, 0),
    ],
)
def test_whom_a_scheduler_wants_measured_is_handed_on_and_nonsense_is_counted(
    medoids: object, handed: int, ignored: int
) -> None:
    async def script(world: World) -> None:
        world.scheduler.answers = [http(200, {"medoids": medoids})]
        assert await world.reporter._once() == 15.0
        status = world.reporter.status()
        assert (status["problem"], status["medoids_ignored"]) == (None, ignored)
        assert sum(len(nodes) for _, nodes in world.asked) == handed
        if handed:
            network = CERTIFICATE.network
            assert world.asked[0][0] == world.reporter.url
            assert world.asked[0][1][0] == node_id(network, medoids[0])  # type: ignore[index]  # a list, then

    play(script)


def test_scheduler_that_forgot_or_knows_a_higher_number_gets_a_full_report_at_once() -> None:
    async def script(world: World) -> None:
        await world.reporter._once()
        world.scheduler.feed.drop(CERTIFICATE.node_id)
        assert await world.reporter._once() == 15.0
        assert len(world.scheduler.bodies) == 3
        world.last = 5  # it starts again, its clock set back and its floor lost
        world.reporter = world.start()
        assert await world.reporter._once() == 15.0
        assert len(world.scheduler.bodies) == 5
        assert set(world.held) == {pair.peer for pair in world.pairs}

    play(script)


def test_scheduler_cannot_make_us_ask_without_end() -> None:
    async def script(world: World) -> None:
        world.scheduler.answers = [http(409, {"seq": 2**64}), http(409, {"seq": "much"})]
        assert await world.reporter._once() >= 1.0
        assert len(world.scheduler.bodies) == 2
        assert world.reporter._floor < 2**63

    play(script)


@pytest.mark.parametrize(
    ("answer", "least", "problem"),
    [
        (http(403, {"error": "revoked", "detail": "certificate of edge-7"}), 15.0, "403 revoked certificate"),
        (http(429, {}, "Retry-After: 77"), 77.0, "429"),
        (http(503, {}, "Retry-After: 999999"), 600.0, "503"),
        (http(500, {}), 1.0, "500"),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 3\r\n\r\n{{{", 15.0, "400"),
        (b"HTTP/1.1 400 Bad\r\nContent-Length: 30\r\n\r\n{}", 15.0, "400"),
        (b"SSH-2.0-server\r\n\r\n", 1.0, "no HTTP"),
        (b"HTTP/1.1 204", 1.0, "no HTTP"),
        (b"HTTP/1.1 204 x\r\n" + b"a: b\r\n" * 2000 + b"\r\n", 1.0, "no HTTP"),
        (b"", 1.0, "no HTTP"),
    ],
)
def test_what_is_not_taken_is_said_and_sent_again_later(answer: bytes, least: float, problem: str) -> None:
    async def script(world: World) -> None:
        world.scheduler.answers = [answer]
        assert await world.reporter._once() == least
        assert problem in world.reporter.status()["problem"]
        assert await world.reporter._once() == 15.0
        assert set(world.held) == {pair.peer for pair in world.pairs}

    play(script)


def test_scheduler_that_is_not_there_is_tried_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    async def script(world: World) -> None:
        monkeypatch.setattr(module, "post", refuse)
        waits = [await world.reporter._once() for _ in range(10)]
        assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0, 60.0]
        assert "refused" in world.reporter.status()["problem"]

    play(script)


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://scheduler", Target("scheduler", 8478, "/v1/reports")),
        ("http://10.159.0.1:80/", Target("10.159.0.1", 80, "/v1/reports")),
        ("http://[fd00::1]:8478/a/", Target("fd00::1", 8478, "/a/v1/reports")),
    ],
)
def test_url_of_a_scheduler(url: str, target: Target) -> None:
    assert Target.parse(url) == target


NO_URLS = (
    *("scheduler:8478", "https://scheduler", "http://", "http://a:b", "http://a:99999", "http://u@a"),
    *("http://a?b", "http://a/\r\nb", "http://\xe4", "http://[::1"),
)


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_url_is_refused_with_a_word_on_what_is(url: str) -> None:
    with pytest.raises(ValueError, match="http://scheduler:8478"):
        Target.parse(url)
