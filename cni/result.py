"""Results, in the form of each version of the specification, and results of earlier plugins read back."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from crossedge.cni.spec import BAD_CONFIG, VERSIONS, CniError, Config
from crossedge.host.netlink import Address

FLAT: Final = ("0.1.0", "0.2.0")
"""Versions whose results have one address of each family and no interfaces."""
ROUTE_KEYS: Final = ("dst", "gw")
ROUTE_KEYS_1_1: Final = (*ROUTE_KEYS, "mtu", "advmss", "priority", "table", "scope")


@dataclass(frozen=True, slots=True)
class Result:
    """A success result (section "ADD Success"), whatever its version: plain JSON values as 1.1.0 has them."""

    interfaces: list[dict[str, Any]] = field(default_factory=list)
    ips: list[dict[str, Any]] = field(default_factory=list)
    routes: list[dict[str, Any]] = field(default_factory=list)
    dns: dict[str, Any] = field(default_factory=dict)

    def encode(self, version: str) -> bytes:
        """Return it as JSON in the form of a version."""
        found: dict[str, Any] = {"cniVersion": version}
        if version in FLAT:
            self._flat(found)
        else:
            late = version == "1.1.0"
            keys = ROUTE_KEYS_1_1 if late else ROUTE_KEYS
            found["interfaces"] = [
                {key: value for key, value in each.items() if late or key in ("name", "mac", "sandbox")}
                for each in self.interfaces
            ]
            found["ips"] = [self._ip(each, version) for each in self.ips]
            found["routes"] = [
                {key: value for key, value in each.items() if key in keys} for each in self.routes
            ]
        found["dns"] = self.dns
        return json.dumps(found).encode() + b"\n"

    @staticmethod
    def _ip(each: Mapping[str, Any], version: str) -> dict[str, Any]:
        found = {key: value for key, value in each.items() if key != "version"}
        if VERSIONS.index(version) < VERSIONS.index("1.0.0"):
            found["version"] = str(ipaddress.ip_interface(each["address"]).version)
        return found

    def _flat(self, found: dict[str, Any]) -> None:
        for each in self.ips:
            family = ipaddress.ip_interface(each["address"]).version
            if f"ip{family}" in found:
                continue
            flat: dict[str, Any] = {"ip": each["address"]}
            if "gateway" in each:
                flat["gateway"] = each["gateway"]
            flat["routes"] = [
                {key: value for key, value in route.items() if key in ROUTE_KEYS}
                for route in self.routes
                if ipaddress.ip_network(route["dst"]).version == family
            ]
            found[f"ip{family}"] = flat


def previous(config: Config, *, required: bool = False) -> Result | None:
    """Return the result of the plugin before us, None where there is none.

    Raises:
        CniError: code 7, it is required and missing, or cannot be used.
    """
    raw = config.data.get("prevResult")
    if raw is None:
        if required:
            raise CniError(BAD_CONFIG, "required prevResult missing")
        return None
    try:
        return _parse(raw)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise CniError(BAD_CONFIG, f"prevResult cannot be used: {error}") from None


def _parse(raw: Mapping[str, Any]) -> Result:
    dns = dict(raw.get("dns") or {})
    if "ip4" in raw or "ip6" in raw:
        flat = [raw[key] for key in ("ip4", "ip6") if raw.get(key)]
        return Result(
            [],
            [{"address": each["ip"], **_some(each, "gateway")} for each in flat],
            [dict(route) for each in flat for route in each.get("routes") or []],
            dns,
        )
    ips = [{k: v for k, v in each.items() if k != "version"} for each in raw.get("ips") or []]
    for each in ips:
        ipaddress.ip_interface(each["address"])
    return Result(
        [dict(each) for each in raw.get("interfaces") or []],
        ips,
        [dict(each) for each in raw.get("routes") or []],
        dns,
    )


def _some(mapping: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: mapping[key] for key in keys if mapping.get(key)}


def extended(before: Result | None, ours: Result) -> Result:
    """Return the result of a chain: what came before, with ours behind it."""
    if before is None:
        return ours
    shift = len(before.interfaces)
    return Result(
        before.interfaces + ours.interfaces,
        before.ips + [{**each, "interface": each["interface"] + shift} for each in ours.ips],
        before.routes + ours.routes,
        {**before.dns, **ours.dns},
    )


def addresses(result: Result, sandbox_interface: str) -> list[Address]:
    """Return the addresses that a result gives to an interface in the sandbox (those without one too)."""
    found = []
    for each in result.ips:
        index = each.get("interface")
        if isinstance(index, int) and 0 <= index < len(result.interfaces):
            interface = result.interfaces[index]
            if interface.get("name") != sandbox_interface or not interface.get("sandbox"):
                continue
        found.append(ipaddress.ip_interface(each["address"]).ip)
    return found
