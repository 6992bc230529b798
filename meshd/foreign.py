"""Other people's firewalls: who drops what is forwarded to and from our pods, and how to let it pass.

A packet that is forwarded goes through the forward hook of every table, so that what our own table accepts
may still be dropped by Docker's, ufw's or firewalld's. Their tables are not ours to change: this finds them
and names the fix.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from crossedge.host import nft, xtables
from crossedge.host.netlink import Network
from crossedge.meshd import firewall
from crossedge.meshd.desired import Desired, contains

VERSIONS = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
Listing = Sequence[tuple[str, Mapping[str, Any]]]


class Problem(NamedTuple):
    """Something about this host that the one who runs it should know."""

    what: str
    fix: str


def find(desired: Desired) -> list[Problem]:
    """Return who drops what is forwarded for our pods, in nftables and in what is left of iptables.

    Runs nft, in the calling thread's namespace; raises `NftError`.
    """
    problems = examine(nft.list_chains(), nft.list_table, desired)
    for version in sorted({prefix.version for prefix in desired.pods}):
        legacy = xtables.forward_chain(version)
        if legacy is None or legacy.policy != xtables.DROP:
            continue
        pods = [prefix for prefix in desired.pods if prefix.version == version]
        if not all(_passes(legacy, desired.tun, prefix) for prefix in pods):
            program = "iptables-legacy" if version == 4 else "ip6tables-legacy"
            what = (
                f"the FORWARD chain of {program} drops by its policy what is forwarded to and from our pods"
            )
            problems.append(Problem(what, _iptables(program, "FORWARD", pods)))
    return problems


def _passes(chain: xtables.Chain, tun: str, pods: Network) -> bool:
    enter = leave = False
    for rule in chain.rules:
        if not rule.accept or sum(map(bool, (rule.input, rule.output, rule.source, rule.to))) != 1:
            continue
        enter = enter or rule.input == tun or (rule.to is not None and contains(rule.to, pods))
        leave = leave or rule.output == tun or (rule.source is not None and contains(rule.source, pods))
    return enter and leave


def examine(
    chains: Iterable[Mapping[str, Any]], list_table: Callable[[str, str], Listing | None], desired: Desired
) -> list[Problem]:
    """Return the chains of other tables that drop what is forwarded, and do not let our pods pass.

    `chains` are all chains without their rules; `list_table` (family, name) is called for the suspicious
    tables.
    """
    problems = []
    for chain in chains:
        family, table = str(chain.get("family")), str(chain.get("table"))
        if chain.get("hook") != "forward" or (family, table) == (firewall.FAMILY, firewall.TABLE):
            continue
        pods = [prefix for prefix in desired.pods if prefix.version in VERSIONS.get(family, ())]
        listed = list_table(family, table) if pods else None
        if listed is None:
            continue
        rules = [entry for kind, entry in listed if kind == "rule"]
        how = _drops(chain, [rule for rule in rules if rule.get("chain") == chain.get("name")])
        if how and not all(_let_through(rules, desired.tun, prefix) for prefix in pods):
            who = f"chain {chain['name']} of table {family} {table} drops {how}"
            problems.append(
                Problem(
                    f"{who} what is forwarded to and from our pods",
                    _fix(family, table, chain, listed, desired.tun, pods),
                )
            )
    return problems


def _drops(chain: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> str:
    """Return how a chain drops what none of its rules let through; "" if it does not."""
    if chain.get("policy") == "drop":
        return "by its policy"
    last = rules[-1].get("expr", []) if rules else []
    if any("drop" in each or "reject" in each for each in last) and not _conditions(last):
        return "by its last rule"
    return ""


def _conditions(expressions: Iterable[Mapping[str, Any]]) -> list[Any]:
    """Return what a rule asks for: its matches, and what nft does not know (extensions of iptables)."""
    harmless = {"counter", "accept", "drop", "reject", "jump", "goto", "return", "log", "comment"}
    return [each for each in expressions if not each.keys() & harmless]


def _let_through(rules: Iterable[Mapping[str, Any]], tun: str, pods: Network) -> bool:
    """Tell whether some rules accept all that comes for, and some all that comes from, our pods."""
    enter = leave = False
    for rule in rules:
        expressions = rule.get("expr", [])
        if not any(_accepts(each) for each in expressions):
            continue
        matches = [_match(condition) for condition in _conditions(expressions)]
        if len(matches) != 1:
            continue
        what, values = matches[0]
        if what in ("iifname", "oifname"):
            met = tun in values
        else:
            met = any(contains(network, pods) for network in _networks(values))
        enter = enter or (met and what in ("iifname", "daddr"))
        leave = leave or (met and what in ("oifname", "saddr"))
    return enter and leave


def _accepts(expression: Mapping[str, Any]) -> bool:
    if "accept" in expression:
        return True
    verdict = expression.get("goto") or expression.get(
        "jump"
    )  # firewalld sends what it trusts to chains of that name
    return isinstance(verdict, dict) and "trusted" in str(verdict.get("target"))


def _match(condition: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return what a condition compares ("iifname", "saddr"...) and with what values; "" for others."""
    match condition:
        case {"match": {"op": "==" | "in", "left": {"meta": {"key": str(key)}}, "right": right}}:
            return key, _values(right)
        case {"match": {"op": "==" | "in", "left": {"payload": {"field": str(field)}}, "right": right}}:
            return field, _values(right)
    return "", []


def _values(right: Any) -> list[Any]:
    if isinstance(right, dict) and isinstance(right.get("set"), list):
        return list(right["set"])
    return [right]


def _networks(values: Iterable[Any]) -> list[Network]:
    found: list[Network] = []
    for value in values:
        match value:
            case {"prefix": {"addr": str(address), "len": int(length)}}:
                text = f"{address}/{length}"
            case str():
                text = value
            case _:
                continue
        try:
            found.append(ipaddress.ip_network(text))
        except ValueError:
            continue
    return found


def _fix(
    family: str, table: str, chain: Mapping[str, Any], listed: Listing, tun: str, pods: Sequence[Network]
) -> str:
    names = {entry.get("name") for kind, entry in listed if kind == "chain"}
    if table == "firewalld":
        sources = " ".join(f"--add-source={prefix}" for prefix in pods)
        trust = f"firewall-cmd --permanent --zone=trusted --add-interface={tun} {sources}"
        return f"{trust} && firewall-cmd --reload"
    ufw = {"ip": "ufw-user-forward", "ip6": "ufw6-user-forward"}.get(family)
    if ufw in names:
        return " && ".join(f"ufw route allow from {prefix} && ufw route allow to {prefix}" for prefix in pods)
    if table == "filter" and chain["name"] == "FORWARD" and family in ("ip", "ip6"):
        program = "iptables" if family == "ip" else "ip6tables"
        return _iptables(program, "DOCKER-USER" if "DOCKER-USER" in names else "FORWARD", pods)
    commands = []
    for prefix in pods:
        header = "ip" if prefix.version == 4 else "ip6"
        where = f"nft insert rule {family} {table} {chain['name']} {header}"
        commands += [f"{where} saddr {prefix} accept", f"{where} daddr {prefix} accept"]
    return " && ".join(commands)


def _iptables(program: str, chain: str, pods: Iterable[Network]) -> str:
    return " && ".join(
        f"{program} -I {chain} {direction} {prefix} -j ACCEPT"
        for prefix in pods
        for direction in ("-s", "-d")
    )
