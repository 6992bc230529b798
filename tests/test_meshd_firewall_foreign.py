"""Other people's firewalls that drop what is forwarded are found, and the fix that is named works."""

import asyncio
import ipaddress
import subprocess

import pytest

from crossedge.host import nft, xtables
from crossedge.host.namespaces import Namespace
from crossedge.meshd import firewall, foreign
from crossedge.meshd.desired import Desired
from crossedge.meshd.hoststate import HostState

pytestmark = [pytest.mark.namespaces, pytest.mark.usefixtures("inside")]
network = ipaddress.ip_network
DESIRED = Desired(pods=(network("10.160.1.0/24"), network("fd00:0:0:1::/64")))

DOCKER = """
table ip filter {
  chain DOCKER-USER { counter return; }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    counter jump DOCKER-USER
    oifname "docker0" ct state related,established counter accept
    iifname "docker0" oifname != "docker0" counter accept
  }
}
"""
UFW = """
table ip6 filter {
  chain ufw6-user-forward { }
  chain FORWARD {
    type filter hook forward priority filter; policy drop;
    counter jump ufw6-user-forward
  }
}
"""
FIREWALLD = """
table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority 10; policy accept;
    ct state { established, related } accept
    iifname "lo" accept
    reject with icmpx admin-prohibited
  }
}
"""
OWN = """
table inet mine {
  chain forward {
    type filter hook forward priority 0; policy drop;
    tcp dport 80 ip saddr 10.0.0.0/8 accept
    ip daddr 10.0.0.0/8 accept
  }
}
"""


def nft_only(desired: Desired = DESIRED) -> list[foreign.Problem]:
    return foreign.examine(nft.list_chains(), nft.list_table, desired)


@pytest.mark.parametrize(
    ("table", "what", "fix"),
    [
        (
            DOCKER,
            "chain FORWARD of table ip filter drops by its policy",
            "iptables -I DOCKER-USER -s 10.160.1.0/24 -j ACCEPT && "
            "iptables -I DOCKER-USER -d 10.160.1.0/24 -j ACCEPT",
        ),
        (
            DOCKER.replace("DOCKER-USER", "other"),
            "chain FORWARD of table ip filter drops by its policy",
            "iptables -I FORWARD -s 10.160.1.0/24 -j ACCEPT && "
            "iptables -I FORWARD -d 10.160.1.0/24 -j ACCEPT",
        ),
        (
            UFW,
            "chain FORWARD of table ip6 filter drops by its policy",
            "ufw route allow from fd00:0:0:1::/64 && ufw route allow to fd00:0:0:1::/64",
        ),
        (
            FIREWALLD,
            "chain filter_FORWARD of table inet firewalld drops by its last rule",
            "firewall-cmd --permanent --zone=trusted --add-interface=crossedge0 --add-source=10.160.1.0/24 "
            "--add-source=fd00:0:0:1::/64 && firewall-cmd --reload",
        ),
    ],
    ids=["docker", "iptables", "ufw", "firewalld"],
)
def test_who_drops_and_what_helps_is_told(table: str, what: str, fix: str) -> None:
    nft.apply(table)
    assert nft_only() == [foreign.Problem(f"{what} what is forwarded to and from our pods", fix)]


def test_the_named_fix_of_a_plain_table_works() -> None:
    nft.apply(OWN)
    (problem,) = nft_only()
    assert problem.fix.count("nft insert rule inet mine forward ip saddr 10.160.1.0/24 accept") == 1
    for command in problem.fix.split(" && "):
        subprocess.run(command.split(), check=True)
    assert nft_only() == []


@pytest.mark.parametrize(
    "rule",
    [
        'iifname "crossedge0" accept; oifname "crossedge0" accept',
        'iifname { "crossedge0", "a0" } counter accept; oifname { "crossedge0", "a0" } counter accept',
        "ip saddr 10.160.0.0/16 accept; ip daddr { 10.160.0.0/16, 10.9.0.0/16 } accept",
    ],
)
def test_what_lets_our_pods_pass_is_no_problem(rule: str) -> None:
    nft.apply(DOCKER)
    for each in rule.split("; "):
        nft.apply(f"insert rule ip filter DOCKER-USER {each}")
    assert nft_only() == []


