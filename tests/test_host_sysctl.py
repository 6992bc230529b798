"""Sysctls are set only where they are wrong, remembered, and set back."""

import pytest

from crossedge.host import sysctl
from crossedge.host.namespaces import Namespace
from crossedge.host.sysctl import Needed, Sysctls

pytestmark = pytest.mark.namespaces
FORWARD = "net/ipv4/ip_forward"
FORWARD6 = "net/ipv6/conf/all/forwarding"


@pytest.fixture(autouse=True)
def not_forwarding(inside: Namespace) -> None:
    sysctl.write(FORWARD, "0")


def test_what_is_wrong_is_set_and_set_back() -> None:
    sysctls = Sysctls()
    assert sysctls.require(FORWARD, "1")
    assert not sysctls.require(FORWARD, "1")
    assert sysctl.read(FORWARD) == "1"
    assert sysctls.report() == [Needed(FORWARD, "1", "0", "1")]
    assert sysctls.restore() == [FORWARD]
    assert sysctl.read(FORWARD) == "0"


def test_what_was_right_is_not_touched_in_the_end() -> None:
    sysctl.write(FORWARD, "1")
    sysctls = Sysctls()
    assert not sysctls.require(FORWARD, "1")
    assert sysctls.restore() == []
    assert sysctl.read(FORWARD) == "1"


def test_an_earlier_life_is_remembered_and_what_others_changed_is_theirs() -> None:
    earlier = Sysctls()
    earlier.require(FORWARD, "1")
    later = Sysctls(earlier.changes)
    assert not later.require(FORWARD, "1")
    assert later.report()[0].before == "0"
    sysctl.write(FORWARD, "0")
    assert later.enforce() == [FORWARD]
    assert later.changes[FORWARD].before == "0"
    sysctl.write(FORWARD, "0")
    assert later.restore() == []


def test_what_cannot_be_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, value: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sysctl, "write", refuse)
    sysctls = Sysctls()
    assert not sysctls.require(FORWARD, "1")
    (needed,) = sysctls.report()
    assert (needed.met, needed.error, needed.before) == (False, "Permission denied", None)
    assert not sysctls.require("net/ipv4/conf/none/rp_filter", "1")
    assert sysctls.report()[1].met
    assert sysctls.changes == {}


def test_a_change_is_remembered_before_it_is_made() -> None:
    seen = []
    sysctls = Sysctls(save=lambda changes: seen.append((changes[FORWARD], sysctl.read(FORWARD))))
    sysctls.require(FORWARD, "1")
    sysctls.require(FORWARD, "1")
    assert seen == [(("0", "1"), "0")]


@pytest.mark.parametrize("redirects", ["0", "1"])
def test_what_the_kernel_changes_along_is_set_back_too(redirects: str) -> None:
    links = ("default", "lo")
    sysctl.write("net/ipv4/conf/all/accept_redirects", redirects)
    for link in links:
        sysctl.write(f"net/ipv4/conf/{link}/forwarding", "1")
        sysctl.write(f"net/ipv6/conf/{link}/forwarding", "0")
    sysctls = Sysctls()
    for name in (FORWARD, FORWARD6):
        sysctls.require(name, "1")
    assert sysctl.read("net/ipv4/conf/all/accept_redirects") == "0"
    assert sysctl.read("net/ipv6/conf/lo/forwarding") == "1"
    Sysctls(sysctls.changes).restore()
    assert sysctl.read("net/ipv4/conf/all/accept_redirects") == redirects
    for link in links:
        assert sysctl.read(f"net/ipv4/conf/{link}/forwarding") == "1"
        assert sysctl.read(f"net/ipv6/conf/{link}/forwarding") == "0"
    assert (sysctl.read(FORWARD), sysctl.read(FORWARD6)) == ("0", "0")
