"""Our table of nftables: made of certificates and rules, changed by steps, compared with the kernel."""

import ipaddress
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import pytest

from crossedge.host import nft
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Network
from crossedge.meshd.desired import Desired, InboundRule, PeerRoute
from crossedge.meshd.firewall import build, group_set
from crossedge.meshd.ruleset import Ruleset, counters, parse_elements, without_covered

network = ipaddress.ip_network


def prefixes(*texts: str) -> frozenset[Network]:
    return frozenset(network(text) for text in texts)


DESIRED = Desired(
    pods=(network("10.160.1.0/24"), network("fd00:0:0:1::/64")),
    mesh=(network("10.159.0.0/16"), network("10.160.0.0/12"), network("fd00::/48")),
    inbound=(
        InboundRule("web", "pods", "tcp", InboundRule.ranges(["443", "80-90", "85-100"])),
        InboundRule("any", "host", "icmp"),
        InboundRule("db", "host", "any", InboundRule.ranges(["53"])),
        InboundRule("db", "pods", "udp"),
    ),
    members={
        "web": prefixes("10.160.2.0/24", "fd00:0:0:2::/64"),
        "db": prefixes("10.160.3.0/24", "10.159.0.3/32"),
        "idle": prefixes("10.160.4.0/24"),
    },
)


def rules(ruleset: Ruleset, chain: str) -> list[str]:
    return [rule.text for each in ruleset.chains if each.name == chain for rule in each.rules]


def test_without_rules_every_member_may_reach_pods_and_host() -> None:
    ruleset = build(replace(DESIRED, inbound=()))
    assert rules(ruleset, "inbound_pods")[-1] == "accept"
    assert rules(ruleset, "inbound_host")[-1] == "accept"
    assert not any(name.startswith("group") for name in ruleset.sets)


def test_rules_name_sets_of_the_groups_source_prefixes() -> None:
    ruleset = build(DESIRED)
    web, db = group_set("web"), group_set("db")
    assert rules(ruleset, "inbound_pods")[3:] == [
        f"ip saddr @{web}4 tcp dport {{ 80-100, 443 }} accept",
        f"ip6 saddr @{web}6 tcp dport {{ 80-100, 443 }} accept",
        f"ip saddr @{db}4 meta l4proto udp accept",
        f"ip6 saddr @{db}6 meta l4proto udp accept",
        "counter reject with icmpx admin-prohibited",
    ]
    assert rules(ruleset, "inbound_host")[1:] == [
        "meta l4proto { icmp, ipv6-icmp } accept",
        f"ip saddr @{db}4 meta l4proto {{ tcp, udp }} th dport {{ 53 }} accept",
        f"ip6 saddr @{db}6 meta l4proto {{ tcp, udp }} th dport {{ 53 }} accept",
        "counter reject with icmpx admin-prohibited",
    ]
    assert ruleset.sets[f"{web}6"] == prefixes("fd00:0:0:2::/64")
    assert ruleset.sets[f"{db}4"] == prefixes("10.160.3.0/24", "10.159.0.3/32")
    assert ruleset.sets[f"{db}6"] == frozenset()
    assert group_set("idle") + "4" not in ruleset.sets


def test_rules_for_pods_alone_close_the_host() -> None:
    ruleset = build(replace(DESIRED, inbound=(InboundRule("any", "pods"),)))
    assert rules(ruleset, "inbound_pods")[-2:] == ["accept", "counter reject with icmpx admin-prohibited"]
    assert rules(ruleset, "inbound_host") == [
        "ct state established,related accept",
        "counter reject with icmpx admin-prohibited",
    ]


@pytest.mark.parametrize(
    "bad",
    [
        lambda: InboundRule("g", "pods", "icmp", ((1, 2),)),
        lambda: InboundRule("g", "pods", "tcp", ((0, 2),)),
        lambda: InboundRule("g", "pods", "tcp", ((3, 2),)),
        lambda: InboundRule("g", "pods", "tcp", ((1, 65536),)),
        lambda: InboundRule("g", cast(Any, "lan")),
        lambda: InboundRule("g", "pods", cast(Any, "sctp")),
        lambda: InboundRule.ranges(["http"]),
        lambda: build(Desired(tun='x" drop')),
    ],
)
def test_what_makes_no_sense_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError):
        bad()


def test_group_names_make_distinct_harmless_set_names() -> None:
    names = {group_set(name) for name in ("web", "WEB", "web!", "w e b", "ü", "x" * 64, "x" * 63, '"; drop')}
    assert len(names) == 8
    assert all(name.isascii() and name.replace("_", "").isalnum() and len(name) < 50 for name in names)


def test_a_member_that_joins_or_leaves_costs_a_few_elements() -> None:
    before = build(DESIRED)
    members = {**DESIRED.members, "web": prefixes("10.160.2.0/24", "10.160.9.0/24")}
    after = build(replace(DESIRED, members=members))
    web = group_set("web")
    assert after.delta(before) == (
        f"delete element inet crossedge {web}6 {{ fd00:0:0:2::/64 }}\n"
        f"add element inet crossedge {web}4 {{ 10.160.9.0/24 }}"
    )
    assert after.delta(after) == ""
    assert build(DESIRED).delta(before) == ""
    assert build(replace(DESIRED, inbound=DESIRED.inbound[:2])).delta(before) is None
    assert build(replace(DESIRED, mtu=1280)).delta(before) is None


