"""Labels on Kubernetes' nodes, the manifests, the unit, and the configuration."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from crossedge.latency.report import Coordinates
from crossedge.sched.config import SchedConfig, load_config
from crossedge.sched.kubernetes import COORDINATES, patch_of
from crossedge.sched.main import scheduler as command
from crossedge.sched.trust import load_trust
from crossedge.wire.blocklist import Blocklist
from crossedge.wire.bundle import Bundle
from crossedge.wire.errors import ConfigError
from tests.sched_fleet import CA, START, Fleet, VirtualClock, make_service, two_regions


class FakeApi(BaseHTTPRequestHandler):
    """A Kubernetes API server of two pages of nodes."""

    nodes: dict[str, dict[str, Any]]
    seen: list[tuple[str, str]]

    def answer(self, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.headers["Authorization"] != "Bearer of-the-account":
            self.answer(401, {})
            return
        names = sorted(self.nodes)
        part, more = (names[4:], "") if "continue=next" in self.path else (names[:4], "next")
        self.answer(200, {"metadata": {"continue": more}, "items": [self.nodes[name] for name in part]})

    def do_PATCH(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.path.rpartition("/")[2]
        self.seen.append((name, self.headers["Content-Type"]))
        for part, values in body["metadata"].items():
            present = self.nodes[name]["metadata"].setdefault(part, {})
            for key, value in values.items():
                present.pop(key, None) if value is None else present.update({key: value})
        self.answer(200, self.nodes[name])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[ThreadingHTTPServer]:
    FakeApi.nodes = {
        name: {"metadata": {"name": name}} for name in [*(f"n{i}" for i in range(8)), "stranger"]
    }
    FakeApi.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeApi)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.asyncio
async def test_nodes_carry_their_group_and_are_written_only_when_it_changes(
    tmp_path: Path, api: ThreadingHTTPServer
) -> None:
    token = tmp_path / "account"
    token.write_text("of-the-account\n")
    clock, fleet = VirtualClock(), Fleet(two_regions())
    settings = {"label_nodes": True, "url": f"http://127.0.0.1:{api.server_port}", "token_file": token}
    service = make_service(tmp_path, clock, kubernetes=settings)
    fleet.report_all(service)
    await service.round()
    assert service.problems == {}
    assert sorted(FakeApi.seen) == [(f"n{i}", "application/merge-patch+json") for i in range(8)]
    metadata = {name: node["metadata"] for name, node in FakeApi.nodes.items()}
    groups = {name: metadata[name]["labels"]["crossedge.io/group"] for name in ("n0", "n1", "n4", "n5")}
    assert groups["n0"] == groups["n1"] != groups["n4"] == groups["n5"]
    assert metadata["n1"]["annotations"]["crossedge.io/group-medoid"] in ("n0", "n1", "n2", "n3")
    assert "labels" not in metadata["stranger"]
    await service.round()
    assert len(FakeApi.seen) == 8
    token.write_text("expired")
    await service.round()
    assert "GET /api/v1/nodes?limit=500: 401" in service.problems["kubernetes"]
    await service.stop()


def test_coordinates_are_written_when_they_have_moved() -> None:
    def place(x: float) -> str:
        return ",".join([f"{value:.1f}" for value in (x, *[0.0] * 7, 1.0)])

    node = {"metadata": {"name": "a", "annotations": {COORDINATES: place(5.0)}}}
    for x, written in ((5.0, False), (6.9, False), (7.1, True)):
        patch = patch_of(node, {"annotations": {COORDINATES: place(x)}})
        assert (patch is not None) == written
    assert patch_of({"metadata": {}}, {"annotations": {COORDINATES: None}}) is None
    assert Coordinates((0.0,) * 8, 1.0, 0.1)  # what they are made of


def test_manifests_are_what_the_code_takes(repository: Path, tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((repository / "deploy/crossedge-sched.yaml").read_text()))
    kinds = {document["kind"]: document for document in documents}
    assert kinds["ClusterRole"]["rules"] == [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "patch"]}
    ]
    file = tmp_path / "sched.toml"
    file.write_text(kinds["ConfigMap"]["data"]["sched.toml"])
    config = load_config(file, required=True)
    assert config.kubernetes.label_nodes
    pod = kinds["Deployment"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(config.bundle.parent) in mounts
    assert str(config.token_file.parent) in mounts if config.token_file else False
    assert str(config.state_dir) in mounts
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert kinds["ClusterRoleBinding"]["subjects"][0]["name"] == pod["serviceAccountName"]
    (extender,) = yaml.safe_load((repository / "deploy/kube-scheduler.yaml").read_text())["extenders"]
    assert extender["urlPrefix"] + "/" + extender["filterVerb"] == "http://127.0.0.1:8478/extender/filter"
    assert extender["prioritizeVerb"] == "prioritize"
    assert extender["nodeCacheCapable"] is True
    example = yaml.safe_load((repository / "deploy/example-pod.yaml").read_text())
    assert example["spec"]["template"]["metadata"]["annotations"]["crossedge.io/users"] == "edge-1=3,edge-7=1"


def bundle_text() -> str:
    node = Fleet(two_regions()).nodes[0]
    listed = Blocklist(network=node.certificate.network, serial=1, issued=START).sign(CA)
    return (
        Bundle(certificate=node.certificate, ca=CA.public, blocklist=listed, issued=START).sign(CA).to_text()
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour = 1", "colour: expected a known key (blocklists, bundle"),
        ("[rounds]\nevery = 0", "rounds.every: expected greater than or equal to 1"),
        ('listen = ["localhost:1"]', "listen.0: expected address:port"),
        ('listen = ["127.0.0.1:70000"]', "listen.0: expected address:port"),
        ('network = "xyz"', "network: expected base64 of the network's 32-byte CA key"),
        ('reads = "token"', "token_file: expected a file with a token"),
        ('token_file = "/token"', "token: expected a token of 16 characters or more, in a file of mode 0600"),
        ('[kubernetes]\nurl = "ftp://x"', "kubernetes.url: expected"),
        ("listen = ", "(whole file): expected TOML"),
        ("", "network: expected the network's CA key in base64, because there is no bundle"),
    ],
)
def test_a_bad_configuration_is_one_line_that_names_the_key(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "etc" / "crossedge" / "sched.toml"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    if "network" not in says:
        (file.parent / "node.bundle").write_text(bundle_text())
    (tmp_path / "token").write_text("short")
    (tmp_path / "token").chmod(0o644)
    result = CliRunner().invoke(command, ["run", "--check-config", "--root", str(tmp_path)])
    assert isinstance(result.exception, ConfigError), result.output
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_node_needs_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "etc/crossedge").mkdir(parents=True)
    bundle = tmp_path / "etc/crossedge/node.bundle"
    bundle.write_text(bundle_text())
    result = CliRunner().invoke(command, ["run", "--check-config", "--root", str(tmp_path)])
    assert result.exit_code == 0
    assert result.output.strip().endswith("is fine: http://127.0.0.1:8478")
    bundle.write_text(bundle_text().replace("A", "B", 3))
    with pytest.raises(ConfigError, match="a bundle signed by the network's authority"):
        load_trust(SchedConfig(), tmp_path, "sched.toml")
