"""The asking side of the daemon's control socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

ANSWER_TIMEOUT = 15.0  # seconds without a line before the daemon counts as stuck


def ask(path: Path, command: str, *, wait: float = 0.0, **arguments: object) -> Iterator[dict[str, Any]]:
    """Yield the daemon's answers to one request.

    Args:
        path: the control socket.
        command: what is asked, e.g. "status".
        wait: seconds that the daemon rests between two answers because we asked for it.
        arguments: further keys of the request; those that are None are left out.

    Raises:
        click.ClickException: the daemon is not there, may not be asked, or refuses; one line says which.
    """
    request = {"command": command} | {key: value for key, value in arguments.items() if value is not None}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_TIMEOUT + wait)
        try:
            sock.connect(str(path))
            sock.sendall(json.dumps(request).encode() + b"\n")
            with sock.makefile("rb") as lines:
                yield from _answers(lines, path)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise click.ClickException(f"meshd does not run (nothing listens at {path})") from error
        except PermissionError as error:
            raise click.ClickException(f"{path}: permission denied; ask as root") from error
        except (TimeoutError, OSError) as error:
            raise click.ClickException(f"meshd does not answer at {path}: {error}") from error


def _answers(lines: Any, path: Path) -> Iterator[dict[str, Any]]:
    for line in lines:
        answer = json.loads(line)
        if not answer.pop("ok", False):
            raise click.ClickException(answer.get("error", "meshd refused"))
        done = answer.pop("done", False)
        if answer:
            yield answer
        if done:
            return
    raise click.ClickException(f"meshd closed the connection at {path}; is it stopping?")


def ask_one(path: Path, command: str, **arguments: object) -> dict[str, Any]:
    """Return the one answer of a request that has just one. Errors are those of `ask`."""
    answers = list(ask(path, command, wait=0.0, **arguments))
    if len(answers) != 1:
        raise click.ClickException(f"meshd gave {len(answers)} answers to {command!r}, expected one")
    return answers[0]