def test_prefixes_outside_the_mesh_go_through_the_tun_but_are_no_mesh_sources() -> None:
    stock = frozenset({PeerRoute(network("172.16.0.0/24")), PeerRoute(network("10.160.7.0/24"))})
    ruleset = build(replace(DESIRED, stock=stock))
    assert ruleset.sets["through4"] - ruleset.sets["mesh4"] == prefixes("172.16.0.0/24")


def test_covered_prefixes_are_left_out_and_neighbours_kept_apart() -> None:
    given = prefixes("10.0.0.0/24", "10.0.0.128/25", "10.0.1.0/24", "10.0.0.0/32", "::/0", "fd00::/8")
    assert without_covered(given) == {4: prefixes("10.0.0.0/24", "10.0.1.0/24"), 6: prefixes("::/0")}


def test_elements_are_read_in_all_their_forms() -> None:
    shown = [
        "10.0.0.1",
        {"prefix": {"addr": "10.1.0.0", "len": 16}},
        {"range": ["10.2.0.0", "10.2.0.2"]},
        {"elem": {"val": {"prefix": {"addr": "fd00::", "len": 48}}, "timeout": 5}},
        {"range": ["fd01::", "fd01::1"]},
    ]
    expected = prefixes("10.0.0.1/32", "10.1.0.0/16", "10.2.0.0/31", "10.2.0.2/32", "fd00::/48", "fd01::/127")
    assert set(parse_elements(shown)) == expected
    for bad in ({"concat": []}, {"range": ["10.0.0.1", "fd00::"]}, 5):
        with pytest.raises(ValueError):
            parse_elements([bad])


class TestInTheKernel:
    pytestmark = pytest.mark.namespaces

    @pytest.fixture(autouse=True)
    def inside(self) -> Iterator[None]:
        namespace = Namespace.anonymous()
        with namespace:
            yield
        namespace.close()

    @staticmethod
    def differences(ruleset: Ruleset) -> list[str]:
        return ruleset.differences(nft.list_table("inet", "crossedge"))

    def test_the_kernel_has_what_was_applied(self) -> None:
        ruleset = build(DESIRED)
        assert self.differences(ruleset) == ["the table is gone"]
        nft.apply(ruleset.script())
        assert self.differences(ruleset) == []
        nft.apply(ruleset.script())  # over the old one
        assert self.differences(ruleset) == []
        assert counters(nft.list_table("inet", "crossedge") or []) == {
            "spoofed": 0,
            "leak": 0,
            "not-our-pod": 0,
            "refused-pods": 0,
            "refused-host": 0,
        }

    def test_a_thousand_members_are_set_and_changed_in_a_transaction_each(self) -> None:
        many = frozenset(network(f"10.{164 + i // 256}.{i % 256}.0/24") for i in range(1000))
        more = many | frozenset(network(f"fd00:0:0:{i:x}::/64") for i in range(256, 1256))
        before = build(replace(DESIRED, members={"web": many}))
        after = build(replace(DESIRED, members={"web": more - prefixes("10.164.7.0/24")}))
        nft.apply(before.script())
        delta = after.delta(before)
        assert delta is not None
        nft.apply(delta)
        assert self.differences(after) == []
        assert self.differences(before) != []

    def test_a_prefix_is_replaced_by_parts_of_it_and_back(self) -> None:
        whole = build(replace(DESIRED, members={"web": prefixes("10.164.0.0/16")}))
        parts = build(replace(DESIRED, members={"web": prefixes("10.164.1.0/24", "10.164.2.0/24")}))
        nft.apply(whole.script())
        for before, after in ((whole, parts), (parts, whole)):
            delta = after.delta(before)
            assert delta is not None
            nft.apply(delta)
            assert self.differences(after) == []

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ("flush chain inet crossedge input", ["rules of chain input are not ours"]),
            ("add rule inet crossedge input accept", ["rules of chain input are not ours"]),
            ("add chain inet crossedge input { policy drop; }", ["chain input hooks in otherwise"]),
            ("add chain inet crossedge extra", ["chain extra is not ours"]),
            ("add set inet crossedge extra { type ipv4_addr; }", ["set extra is not ours"]),
            ("flush set inet crossedge pods4", ["elements of set pods4 are not ours"]),
            ("add element inet crossedge pods4 { 10.9.0.0/24 }", ["elements of set pods4 are not ours"]),
            ("delete table inet crossedge", ["the table is gone"]),
        ],
    )
    def test_each_change_is_told(self, change: str, told: list[str]) -> None:
        ruleset = build(DESIRED)
        nft.apply(ruleset.script())
        nft.apply(change)
        assert self.differences(ruleset) == told
        nft.apply(ruleset.script())
        assert self.differences(ruleset) == []

    def test_no_other_table_is_touched(self) -> None:
        nft.apply("table ip other { chain forward { type filter hook forward priority 0; policy drop; }; }")
        before = nft.list_table("ip", "other")
        nft.apply(build(DESIRED).script())
        nft.apply("delete table inet crossedge")
        assert nft.list_table("ip", "other") == before
