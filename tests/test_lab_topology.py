"""Topology files: what is wrong is named by file and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossedge.lab.topology import load_topology, named_topologies, parse_topology
from crossedge.wire.errors import ConfigError

REGION = 'name = "x"\n[[region]]\nname = "a"\n'


@pytest.mark.parametrize("name", sorted(named_topologies()))
def test_topologies_that_come_with_the_lab_are_good(name: str) -> None:
    assert load_topology(name).node


def test_the_demo_is_six_nodes_in_two_regions_behind_five_nats() -> None:
    plan = load_topology("demo")
    nodes = [node for node in plan.node if node.role == "node"]
    nats = {tuple(router.name for router in plan.routers_above(node)) for node in nodes}
    kinds = [router.nat for router in plan.router]
    assert len(nodes) == 6
    assert {plan.region_of(node) for node in nodes} == {"harbour", "highland"}
    assert len(nats) == 5
    assert all(nats)
    assert sum(len(above) == 2 for above in nats) == 1
    assert kinds.count("kernel") >= 2
    assert sum(node.ipv6 for node in nodes) == 2


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ('[[node]]\nname = "n"\nregion = "a"\ncolour = "red"', "node.0.colour", "a known key (ipv6, link,"),
        ('[[node]]\nname = "n"', "node.0", 'either "region" or "router"'),
        ('[[node]]\nname = "n"\nregion = "b"', "node.0.region", "one of a, got 'b'"),
        ('[[node]]\nname = "n"\nrouter = "r"', "node.0.router", "one of no routers, got 'r'"),
        ('[[node]]\nname = "N"\nregion = "a"', "node.0.name", "match pattern"),
        ('[[node]]\nname = "pod-x"\nregion = "a"', "node.0.name", "a name that does not begin with"),
        ('[[router]]\nname = "r"\nregion = "a"\nnat = "odd"', "router.0.nat", "one of kernel,"),
        ('[[router]]\nname = "r"\nregion = "a"\nnat = "firewall"', "router.0.nat", "one of kernel,"),
        ('[[router]]\nname = "r"\nregion = "a"\nlan = "8.8.8.0/24"', "router.0.lan", "a private IPv4 prefix"),
        ('[[router]]\nname = "r"\nbehind = "r"', "router.0.behind", "no circle of routers"),
        ('[[router]]\nname = "r"\nregion = "a"\nlink = { loss = 1.5 }', "router.0.link.loss", "less than 1"),
        ('[[backbone]]\nbetween = ["a", "b"]', "backbone.0.between", "names of regions, got 'b'"),
        ('[[backbone]]\nbetween = ["a", "a"]', "backbone.0.between", "two different regions"),
        (
            '[[router]]\nname = "r"\nregion = "a"\n[[node]]\nname = "r"\nregion = "a"',
            "node.0.name",
            "a name used once",
        ),
        (
            '[[router]]\nname = "r"\nregion = "a"\n[[node]]\nname = "n"\nrouter = "r"\nipv6 = true',
            "node.0.ipv6",
            "false, as router r has no IPv6",
        ),
    ],
)
def test_a_mistake_is_named_by_file_and_key(text: str, key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_topology(REGION + text, "lab.toml")
    assert str(caught.value).startswith(f"lab.toml: {key}: expected ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_name_are_told() -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: expected a readable TOML file"):
        load_topology("none.toml")
    with pytest.raises(ConfigError, match=r"cheese: expected a \.toml file or one of demo"):
        load_topology("cheese")


def test_a_file_is_read_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(REGION + '[[node]]\nname = "n"\nregion = "a"\n')
    assert load_topology(str(path)).node[0].name == "n"
