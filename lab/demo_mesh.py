"""The demo's mesh: identities, rendezvous and daemons, by the commands that an operator would type."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from crossedge.lab.launch import ROOTS, LabError
from crossedge.lab.network import Network

COMMAND_TIMEOUT = 60.0
STOP_TIMEOUT = 5.0
ANSWER_TIMEOUT = 5.0
LOOK = 0.1
AUTHORITY = "authority"
CONFIG = "etc/crossedge/meshd.toml"
MODULES = {
    "crossedge": "crossedge.cli.main",
    "crossedge-cni": "crossedge.cni.main",
    "meshd": "crossedge.meshd.main",
    "crossedge-rendezvous": "crossedge.rendezvous.main",
    "crossedge-sched": "crossedge.sched.main",
}

Item = TypeVar("Item")
Result = TypeVar("Result")


class DemoError(LabError):
    """A step of the demo did not work; one line that says which and why."""


def program(name: str) -> list[str]:
    """Return the words that run one of our commands: beside this Python, else by module."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    return [found] if found else [sys.executable, "-c", f"from {MODULES[name]} import main; main()"]


def call(*words: str) -> str:
    """Run one of our commands to its end; return its output; `DemoError` has its first complaint."""
    done = subprocess.run(
        [*program(words[0]), *words[1:]],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT,
        check=False,
    )
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise DemoError(f"`{' '.join(words)}` ended with status {done.returncode}: {complaint}")
    return done.stdout


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return the results of a function for each item, a few at a time."""
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


@dataclass(slots=True)
class Member:
    """A node of the mesh: its files, its process and its pod."""

    name: str
    root: Path
    pod: str = ""
    pod4: str = ""
    pod6: str = ""
    process: subprocess.Popen[bytes] | None = None

    def ask(self, command: str) -> dict[str, Any]:
        """Ask the daemon's control socket; {} while nobody answers."""
        path = self.root / "run/crossedge/meshd.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT)
            try:
                connection.connect(str(path))
                connection.sendall(json.dumps({"command": command}).encode() + b"\n")
                with connection.makefile("rb") as lines:
                    line = lines.readline()
            except OSError:
                return {}
        answer: dict[str, Any] = json.loads(line) if line else {}
        return answer


