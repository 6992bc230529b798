"""Sends the node's latency reports to a scheduler: plain HTTP/1.1, one short connection per report.

A report is signed, so the way to the scheduler (overlay or underlay) needs no protection of its own. What is
lost costs freshness only: the next report says it again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from crossedge.host.clock import boottime
from crossedge.latency.deltas import Deltas
from crossedge.latency.report import CONTENT_TYPE, Coordinates, Pair, Report
from crossedge.meshd.resolve import resolve
from crossedge.meshd.scheduler import Target
from crossedge.wire.certificate import Certificate
from crossedge.wire.identity import SigningKey, is_name, node_id

FIRST_AFTER: Final = 3.0  # seconds after the start
JITTER: Final = 0.2  # the part of an interval that is random
TIMEOUT: Final = 10.0  # seconds that one exchange may take
BACKOFF_FIRST: Final = 1.0  # seconds after a first failure; it doubles
BACKOFF_MAX: Final = 60.0
REFUSED_MAX: Final = 300.0  # likewise, where the scheduler understands and refuses
RETRY_AFTER_MAX: Final = 600.0  # seconds that a scheduler may tell us to wait
HEAD_MAX: Final = 4096
BODY_MAX: Final = 4096
MEDOIDS_MAX: Final = 16  # names in an answer that are looked at
SEQUENCE_MAX: Final = 2**63  # a scheduler may not push our numbers beyond

log = logging.getLogger("meshd.reports")


class Answer(NamedTuple):
    """What a server said."""

    status: int
    retry_after: float
    body: dict[str, Any]


class HttpError(Exception):
    """No answer that can be used."""


async def post(address: str, target: Target, body: bytes) -> Answer:
    """Send one report; raises OSError, TimeoutError or HttpError."""
    async with asyncio.timeout(TIMEOUT):
        reader, writer = await asyncio.open_connection(address, target.port, limit=HEAD_MAX)
        try:
            head = (
                f"POST {target.path} HTTP/1.1\r\nHost: {target}\r\nContent-Type: {CONTENT_TYPE}\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode("ascii") + body)
            await writer.drain()
            return await _answer(reader)
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


async def _answer(reader: asyncio.StreamReader) -> Answer:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise HttpError("the answer is no HTTP, or too long") from error
    first, *lines = head.split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():
        raise HttpError(f"the answer is no HTTP: {first[:40]!r}")
    fields = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    after = fields.get("retry-after", "")
    body: dict[str, Any] = {}
    length = fields.get("content-length", "0")
    if length.isdecimal() and 0 < int(length) <= BODY_MAX:
        with suppress(asyncio.IncompleteReadError, ValueError, RecursionError):
            found = json.loads(await reader.readexactly(int(length)))
            body = found if isinstance(found, dict) else {}
    return Answer(int(words[1]), min(float(after), RETRY_AFTER_MAX) if after.isdecimal() else 0.0, body)


class Source(NamedTuple):
    """What reports are made of."""

    certificate: Certificate
    signing_key: SigningKey
    number: Callable[[], int]
    """The next sequence number."""
    unix: Callable[[], float]
    pairs: Callable[[], list[Pair]]
    place: Callable[[], Coordinates | None]
    asked: Callable[[str, Sequence[bytes]], int]
    """Takes a scheduler's URL and the nodes that it wants measured; returns how many of them are ignored."""