@pytest.mark.parametrize(
    "rule",
    [
        'iifname "crossedge0" accept',
        'oifname "crossedge0" tcp dport 80 accept; iifname "crossedge0" accept',
        "ip saddr 10.160.1.0/25 accept; ip daddr 10.160.1.0/24 accept",
        'iifname != "crossedge0" accept; oifname "crossedge0" accept',
    ],
)
def test_what_lets_only_a_part_pass_is_not_enough(rule: str) -> None:
    nft.apply(DOCKER)
    for each in rule.split("; "):
        nft.apply(f"insert rule ip filter DOCKER-USER {each}")
    assert len(nft_only()) == 1


def test_what_does_not_concern_our_pods_is_not_told() -> None:
    nft.apply(DOCKER + UFW)
    nft.apply("table ip input { chain input { type filter hook input priority 0; policy drop; }; }")
    nft.apply("table bridge b { chain forward { type filter hook forward priority 0; policy drop; }; }")
    nft.apply("table ip open { chain forward { type filter hook forward priority 5; tcp dport 1 drop; }; }")
    nft.apply(firewall.build(DESIRED).script())
    assert len(nft_only()) == 2
    assert nft_only(Desired()) == []


@pytest.mark.asyncio
async def test_the_report_tells_a_firewall_as_it_comes_and_goes(namespace: Namespace) -> None:
    state = HostState(DESIRED)
    state.start(asyncio.get_running_loop())
    assert state.report()["problems"] == []
    nft.apply(DOCKER)
    async with asyncio.timeout(5):
        while not state.report()["problems"]:
            await asyncio.sleep(0.02)
    (problem,) = state.report()["problems"]
    assert "table ip filter drops" in problem["what"]
    assert "DOCKER-USER" in problem["fix"]
    nft.apply("delete table ip filter")
    await state.refresh()
    assert state.report()["problems"] == []
    state.close()


@pytest.mark.tool("iptables-nft")
@pytest.mark.parametrize("version", [4, 6])
def test_the_named_fix_of_iptables_works(version: int) -> None:
    program = "iptables" if version == 4 else "ip6tables"
    subprocess.run([f"{program}-nft", "-P", "FORWARD", "DROP"], check=True)
    subprocess.run(
        [f"{program}-nft", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT"],
        check=True,
    )
    (problem,) = nft_only()
    assert f"table {'ip' if version == 4 else 'ip6'} filter drops by its policy" in problem.what
    for command in problem.fix.split(" && "):
        subprocess.run(command.replace(program, f"{program}-nft").split(), check=True)
    assert nft_only() == []


@pytest.mark.tool("iptables-legacy")
@pytest.mark.parametrize("version", [4, 6])
def test_the_old_iptables_is_read_from_the_kernel(version: int) -> None:
    assert xtables.forward_chain(version) is None
    program = "iptables-legacy" if version == 4 else "ip6tables-legacy"

    def run(arguments: str) -> None:
        subprocess.run([program, *arguments.split()], check=True)

    run("-P FORWARD DROP")
    run("-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT")
    run("-A FORWARD -i other0 -p tcp --dport 80 -j ACCEPT")
    run("-A FORWARD -s 10.160.1.0/24 -p tcp -j ACCEPT" if version == 4 else "-A FORWARD -p tcp -j ACCEPT")
    run("-A FORWARD ! -i crossedge0 -j ACCEPT")
    run("-A FORWARD -i crossedge0 -o other0 -j ACCEPT")
    run("-A INPUT -i crossedge0 -j DROP")
    chain = xtables.forward_chain(version)
    assert chain is not None
    assert chain.policy == xtables.DROP
    assert [(rule.input, rule.output) for rule in chain.rules if rule.accept and rule.input] == [
        ("crossedge0", "other0")
    ]
    (problem,) = foreign.find(DESIRED)
    assert problem.what.startswith(f"the FORWARD chain of {program} drops by its policy")
    for command in problem.fix.split(" && "):
        subprocess.run(command.split(), check=True)
    assert foreign.find(DESIRED) == []
    run("-F FORWARD")
    for direction in ("-i", "-o"):
        assert len(foreign.find(DESIRED)) == 1
        run(f"-A FORWARD {direction} crossedge0 -j ACCEPT")
    assert foreign.find(DESIRED) == []
    run("-F FORWARD")
    run("-P FORWARD ACCEPT")
    assert foreign.find(DESIRED) == []
