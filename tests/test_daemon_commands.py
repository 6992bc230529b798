"""What an operator reads of a live node: tables for people, JSON for programs, an exit status for both."""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_fleet import Fleet, a_fleet, run_here
from tests.underlays import EAST, HOME, MEETING, behind, region, underlay
from tests.waiting import until

pytestmark = pytest.mark.namespaces

WIDEST = 150
NOTICED_WITHIN = 12.0
"""Seconds within which a node knows that its rendezvous is gone."""
CLOCK = "the clock is not synchronised"
"""True of some machines that the tests run on, and then it is right to say so."""
TOPOLOGY = underlay("commands", region(EAST), MEETING, behind("farm", "barn", nat="port-restricted"), HOME)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with a_fleet(TOPOLOGY, tmp_path_factory.mktemp("commands")) as made:
        made.go_direct("attic", "barn")
        yield made


def shown(fleet: Fleet, *words: str, status: int = 0) -> list[str]:
    """Run a command on the attic; return its lines once they are fit for people."""
    done = fleet.command("attic", "crossedge", *words)
    assert (done.returncode, done.stderr) == (status, "")
    for line in done.stdout.splitlines():
        assert len(line) <= WIDEST
        assert "None" not in line
        assert "{" not in line
    return done.stdout.splitlines()


def as_json(fleet: Fleet, *words: str, status: int = 0) -> Any:
    """Run a command on the attic with --json; return what it printed."""
    done = fleet.command("attic", "crossedge", *words, "--json")
    assert (done.returncode, done.stderr) == (status, "")
    return json.loads(done.stdout)


def refused(fleet: Fleet, *words: str) -> str:
    """Run a command on the attic that cannot do what it is asked; return its one line."""
    done = fleet.command("attic", "crossedge", *words)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def test_status_says_who_the_node_is_and_what_is_wrong(fleet: Fleet) -> None:
    problems = [each["what"] for each in fleet.status("attic")["problems"]]
    assert [what for what in problems if what != CLOCK] == []
    expected = 3 if problems else 0
    lines = shown(fleet, "status", status=expected)
    assert lines[0].startswith("node         attic, crossedge ")
    assert "peers        1 known, 1 direct, 0 relayed" in lines
    table = [line.split() for line in lines if ":3478" in line]
    assert table[0][1] == "registered"
    answer = as_json(fleet, "status", status=expected)
    assert (answer["name"], answer["peers"]["direct"]) == ("attic", 1)
    assert answer["host"]["tun"]["name"] == "crossedge0"
    assert answer["rendezvous"][0]["state"] == "registered"


def test_status_is_0_and_says_so_when_nothing_is_wrong(fleet: Fleet, tmp_path: Path) -> None:
    answer = {**fleet.status("attic"), "problems": []}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()

    def serve() -> None:
        connection = listener.accept()[0]
        with connection, connection.makefile("rwb") as lines:
            lines.readline()
            lines.write(json.dumps(answer).encode() + b'\n{"ok": true, "done": true}\n')

    server = threading.Thread(target=serve)
    server.start()
    printed = run_here("crossedge", "status", "--socket", str(tmp_path / "socket"))
    server.join()
    listener.close()
    assert printed.splitlines()[-1] == "nothing is wrong"


def test_peers_lists_each_peer_with_its_path(fleet: Fleet) -> None:
    head, row = shown(fleet, "peers")
    assert head.split()[:4] == ["PEER", "STATE", "PATH", "ENDPOINT"]
    outer = fleet.network.routers["farm"].outer
    assert row.split()[:4] == ["barn", "up", "direct", f"{outer}:41820"]
    (peer,) = as_json(fleet, "peers")
    assert (peer["name"], peer["path"], peer["endpoint"]) == ("barn", "direct", f"{outer}:41820")
    assert 0 < peer["rtt_ms"] < 1000
    assert {path["kind"] for path in peer["paths"]} == {"direct", "relay"}


def test_ping_shows_each_answer_and_its_way(fleet: Fleet) -> None:
    lines = shown(fleet, "ping", "barn", "-c", "3", "-i", "0.05")
    assert [line.split()[0] for line in lines[:3]] == ["1", "2", "3"]
    assert all(line.endswith(":41820") for line in lines[:3])
    assert lines[3].startswith("barn: 3 of 3 answered, ")
    answer = as_json(fleet, "ping", "barn", "-c", "2", "-i", "0.05")
    assert (answer["sent"], answer["answered"], len(answer["probes"])) == (2, 2, 2)


def test_ping_of_an_unknown_peer_is_one_clear_line(fleet: Fleet) -> None:
    assert refused(fleet, "ping", "cellar") == "Error: no such peer: cellar; crossedge peers lists them"


def test_netcheck_names_the_nat_and_says_why(fleet: Fleet) -> None:
    with ThreadPoolExecutor() as pool:  # both are answered by one check, which takes seconds
        table, program = pool.submit(shown, fleet, "netcheck"), pool.submit(as_json, fleet, "netcheck")
        lines, answer = table.result(), program.result()
    assert lines[0].split() == ["WHAT", "FOUND", "WHY"]
    found = {line.split()[0]: line.split()[1] for line in lines[1:] if line}
    assert found["mapping"] == "endpoint-independent"
    assert found["filtering"] == "address-and-port-dependent"
    assert answer["findings"]["mapping"]["value"] == "endpoint-independent"
    assert answer["observations"][0]["endpoint"] == f"{fleet.network.routers['home'].outer}:41820"


def test_routes_lists_what_goes_through_the_mesh(fleet: Fleet) -> None:
    lines = shown(fleet, "routes")
    assert lines[0].split() == ["PREFIX", "PEER", "KIND", "MTU"]
    answer = as_json(fleet, "routes")["routes"]
    assert [line.split()[:2] for line in lines[1:]] == [[row["prefix"], row["peer"]] for row in answer]
    members = {ipaddress.ip_network(row["prefix"]) for row in answer if row["kind"] == "member"}
    assert members == set(map(ipaddress.ip_network, fleet.mesh_routes("attic")))


def test_status_is_3_once_the_rendezvous_is_gone_and_names_it(fleet: Fleet) -> None:
    fleet.kill("meeting")
    what = f"the rendezvous {fleet.network.nodes['meeting'].address4}:3478 does not answer"

    def noticed() -> bool:
        return any(each["what"] == what for each in fleet.status("attic")["problems"])

    print("noticed", until("the node knows that its rendezvous is gone", noticed, NOTICED_WITHIN))
    lines = shown(fleet, "status", status=3)
    assert f"wrong: {what}" in lines
    assert lines[lines.index(f"wrong: {what}") + 1] == "       see that UDP 3478 passes"
    assert fleet.answers("attic", "barn")


@pytest.mark.parametrize("command", ["status", "peers", "ping barn", "netcheck", "routes"])
def test_without_a_daemon_every_command_is_one_line_and_status_1(fleet: Fleet, command: str) -> None:
    if "attic" in fleet.mesh.processes:
        fleet.mesh.end("attic")
    path = fleet.member("attic").root / "run/crossedge/meshd.sock"
    expected = f"Error: meshd does not run (nothing listens at {path})"
    assert refused(fleet, *command.split()) == expected
