"""Groups and coordinates on Kubernetes' own nodes, as label and annotations; written where they changed.

What goes on a node is a function of the scheduler's state; the client is a few requests over the standard
library. A Kubernetes node is the mesh node of the same name.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from crossedge.latency.report import Coordinates
from crossedge.sched.config import Kubernetes
from crossedge.sched.reads import groups
from crossedge.sched.scheduler import Scheduler
from crossedge.wire.errors import CrossedgeError

GROUP: Final = "crossedge.io/group"
MEDOID: Final = "crossedge.io/group-medoid"
COORDINATES: Final = "crossedge.io/coordinates"
MOVED_MS: Final = 2.0
"""Milliseconds that coordinates may differ from those on the node before they are written anew."""
PATCHES_MAX: Final = 100
"""Nodes that are patched after one round; the others follow."""
PAGE: Final = 500
ANSWER_MAX: Final = 64 * 1024 * 1024
TIMEOUT: Final = 10.0

Wanted = dict[str, dict[str, dict[str, str | None]]]


class KubernetesError(CrossedgeError):
    """The API server cannot be had or refuses; the text says what."""


def coordinates_text(coordinates: Coordinates | None) -> str | None:
    """Return eight dimensions and the height in ms, separated by commas; None where there are none."""
    if coordinates is None:
        return None
    return ",".join(f"{value:.1f}" for value in (*coordinates.point, coordinates.height))


def wanted(scheduler: Scheduler) -> Wanted:
    """Return by node name the labels and annotations that should be there; None stands for none."""
    found = groups(scheduler.outcome, scheduler.view)
    medoids = {member: group["medoid"] for group in found["groups"] for member in group["members"]}
    result: Wanted = {}
    for node in scheduler.nodes.values():
        position = scheduler.view.index.get(node.name)
        if position is None:
            continue
        label = int(scheduler.view.labels[position])
        held = scheduler.feed.nodes.get(node.node_id)
        place = coordinates_text(None if held is None else held.coordinates)
        result[node.name] = {
            "labels": {GROUP: str(label) if label >= 0 else None},
            "annotations": {MEDOID: medoids.get(node.name), COORDINATES: place},
        }
    return result


def moved(before: str | None, after: str | None) -> bool:
    """Tell whether coordinates differ by enough to be written."""
    try:
        old = [float(part) for part in (before or "").split(",")]
        new = [float(part) for part in (after or "").split(",")]
    except ValueError:
        return before != after
    far = sum((a - b) ** 2 for a, b in zip(old, new, strict=False)) > MOVED_MS**2
    return len(old) != len(new) or far


def patch_of(node: Mapping[str, Any], want: Mapping[str, Mapping[str, str | None]]) -> dict[str, Any] | None:
    """Return the JSON merge patch (RFC 7396) that makes a node's metadata as wanted, None where it is so."""
    metadata = node.get("metadata") or {}
    patch: dict[str, dict[str, str | None]] = {}
    for part, values in want.items():
        present = metadata.get(part) or {}
        for key, value in values.items():
            before = present.get(key)
            if before != value and not (
                key == COORDINATES and value is not None and not moved(before, value)
            ):
                patch.setdefault(part, {})[key] = value
    return {"metadata": patch} if patch else None


@dataclass(frozen=True, slots=True)
class KubernetesClient:
    """The nodes of one API server. Shell: it blocks."""

    settings: Kubernetes

    def label(self, want: Wanted) -> int:
        """Patch the nodes that are not as wanted, at most `PATCHES_MAX`; return how many.

        Raises:
            KubernetesError: the API server cannot be reached, or refuses.
        """
        patched = 0
        path = f"/api/v1/nodes?limit={PAGE}"
        connection, headers = self._connect()
        try:
            while path:
                listed = self._ask(connection, "GET", path, headers)
                for node in listed.get("items") or []:
                    name = (node.get("metadata") or {}).get("name", "")
                    patch = patch_of(node, want[name]) if name in want else None
                    if patch is not None and patched < PATCHES_MAX:
                        body = json.dumps(patch).encode()
                        kind = {**headers, "Content-Type": "application/merge-patch+json"}
                        self._ask(connection, "PATCH", f"/api/v1/nodes/{quote(name, safe='')}", kind, body)
                        patched += 1
                more = (listed.get("metadata") or {}).get("continue")
                path = f"/api/v1/nodes?limit={PAGE}&continue={quote(more, safe='')}" if more else ""
        finally:
            connection.close()
        return patched

    def _connect(self) -> tuple[http.client.HTTPConnection, dict[str, str]]:
        url = self.settings.url
        if not url:
            host, port = (
                os.environ.get("KUBERNETES_SERVICE_HOST"),
                os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
            )
            if not host:
                raise KubernetesError("kubernetes.url is not set, and this does not run in a cluster")
            url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        parts = urlsplit(url)
        headers = {"Accept": "application/json"}
        try:
            headers["Authorization"] = f"Bearer {self._token()}"
            if parts.scheme == "http":
                return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT), headers
            context = ssl.create_default_context(cafile=str(self.settings.ca_file))
            return (
                http.client.HTTPSConnection(
                    parts.hostname or "", parts.port, timeout=TIMEOUT, context=context
                ),
                headers,
            )
        except (OSError, ValueError) as error:
            raise KubernetesError(f"{url}: {error}") from error

    def _token(self) -> str:
        return Path(self.settings.token_file).read_text(encoding="ascii").strip()

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None = None,
    ) -> dict[str, Any]:
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            content = answer.read(ANSWER_MAX)
            value = json.loads(content) if answer.status == 200 else {}
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise KubernetesError(f"{method} {path}: {type(error).__name__}: {error}") from error
        if answer.status != 200 or not isinstance(value, dict):
            raise KubernetesError(f"{method} {path}: {answer.status} {answer.reason}")
        return value
