"""The demo's second half: latencies are reported, groups appear, a service goes where its users are.

The scheduler is a program on one of the nodes; the others report to it inside the mesh. Daemons are started
again for it, as an operator does who changes their configuration: pods stay.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Final

from crossedge.lab.demo_mesh import CONFIG, DemoError, Member, Mesh, each
from crossedge.wire.bundle import Bundle

PORT: Final = 8478
SETTINGS: Final = "etc/crossedge/sched.toml"
KEY_FILE: Final = "etc/crossedge/sched.token"
SERVICE: Final = "shop"
ANSWER_TIMEOUT: Final = 10.0  # seconds
MEASURED: Final = 1  # kind of a pair in /v1/matrix; its upper bits say which way
WITHIN: Final = 60.0  # seconds for each step
LOOK: Final = 0.25


def possible() -> bool:
    """Tell whether the scheduler is installed (`crossedge[sched]`)."""
    return all(find_spec(name) for name in ("fastapi", "numpy", "scipy", "uvicorn"))


@dataclass(slots=True)
class Schedule:
    """What came of it."""

    measured: int = 0
    """Pairs with a round-trip time."""
    groups: list[list[str]] = field(default_factory=list)
    placed: list[tuple[list[str], float | None]] = field(default_factory=list)
    """Where the service stood, one after the other, and its users' mean round-trip time in ms."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return what demo.json says of it."""
        placed = [
            {"nodes": nodes, "mean_ms": None if mean is None else round(mean, 2)}
            for nodes, mean in self.placed
        ]
        return {
            "measured": self.measured,
            "groups": self.groups,
            "placed": placed,
            "seconds": round(self.seconds, 1),
        }


class Scheduling:
    """A scheduler on one node of a mesh."""

    def __init__(self, mesh: Mesh, host: str, regions: Mapping[str, Collection[str]]) -> None:
        """`host` runs the scheduler; `regions` has the nodes of each region."""
        self._mesh = mesh
        self._host = mesh.members[host]
        self._regions = regions
        self._token = os.urandom(24).hex()
        self.result = Schedule()

    def start(self) -> None:
        """Start the scheduler, and the daemons again with what they need to report to it."""
        root = self._host.root
        token = root / KEY_FILE
        token.write_text(self._token + "\n")
        token.chmod(0o600)
        (root / SETTINGS).write_text(
            f'token_file = "/{KEY_FILE}"\n[rounds]\nevery = 1\nrest = 1\nwarmup = 0\nagreeing = 1\n'
        )
        self._mesh.run_program(self._host.name, "crossedge-sched", "run", "--root", str(root))
        overlay = Bundle.from_text((root / "bundle").read_bytes()).certificate.overlay4
        each(lambda member: self._again(member, f"http://{overlay}:{PORT}"), self._mesh.members.values())

    def _again(self, member: Member, url: str) -> None:
        self._mesh.end(member.name)
        config = f'log_level = "info"\n[reports]\nurl = ["{url}"]\ninterval = 1\n'
        (member.root / CONFIG).write_text(config)
        self._mesh.run_daemon(member)

    def run(self, say: Callable[[str], None]) -> Schedule:
        """Wait for groups, place a service for users of one region, then of the other; say what happens."""
        began = time.monotonic()
        try:
            nodes = sorted(name for members in self._regions.values() for name in members)
            matrix = self._until(lambda: self._matrix(nodes))
            self.result.measured = self._measured(matrix)
            say(f"latency: {self.result.measured} of {len(nodes) * (len(nodes) - 1) // 2} pairs measured")
            wanted = sorted(sorted(members) for members in self._regions.values())
            self.result.groups = self._until(lambda: self._groups(wanted)) or self._groups(None) or []
            say("groups: " + " | ".join(", ".join(group) for group in self.result.groups))
            for region in reversed(list(self._regions)):
                self._place(region, say)
        finally:
            self.result.seconds = time.monotonic() - began
        return self.result

    def _place(self, region: str, say: Callable[[str], None]) -> None:
        users = {name: max(1, 5 - 2 * at) for at, name in enumerate(sorted(self._regions[region]))}
        self._ask("PUT", f"/v1/services/{SERVICE}", {"replicas": 1, "users": users})

        def there() -> dict[str, Any] | None:
            found = self._ask("GET", f"/v1/services/{SERVICE}").get("decision")
            return found if found and set(found["nodes"]) <= set(self._regions[region]) else None

        decision = self._until(there) or self._ask("GET", f"/v1/services/{SERVICE}").get("decision") or {}
        self.result.placed.append((decision.get("nodes", []), decision.get("mean_ms")))
        mean, nodes = decision.get("mean_ms"), ", ".join(decision.get("nodes", [])) or "nothing"
        shown = "unknown" if mean is None else f"{mean:.1f} ms"
        say(f"users in {region}: {SERVICE} on {nodes}, mean {shown}")

    def _matrix(self, nodes: list[str]) -> dict[str, Any] | None:
        """Return the matrix once every pair in it is measured."""
        found = self._ask("GET", "/v1/matrix?order=name")
        whole = found["names"] == nodes and self._measured(found) == len(nodes) * (len(nodes) - 1) // 2
        return found if whole else None

    def _measured(self, matrix: dict[str, Any] | None) -> int:
        matrix = matrix or self._ask("GET", "/v1/matrix?order=name")
        kinds = matrix["kind"]
        return sum(
            kinds[a][b] & 7 == MEASURED and kinds[b][a] & 7 == MEASURED
            for a in range(len(kinds))
            for b in range(a)
        )

    def _groups(self, wanted: list[list[str]] | None) -> list[list[str]] | None:
        """Return the groups once they are the wanted ones, or, without any wanted, as they are."""
        groups = sorted(sorted(group["members"]) for group in self._ask("GET", "/v1/groups")["groups"])
        return groups if wanted in (None, groups) else None

    def _until(self, look: Callable[[], Any]) -> Any:
        """Look until there is something, or until it has taken too long; the scheduler may not answer yet."""
        end = time.monotonic() + WITHIN
        while time.monotonic() < end:
            self._mesh.check_alive()
            try:
                if found := look():
                    return found
            except OSError:
                pass
            time.sleep(LOOK)  # between two looks: the scheduler answers, it calls nobody
        return None

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """Ask the scheduler, on its own node."""

        def there() -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=ANSWER_TIMEOUT)
            try:
                headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
                connection.request(method, path, None if body is None else json.dumps(body), headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
            finally:
                connection.close()

        status, text = self._mesh.network.nodes[self._host.name].site.namespace.call(there)
        if status >= 400:
            raise DemoError(f"the scheduler answers {method} {path} with {status}: {text.decode()[:200]}")
        found: dict[str, Any] = json.loads(text)
        return found
