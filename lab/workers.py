"""Processes of the lab that take orders as lines of JSON, and end when the one who started them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from crossedge.lab.launch import LabError


class Worker:
    """A running `python -m MODULE` that answers each line with a line."""

    def __init__(self, module: str, first: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        """Start it, hand over descriptors (same numbers) and its first order; returns when it is ready."""
        self.module = module
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(descriptors),
            env=environment,
            start_new_session=True,  # a Ctrl-C is for us to handle
        )
        try:
            self.ask(first)
        except BaseException:
            self.stop()
            raise

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Send an order; return the answer; `LabError` where it is refused or nobody answers."""
        if self.process.stdin is None or self.process.stdout is None:
            raise LabError(f"{self.module} has no pipes")
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError as error:
            raise LabError(f"{self.module} has ended: {error}") from error
        if not line:
            raise LabError(f"{self.module} has ended with status {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise LabError(f"{self.module}: {answer['error']}")
        return answer

    def stop(self) -> None:
        """End it: first by closing its orders, then by force."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
