"""docs/protocol.md says what the models say: every message, every key, every bound that is a number there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from crossedge.latency.report import Report
from crossedge.wire.blocklist import Blocklist, Delegation
from crossedge.wire.bundle import Bundle
from crossedge.wire.certificate import Certificate, Request
from crossedge.wire.codec import Fields
from crossedge.wire.identity import Signed
from crossedge.wire.limits import MAX_CONTROL, MAX_PLAINTEXT
from crossedge.wire.messages import MAX_SEALED, NEEDS_COOKIE, REQUEST_FLOOR, TYPES
from crossedge.wire.record import Record

SIGNED: tuple[type[Signed], ...] = (Request, Certificate, Record, Delegation, Blocklist, Bundle, Report)


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "docs" / "protocol.md").read_text()


def table_after(text: str, heading: str) -> list[list[str]]:
    """Return the rows of the first table with keys after a heading."""
    start = text.index(heading)
    head = text.index("| key | type | what |", start)
    rows = []
    for line in text[head:].splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def check(rows: list[list[str]], model: type[Fields]) -> None:
    assert [row[0] for row in rows] == [column.key for column in model.COLUMNS]
    for row, column in zip(rows, model.COLUMNS, strict=True):
        optional = "default" in row[1] or column.name in {"node", "address"}
        assert optional == column.optional, (model.__name__, column.name)


@pytest.mark.parametrize("number", sorted(TYPES))
def test_every_message_is_described_as_it_is(text: str, number: int) -> None:
    model = TYPES[number]
    mark = " (request)" if model.REQUEST else ""
    check(table_after(text, f"**{number} {model.__name__}**{mark}"), model)
    line = re.search(rf"^\| {number} \| {model.__name__} \|.*$", text, re.MULTILINE)
    assert line is not None
    assert ("request" in line[0]) == model.REQUEST
    assert ("needs a cookie" in line[0]) == (model in NEEDS_COOKIE)


@pytest.mark.parametrize("model", SIGNED, ids=lambda model: model.__name__)
def test_every_signed_object_is_described_as_it_is(text: str, model: type[Signed]) -> None:
    check(table_after(text, f"{model.__name__}\n\n| key"), model)
    line = f"| {model.__name__} | `{model.DOMAIN.decode()}` |"
    assert line in text
    assert f"| {model.LIMIT:,} bytes |" in text[text.index(line) :].splitlines()[0]


def test_bounds_are_the_same(text: str) -> None:
    for number in (MAX_CONTROL, MAX_PLAINTEXT):
        assert f"{number:,}" in text
    assert f"at least {REQUEST_FLOOR} bytes" in text
    assert f"bin of up to {MAX_SEALED}" in text
