"""The cases of the conformance tests: each plugin with each version of the specification.

`CONTROL_FAILS` says which lines the control fails, strictly: a line that it holds cannot stand there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cni_runtime import SYSTEM_PLUGINS, Answer, Node_, Plugin, Pod, pods

VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
CONTROL = SYSTEM_PLUGINS / "bridge"
CONTROL_FAILS = {
    "test_del_with_another_container_id_leaves_the_first": "DEL removes whatever interface has the name",
    "test_own_namespace_is_code_8": "this release has no such check: ADD would change the host",
}
NOT_TO_BE_RUN = {"test_own_namespace_is_code_8"}
"""Those that would change the machine under a plugin that fails them."""


@dataclass
class Case:
    plugin: Plugin
    version: str
    node: Node_ | None

    def at_least(self, version: str) -> bool:
        return VERSIONS.index(self.version) >= VERSIONS.index(version)


def control(root: Path) -> Plugin:
    ranges = [[{"subnet": "10.77.0.0/16"}], [{"subnet": "fd77::/64"}]]
    ipam = {"type": "host-local", "dataDir": str(root / "networks"), "ranges": ranges}
    ipam["routes"] = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    config = {"bridge": "cnib0", "isGateway": True, "ipMasq": False, "ipam": ipam}
    return Plugin(CONTROL, "bridge", config, is_control=True)


def a_served_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node_]:
    node = Node_(tmp_path_factory.mktemp("served"))
    node.start()
    yield node
    node.stop()


def an_unserved_node(tmp_path_factory: pytest.TempPathFactory) -> Node_:
    return Node_(tmp_path_factory.mktemp("unserved"))


CASES = [
    *(pytest.param(("daemon", version), id=f"daemon-{version}") for version in VERSIONS),
    *(
        pytest.param(("local", version), id=f"local-{version}", marks=pytest.mark.slow)
        for version in VERSIONS[:-1]
    ),
    pytest.param(("local", VERSIONS[-1]), id=f"local-{VERSIONS[-1]}"),
    *(
        pytest.param(("control", version), id=f"control-{version}", marks=pytest.mark.tool(str(CONTROL)))
        for version in VERSIONS[:3]
    ),
]

CHECKABLE = [each for each in CASES if "0.3.1" not in each.values[0]]
"""Those of a version that has CHECK."""


def a_case(request: pytest.FixtureRequest, served: Node_, unserved: Node_, tmp_path: Path) -> Case:
    kind, version = request.param
    name = request.node.originalname
    if kind == "control":
        if name in CONTROL_FAILS:
            request.applymarker(
                pytest.mark.xfail(reason=CONTROL_FAILS[name], strict=True, run=name not in NOT_TO_BE_RUN)
            )
            if name in NOT_TO_BE_RUN:
                pytest.xfail(CONTROL_FAILS[name])
        return Case(control(tmp_path), version, None)
    node = served if kind == "daemon" else unserved
    return Case(node.plugin, version, node)


def a_pod() -> Iterator[Pod]:
    with pods() as (made,):
        yield made


def added(case: Case, pod: Pod, **kw: Any) -> dict[str, Any]:
    return case.plugin.add(pod, case.version, **kw).ok().json


def hosts(result: dict[str, Any]) -> list[str]:
    return [each["address"].split("/")[0] for each in result["ips"]]


def is_error(answer: Answer, *codes: int) -> None:
    assert answer.status == 1
    assert {"code", "msg"} <= answer.json.keys()
    assert answer.code in codes, answer.json