class Reporter:
    """The reports to one scheduler."""

    def __init__(
        self, url: str, source: Source, epoch: bytes, interval: int, families: Collection[int]
    ) -> None:
        """`epoch` is random at each start of the daemon; `interval` is in seconds."""
        self.url = url
        self._target = Target.parse(url)
        self._source = source
        self._epoch = epoch
        self._interval = interval
        self._families = families
        self._deltas = Deltas()
        self._floor = 0
        self._failures = 0
        self._problem = ""
        self._since = boottime()
        self._accepted: float | None = None
        self.sent_bytes = 0
        """Bytes of all reports."""
        self.ignored = 0
        """What the scheduler wanted measured and is no member, no name, or too much."""

    def status(self) -> dict[str, Any]:
        """Return where reports go and how that is."""
        accepted = self._accepted
        return {
            "url": self.url,
            "accepted_s_ago": None if accepted is None else round(boottime() - accepted, 1),
            "problem": self._problem or None,
            "sent_bytes": self.sent_bytes,
            "medoids_ignored": self.ignored,
        }

    @property
    def overdue(self) -> bool:
        """Whether nothing was accepted for longer than an outage explains."""
        return boottime() - (self._accepted or self._since) > 8 * self._interval

    def _report(self) -> tuple[int, bytes]:
        source = self._source
        seq = self._floor = max(source.number(), self._floor + 1)
        draft = self._deltas.draft(seq, source.pairs(), boottime())
        report = Report(
            certificate=source.certificate,
            epoch=self._epoch,
            seq=seq,
            base=draft.base,
            issued=int(source.unix()),
            interval=self._interval,
            pairs=draft.pairs,
            coordinates=source.place(),
        )
        return seq, report.sign(source.signing_key).encode()

    async def run(self) -> None:
        """Report until cancelled."""
        await asyncio.sleep(FIRST_AFTER * (0.5 + random.random()))  # jitter, no secret
        while True:
            wait = await self._once()
            await asyncio.sleep(wait * (1.0 - JITTER * random.random()))  # jitter, no secret

    async def _once(self) -> float:
        """Send one report, and where that is asked for a full one after it; return how long to wait."""
        for again in (False, True):
            seq, encoded = self._report()
            try:
                found = await resolve(self._target.host, self._target.port, self._families)
                if found is None:
                    raise HttpError(f"{self._target.host} has no address")
                answer = await post(found.host, self._target, encoded)
            except (OSError, TimeoutError, HttpError) as error:
                return self._failed(str(error) or "no answer in time", BACKOFF_MAX)
            self.sent_bytes += len(encoded)
            if 200 <= answer.status < 300:
                self._asked(answer.body)
                return self._taken(seq)
            reason = str(answer.body.get("error", ""))[:100]
            detail = str(answer.body.get("detail", ""))[:200]
            said = " ".join(filter(None, (str(answer.status), reason, detail)))
            if answer.status == 409 and not again:
                self._start_over(answer.body.get("seq"))
                continue
            if answer.status in (429, 503):
                return max(self._failed(said, BACKOFF_MAX), answer.retry_after)
            if 400 <= answer.status < 500:
                self._deltas.start_over()
                return max(self._failed(said, REFUSED_MAX), float(self._interval))
            return self._failed(said, BACKOFF_MAX)
        raise AssertionError("unreachable")

    def _start_over(self, seq: object) -> None:
        self._deltas.start_over()
        if isinstance(seq, int) and not isinstance(seq, bool) and 0 < seq < SEQUENCE_MAX:
            self._floor = max(self._floor, seq)

    def _asked(self, body: dict[str, Any]) -> None:
        """Hand on whom the scheduler wants measured; whatever else it may have put there is counted."""
        if "medoids" not in body:
            return
        named = body["medoids"]
        if not isinstance(named, list):
            self.ignored += 1
            return
        network = self._source.certificate.network
        names = [name for name in named[:MEDOIDS_MAX] if isinstance(name, str) and is_name(name)]
        self.ignored += len(named) - len(names)
        self.ignored += self._source.asked(self.url, [node_id(network, name) for name in names])

    def _taken(self, seq: int) -> float:
        self._deltas.acknowledged(seq)
        if self._problem or self._accepted is None:
            log.info("%s takes our reports", self.url)
        self._failures, self._problem, self._accepted = 0, "", boottime()
        return float(self._interval)

    def _failed(self, problem: str, most: float) -> float:
        if problem != self._problem:
            log.warning("%s: report not taken: %s", self.url, problem)
        self._problem = problem
        self._failures += 1
        return float(min(BACKOFF_FIRST * 2.0 ** min(self._failures - 1, 16), most))
