"""The underlays of tests with real daemons, put together from their parts; a test states what is its own.

two_regions("restart", HOME, FARM, node("yard", WEST))

east ---- meeting                        the rendezvous
  '------ home (kernel NAT) ---- attic
west ---- farm (port-restricted) ---- barn
  '------ yard
"""

from __future__ import annotations

import json
from collections.abc import Mapping

EAST, WEST = "east", "west"
DELAY_MS = 5
"""From one region to the other."""


def _written(value: object) -> str:
    """Return a value as TOML: an inline table, or what JSON writes in the same way."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_written(each)}" for key, each in value.items()) + " }"
    return json.dumps(value)


def _table(kind: str, **fields: object) -> str:
    return "\n".join([f"[[{kind}]]", *(f"{key} = {_written(value)}" for key, value in fields.items()), ""])


def underlay(name: str, *parts: str) -> str:
    """Return the text of a topology."""
    return "".join([f"name = {json.dumps(name)}\n", *parts])


def region(name: str) -> str:
    """Return a part: a place that nodes and routers are in."""
    return _table("region", name=name)


def backbone(a: str, b: str, **link: object) -> str:
    """Return a part: the line between two regions."""
    return _table("backbone", between=[a, b], link=link)


def node(name: str, place: str = EAST, **fields: object) -> str:
    """Return a part: a node with a public address."""
    return _table("node", name=name, region=place, **fields)


def serving(name: str, place: str = EAST) -> str:
    """Return a part: a node that is no member of the mesh, as a rendezvous is."""
    return node(name, place, role="server")


def inside(router: str, name: str, **fields: object) -> str:
    """Return a part: a node in the LAN of a router."""
    return _table("node", name=name, router=router, **fields)


def behind(router: str, *names: str, place: str = EAST, nat: str = "kernel", **fields: object) -> str:
    """Return a part: a router with a NAT, and the nodes in its LAN; `fields` are the router's."""
    nodes = [inside(router, name) for name in names]
    return "".join([_table("router", name=router, region=place, nat=nat, **fields), *nodes])


HOME = behind("home", "attic")
FARM = behind("farm", "barn", place=WEST, nat="port-restricted")
MEETING = serving("meeting")


def two_regions(name: str, *parts: str, servers: str = MEETING) -> str:
    """Return an underlay of two regions; its rendezvous, unless told otherwise, is `meeting` in the east."""
    return underlay(
        name, region(EAST), region(WEST), backbone(EAST, WEST, delay_ms=DELAY_MS), servers, *parts
    )
