"""The control socket, both sides: answers, refusals, and a daemon that is not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from crossedge.cli.control import ask, ask_one
from crossedge.meshd.control import ControlServer


async def status(request: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    yield {"name": request.get("name", "a")}


async def count(request: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    for number in range(int(request["to"])):
        yield {"number": number}


async def refuse(request: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    if request:
        raise ValueError("no such peer: b")
    yield {}


async def fail(request: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    if request:
        raise RuntimeError("a fault")
    yield {}


async def rest(request: Mapping[str, Any]) -> AsyncIterator[Mapping[str, Any]]:
    yield {"number": 0}
    await asyncio.sleep(float(request["seconds"]))
    yield {"number": 1}


HANDLERS = {"rest": rest, "status": status, "count": count, "refuse": refuse, "fail": fail}


@pytest.mark.asyncio
async def test_answers_come_one_by_one_and_refusals_as_one_line(tmp_path: Path) -> None:
    server = ControlServer(HANDLERS)
    path = tmp_path / "run" / "meshd.sock"
    await server.start(path)
    assert await asyncio.to_thread(ask_one, path, "status") == {"name": "a"}
    numbers = await asyncio.to_thread(lambda: [answer["number"] for answer in ask(path, "count", to=3)])
    assert numbers == [0, 1, 2]
    for command, message in [
        ("refuse", "no such peer: b"),
        ("fail", "its log says why"),
        ("what", "count, fail, refuse, rest, status"),
    ]:
        with pytest.raises(click.ClickException, match=message):
            await asyncio.to_thread(ask_one, path, command)
    await server.stop()
    assert not path.exists()


@pytest.mark.asyncio
async def test_socket_file_of_an_earlier_life_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "meshd.sock"
    path.write_text("left over")
    server = ControlServer(HANDLERS)
    await server.start(path)
    assert await asyncio.to_thread(ask_one, path, "status", name="b") == {"name": "b"}
    await server.stop()


def test_daemon_that_does_not_run_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="meshd does not run"):
        ask_one(tmp_path / "none.sock", "status")


@pytest.mark.asyncio
async def test_overlong_request_ends_only_its_connection(tmp_path: Path) -> None:
    path = tmp_path / "meshd.sock"
    server = ControlServer(HANDLERS)
    await server.start(path)
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"x" * 200_000)
    assert await reader.read() == b""
    writer.close()
    assert await asyncio.to_thread(ask_one, path, "status") == {"name": "a"}
    await server.stop()


@pytest.mark.asyncio
async def test_a_rest_that_was_asked_for_is_not_taken_for_a_stuck_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossedge.cli.control.ANSWER_TIMEOUT", 0.05)
    path = tmp_path / "meshd.sock"
    server = ControlServer(HANDLERS)
    await server.start(path)
    with pytest.raises(click.ClickException, match="does not answer"):
        await asyncio.to_thread(lambda: list(ask(path, "rest", seconds=0.2)))
    answers = await asyncio.to_thread(lambda: list(ask(path, "rest", wait=2.0, seconds=0.2)))
    assert [answer["number"] for answer in answers] == [0, 1]
    await server.stop()