class Mesh:
    """A rendezvous and nodes in a lab's network; every process ends when the stack is unwound."""

    def __init__(
        self, network: Network, stack: ExitStack, output: Path, call: Callable[..., str] = call
    ) -> None:
        """`call` runs one of our commands to its end and returns its output."""
        self.network = network
        self.output = output
        self._call = call
        self.members = {
            name: Member(name, ROOTS / name)
            for name, placed in network.nodes.items()
            if placed.node.role == "node"
        }
        self.servers = [name for name, placed in network.nodes.items() if placed.node.role == "server"]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.stubborn: list[str] = []
        """Programs that had to be killed."""
        self._stack = stack
        stack.callback(shutil.rmtree, ROOTS, ignore_errors=True)  # another mesh may follow in this lab
        stack.callback(self.stop)
        self._authority = ROOTS / AUTHORITY

    def make_identities(
        self, sign: Mapping[str, Sequence[str]] | None = None, install: Sequence[str] = ()
    ) -> None:
        """Make the network's authority, the rendezvous' keys, and for all nodes bundles and the CNI plugin.

        `sign` has further words for `crossedge ca sign`, by node, `install` for `crossedge-cni install`.
        """
        made = self._call("crossedge", "--root", str(self._authority), "ca", "init")
        key = re.search(r"^ca key\s+(\S+)", made, re.MULTILINE)
        if key is None:
            raise DemoError(f"`crossedge ca init` named no CA key: {made.strip()!r}")
        rendezvous = []
        for name in self.servers:
            made = self._call(
                "crossedge-rendezvous",
                "init",
                "--root",
                str(ROOTS / name),
                "--address",
                self.network.nodes[name].address4,
                "--network",
                key[1],
            )
            rendezvous += ["--rendezvous", made.split()[-1]]

        def enrol(member: Member) -> None:
            root, request, bundle = str(member.root), member.root / "request", member.root / "bundle"
            self._call("crossedge", "--root", root, "node", "init", "--name", member.name, "-o", str(request))
            authority = ("crossedge", "--root", str(self._authority))
            more = (sign or {}).get(member.name, ())
            self._call(*authority, "ca", "sign", str(request), *rendezvous, *more, "-o", str(bundle))
            self._call("crossedge", "--root", root, "node", "join", str(bundle))
            self._call("crossedge-cni", "--root", root, "install", "--no-portmap", *install)

        each(enrol, self.members.values())

    def start(self, configs: Mapping[str, str] | None = None, later: Collection[str] = ()) -> None:
        """Start the rendezvous and a daemon on every node but those that are started `later`.

        `configs` has the text of meshd.toml, by node.
        """
        for name in self.servers:
            self.run_server(name)
        for member in self.members.values():
            config = member.root / CONFIG
            config.parent.mkdir(parents=True, exist_ok=True)
            config.write_text((configs or {}).get(member.name, 'log_level = "info"\n'))
            if member.name not in later:
                self.run_daemon(member)

    def run_server(self, name: str) -> None:
        """Start a rendezvous, for the first time or again."""
        self._spawn(name, "crossedge-rendezvous", "run", "--root", str(ROOTS / name))

    def run_daemon(self, member: Member) -> None:
        """Start a node's daemon, for the first time or again."""
        words = ("run", "--config", str(member.root / CONFIG), "--root", str(member.root))
        member.process = self._spawn(member.name, "meshd", *words)

    def _spawn(self, node: str, *words: str, name: str = "") -> subprocess.Popen[bytes]:
        name = name or node
        with (self.output / f"{name}.log").open("ab") as log:
            process = self.network.popen(
                node,
                [*program(words[0]), *words[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONFAULTHANDLER": "1"},  # SIGABRT makes it tell where it is
            )
        self.processes[name] = process
        return process

    def run_program(self, node: str, *words: str) -> None:
        """Start a further program of ours on a node."""
        self._spawn(node, *words, name=f"{words[0]} on {node}")

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> int:
        """End one program by a signal and return its exit status; it is no longer expected to run."""
        process = self.processes.pop(name)
        process.send_signal(number)
        try:
            return process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise DemoError(f"the program on {name} did not end within {STOP_TIMEOUT:.0f} s") from None

    def stop(self) -> None:
        """End all programs: SIGTERM; one that does not listen tells its log where it is, and is killed."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + STOP_TIMEOUT
        for name, process in self.processes.items():
            for last_word in (None, signal.SIGABRT, signal.SIGKILL):
                if last_word is not None:
                    process.send_signal(last_word)
                try:
                    process.wait(max(0.5, end - time.monotonic()))
                    break
                except subprocess.TimeoutExpired:
                    if name not in self.stubborn:
                        self.stubborn.append(name)

    def check_alive(self) -> None:
        """Raise `DemoError` with the last line of its log if one of the programs has ended."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise DemoError(
                    f"the program on {name} ended with status {process.returncode}: {self._last_line(name)}"
                )

    def _last_line(self, name: str) -> str:
        """Return what the program on a node logged last."""
        log = self.output / f"{name}.log"
        return ([line for line in log.read_text(errors="replace").splitlines() if line] or ["-"])[-1]

    def wait(self, what: str, condition: Callable[[Member], bool], timeout: float) -> None:
        """Wait until a condition holds for every node; `DemoError` names those for which it does not."""
        end = time.monotonic() + timeout
        waiting = list(self.members.values())
        while waiting:
            self.check_alive()
            waiting = [member for member in waiting if not condition(member)]
            if waiting and time.monotonic() > end:
                names = ", ".join(member.name for member in waiting)
                said = f"{waiting[0].name} said last: {self._last_line(waiting[0].name)}"
                raise DemoError(f"{what} within {timeout:.0f} s: not true of {names}; {said}")
            if waiting:
                time.sleep(LOOK)  # between two looks: a daemon is asked for its status, it calls nobody

    def peers(self, member: Member) -> dict[str, dict[str, Any]]:
        """Return what `crossedge peers --json` says on a node, by peer name."""
        rows = json.loads(call("crossedge", "--root", str(member.root), "peers", "--json"))
        return {row["name"]: row for row in rows}


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Return every pair once, in rounds in which no name stands twice (the circle method)."""
    seats: list[str | None] = [*names] if len(names) % 2 == 0 else [*names, None]
    table = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        table.append([(a, b) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return table
