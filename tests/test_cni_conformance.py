"""What a conforming plugin must do, black-box: the installed binary with the daemon, without it, and as a
control Debian's bridge + host-local under the same tests. Here: how it is called, with which variables and in
which version.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.cni_cases import (
    CASES,
    VERSIONS,
    Case,
    a_case,
    a_pod,
    a_served_node,
    added,
    an_unserved_node,
    is_error,
)
from tests.cni_runtime import Answer, Pod

pytestmark = pytest.mark.namespaces
served = pytest.fixture(scope="module")(a_served_node)
unserved = pytest.fixture(scope="module")(an_unserved_node)
case = pytest.fixture(params=CASES)(a_case)
pod = pytest.fixture(a_pod)


# Process


def test_no_command_prints_about_and_ends_well(case: Case) -> None:
    answer = case.plugin.call(None, {})
    assert answer.status == 0
    assert not answer.stdout
    assert "CNI" in answer.stderr


def test_unknown_command_is_code_4(case: Case, pod: Pod) -> None:
    config = case.plugin.configuration(case.version)
    answer = case.plugin.call("FLY", config, container=pod.id, netns=pod.path, interface="eth0")
    is_error(answer, 4)


def test_version_wants_nothing_and_does_not_read_stdin(case: Case) -> None:
    read, write = os.pipe()  # which nobody closes: whoever reads it waits for ever
    environment = {"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [str(case.plugin.binary)], stdin=read, env=environment, capture_output=True, timeout=10, check=True
    )
    os.close(read)
    os.close(write)
    assert set(VERSIONS[:3]) <= set(json.loads(done.stdout)["supportedVersions"])


def test_version_takes_the_dummies_of_libcni(case: Case) -> None:
    answer = case.plugin.call("VERSION", {"cniVersion": case.version}, netns="dummy", interface="dummy")
    assert case.version in answer.ok().json["supportedVersions"]


def test_unreadable_stdin_is_an_error(case: Case, pod: Pod) -> None:
    environment = {
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": pod.id,
        "CNI_NETNS": pod.path,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/",
        "PATH": os.environ["PATH"],
    }
    writable = os.open("/dev/null", os.O_WRONLY)  # which read(2) refuses
    done = subprocess.run(
        [str(case.plugin.binary)], stdin=writable, env=environment, capture_output=True, check=False
    )
    os.close(writable)
    is_error(Answer(done.returncode, done.stdout, ""), 5)


@pytest.mark.parametrize("stdin", [b"", b"{", b"[]", b"nonsense"])
def test_undecodable_stdin_is_code_6(case: Case, pod: Pod, stdin: bytes) -> None:
    answer = case.plugin.call("ADD", stdin=stdin, container=pod.id, netns=pod.path, interface="eth0")
    is_error(answer, 6)


# Variables


@pytest.mark.parametrize(
    ("command", "needed"),
    [
        ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
        ("DEL", ["CNI_CONTAINERID", "CNI_IFNAME"]),
    ],
)
def test_all_missing_variables_are_named_at_once(case: Case, command: str, needed: list[str]) -> None:
    answer = case.plugin.call(command, case.plugin.configuration(case.version))
    is_error(answer, 4)
    text = answer.json["msg"] + answer.json.get("details", "")
    assert all(name in text for name in needed)


@pytest.mark.parametrize("name", ["a" * 16, ".", "..", "a/b", "a:b", "a b"])
def test_interface_names_that_the_kernel_refuses_are_code_4(case: Case, pod: Pod, name: str) -> None:
    is_error(case.plugin.add(pod, case.version, interface=name), 4)
    assert pod.links() == set()


@pytest.mark.parametrize("container", ["", "-a", "a/b", "a b", "ä"])
def test_bad_container_id_is_code_4(case: Case, pod: Pod, container: str) -> None:
    config = case.plugin.configuration(case.version)
    answer = case.plugin.call("ADD", config, container=container, netns=pod.path, interface="eth0")
    is_error(answer, 4)


@pytest.mark.parametrize("name", [None, "", "-a", "a/b", "a b"])
def test_bad_or_missing_network_name_is_code_7(case: Case, pod: Pod, name: str | None) -> None:
    config = case.plugin.configuration(case.version, name=name)
    if name is None:
        del config["name"]
    is_error(case.plugin.call("ADD", config, container=pod.id, netns=pod.path, interface="eth0"), 7)


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_own_namespace_is_code_8(case: Case, pod: Pod, command: str) -> None:
    answer = case.plugin.call(
        command,
        case.plugin.configuration(case.version),
        container=pod.id,
        netns=f"/proc/{os.getpid()}/ns/net",
        interface="eth0",
    )
    is_error(answer, 8)


# Versions


def test_unsupported_version_is_code_1(case: Case, pod: Pod) -> None:
    is_error(case.plugin.add(pod, "99.0.0"), 1)


def test_missing_version_is_0_1_0(case: Case, pod: Pod) -> None:
    config = case.plugin.configuration(None)
    answer = case.plugin.call("ADD", config, container=pod.id, netns=pod.path, interface="eth0").ok()
    found = answer.json
    assert found["cniVersion"] in ("0.1.0", "")
    assert found["ip4"]["ip"].split("/")[0] in pod.addresses()
    case.plugin.call("DEL", config, container=pod.id, netns=pod.path, interface="eth0").ok()


def test_result_has_the_form_of_its_version(case: Case, pod: Pod) -> None:
    result = added(case, pod)
    assert result["cniVersion"] == case.version
    assert len(result["ips"]) == 2
    for each in result["ips"]:
        assert ("version" in each) == (not case.at_least("1.0.0"))
        if "version" in each:
            assert each["version"] == ("6" if ":" in each["address"] else "4")
    assert ("mtu" in result["interfaces"][-1]) == (case.version == "1.1.0")
    case.plugin.delete(pod, case.version).ok()


def test_operations_of_later_versions_are_code_1(case: Case, pod: Pod) -> None:
    if not case.at_least("0.4.0"):
        is_error(case.plugin.check(pod, {}, case.version), 1)
    if case.plugin.is_control:
        return  # GC and STATUS are unknown to it: code 4
    if not case.at_least("1.1.0"):
        is_error(case.plugin.call("GC", case.plugin.configuration(case.version)), 1)
        is_error(case.plugin.call("STATUS", case.plugin.configuration(case.version)), 1)
