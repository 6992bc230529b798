"""The CNI specification: variables, network configuration, versions and error codes.

Section names are those of the specification, versions 0.3.1 to 1.1.0. What comes in here is written by
others; whatever is wrong with it is one `CniError` with the specification's code.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from crossedge.host.netlink import Address, Network

VERSIONS: Final = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST: Final = VERSIONS[-1]
SINCE: Final = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
"""The version that introduced an operation."""

INCOMPATIBLE_VERSION: Final = 1
UNSUPPORTED_FIELD: Final = 2
UNKNOWN_CONTAINER: Final = 3
BAD_ENVIRONMENT: Final = 4
IO_FAILURE: Final = 5
UNDECODABLE: Final = 6
BAD_CONFIG: Final = 7
BAD_NAMESPACE: Final = 8
TRY_LATER: Final = 11
UNAVAILABLE: Final = 50
IMPAIRED: Final = 51
EXISTS: Final = 100
"""Ours: the interface, or the attachment, exists already."""
KERNEL: Final = 101
"""Ours: the kernel refused what we asked for."""
CHANGED: Final = 102
"""Ours: CHECK found something missing or changed."""
INCOMPLETE: Final = 103
"""Ours: GC could not free all that it should."""
REFUSED: Final = 104
"""Ours: whoever runs the plugin may not; the shim says so too."""

COMMANDS: Final = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")
REQUIRED: Final = {
    "CNI_CONTAINERID": ("ADD", "CHECK", "DEL"),
    "CNI_NETNS": ("ADD", "CHECK"),
    "CNI_IFNAME": ("ADD", "CHECK", "DEL"),
}
"""Which operations cannot do without a variable."""
ARGUMENTS: Final = frozenset(
    {
        "IgnoreUnknown",
        "IP",
        "MAC",
        "K8S_POD_NAMESPACE",
        "K8S_POD_NAME",
        "K8S_POD_UID",
        "K8S_POD_INFRA_CONTAINER_ID",
    }
)
"""Keys of CNI_ARGS that we know."""
NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*\Z")
MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}\Z")
NAME_LIMIT: Final = 15  # IFNAMSIZ without its zero byte
CONFIG_LIMIT: Final = 4 * 1024 * 1024
"""Largest configuration in bytes: GC names every attachment of a node."""


class CniError(Exception):
    """An operation that failed, as section "Error" has it: `code`, `message`, `details`."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def encode(self, version: str = NEWEST) -> bytes:
        """Return the error as JSON, in one line."""
        found: dict[str, Any] = {"cniVersion": version, "code": self.code, "msg": self.message}
        if self.details:
            found["details"] = self.details
        return json.dumps(found).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Environment:
    """The variables of a request, checked against what its operation needs."""

    command: str
    container: str
    netns: str
    """Path of the network namespace; may be empty for DEL."""
    interface: str
    arguments: str
    """CNI_ARGS as it stands."""


def parse_environment(variables: Mapping[str, str]) -> Environment:
    """Return the checked variables.

    Raises:
        CniError: code 4, naming every variable that is missing, or the one that cannot be used.
    """
    command = variables.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise CniError(BAD_ENVIRONMENT, f"unknown CNI_COMMAND: {command!r}", "one of " + ", ".join(COMMANDS))
    missing = [name for name, needed in REQUIRED.items() if command in needed and not variables.get(name)]
    if missing:
        raise CniError(
            BAD_ENVIRONMENT,
            f"required env variables [{','.join(missing)}] missing",
            f"{command} needs {', '.join(n for n, needed in REQUIRED.items() if command in needed)}",
        )
    return Environment(
        command,
        variables.get("CNI_CONTAINERID", ""),
        variables.get("CNI_NETNS", ""),
        variables.get("CNI_IFNAME", ""),
        variables.get("CNI_ARGS", ""),
    )


def check_names(environment: Environment) -> None:
    """Check container id and interface name; `CniError` code 4."""
    if environment.command not in REQUIRED["CNI_CONTAINERID"]:
        return
    if not NAME.match(environment.container):
        raise CniError(
            BAD_ENVIRONMENT,
            f"invalid CNI_CONTAINERID {environment.container!r}",
            "letters, digits, '_', '.' and '-', the first a letter or digit",
        )
    name = environment.interface
    why = ""
    if len(name.encode(errors="surrogateescape")) > NAME_LIMIT:
        why = f"longer than {NAME_LIMIT} bytes"
    elif name in (".", ".."):
        why = "'.' and '..' are no names"
    elif any(letter in "/:" or letter.isspace() for letter in name):
        why = "it holds a slash, colon or space"
    if why:
        raise CniError(BAD_ENVIRONMENT, f"invalid CNI_IFNAME {name!r}: {why}")


@dataclass(frozen=True, slots=True)
class Config:
    """The network configuration of one plugin, as it comes on stdin."""

    version: str
    name: str
    data: Mapping[str, Any]
    """All of it."""

    def section(self, *keys: str) -> Mapping[str, Any]:
        """Return a nested object, an empty one where there is none; code 7 where it is no object."""
        found: Any = self.data
        for key in keys:
            found = found.get(key)
            if found is None:
                return {}
            if not isinstance(found, dict):
                raise CniError(BAD_CONFIG, f"{'.'.join(keys)} in the network configuration is no object")
        return dict(found)


def parse_config(stdin: bytes) -> Config:
    """Return the configuration, with name and version checked.

    Raises:
        CniError: code 6 (no JSON object), 7 (bad or missing name), 1 (a version that we do not know).
    """
    try:
        data = json.loads(stdin)
    except (ValueError, RecursionError) as error:
        raise CniError(UNDECODABLE, f"the network configuration is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise CniError(UNDECODABLE, "the network configuration is no JSON object")
    version = data.get("cniVersion") or "0.1.0"  # what the oldest runtimes do not say
    if version not in VERSIONS:
        raise CniError(
            INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f"config is {json.dumps(version)}, plugin supports {json.dumps(VERSIONS)}",
        )
    name = data.get("name")
    if not isinstance(name, str) or not name:
        raise CniError(BAD_CONFIG, "missing network name: the network configuration has no name")
    if not NAME.match(name):
        raise CniError(BAD_CONFIG, f"invalid network name {name!r}")
    return Config(str(version), name, data)


def check_version(command: str, version: str) -> None:
    """Check that an operation exists in a version; `CniError` code 1."""
    since = SINCE.get(command)
    if since is not None and VERSIONS.index(version) < VERSIONS.index(since):
        raise CniError(
            INCOMPATIBLE_VERSION, f"config version does not allow {command}", f"{version}, needs {since}"
        )


@dataclass(frozen=True, slots=True)
class Wishes:
    """What runtime and configuration ask for, the most specific one of each."""

    addresses: tuple[Address, ...] = ()
    mac: bytes = b""
    dns: Mapping[str, Any] | None = None
    pod: str = ""
    """namespace/name of the Kubernetes pod, if it is one."""


def parse_wishes(environment: Environment, config: Config) -> Wishes:
    """Return what is asked for: runtimeConfig stands above args, args above CNI_ARGS.

    Raises:
        CniError: code 4 (CNI_ARGS), 7 (the configuration).
    """
    arguments = _arguments(environment.arguments)
    args, runtime = config.section("args", "cni"), config.section("runtimeConfig")
    addresses: tuple[Address, ...] = ()
    if text := arguments.get("IP"):
        addresses = _addresses(text.split(","), "IP in CNI_ARGS", BAD_ENVIRONMENT)
    for label, section in (("args.cni.ips", args), ("runtimeConfig.ips", runtime)):
        if listed := section.get("ips"):
            addresses = _addresses(listed, label, BAD_CONFIG)
    mac = b""
    if text := arguments.get("MAC"):
        mac = _mac(text, "MAC in CNI_ARGS", BAD_ENVIRONMENT)
    for label, section in (("args.cni.mac", args), ("runtimeConfig.mac", runtime)):
        if text := section.get("mac"):
            mac = _mac(text, label, BAD_CONFIG)
    names = [arguments[key] for key in ("K8S_POD_NAMESPACE", "K8S_POD_NAME") if key in arguments]
    return Wishes(addresses, mac, _dns(config, runtime), "/".join(names))


def check_ranges(config: Config, prefixes: Collection[Network]) -> None:
    """Check that what the orchestrator believes to be this node's prefixes are those of its certificate.

    Raises:
        CniError: code 2 (runtimeConfig.ipRanges), 7 (podCIDRs of the configuration), naming both.
    """
    ranges = config.section("runtimeConfig").get("ipRanges") or []
    try:
        subnets = [each["subnet"] for group in ranges for each in group]
    except (TypeError, KeyError):
        raise CniError(BAD_CONFIG, "runtimeConfig.ipRanges is no list of lists of {subnet}") from None
    given = config.data.get("podCIDRs") or []
    for code, label, texts in (
        (UNSUPPORTED_FIELD, "runtimeConfig.ipRanges", subnets),
        (BAD_CONFIG, "podCIDRs", given if isinstance(given, list) else [given]),
    ):
        for text in texts:
            try:
                found = ipaddress.ip_network(text)
            except ValueError:
                raise CniError(BAD_CONFIG, f"{label}: {text!r} is no prefix") from None
            if found not in prefixes:
                raise CniError(code, f"{label} {found} is no pod prefix of this node", mismatch(prefixes))


def mismatch(prefixes: Collection[Network]) -> str:
    """Return what is to be said where others believe in other prefixes."""
    return (
        f"its certificate has {', '.join(map(str, prefixes))}: set Node.spec.podCIDRs to that, "
        "and run kube-controller-manager with --allocate-node-cidrs=false"
    )


def _arguments(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, separator, value = pair.partition("=")
        if not separator:
            raise CniError(BAD_ENVIRONMENT, f"invalid pair {pair!r} in CNI_ARGS", "K=V;K=V")
        found[key] = value
    unknown = sorted(found.keys() - ARGUMENTS)
    if unknown and found.get("IgnoreUnknown", "").lower() not in ("1", "true", "t", "yes", "on"):
        raise CniError(BAD_ENVIRONMENT, f"unknown args {unknown} in CNI_ARGS", "IgnoreUnknown=1 allows them")
    return found


def _addresses(listed: object, label: str, code: int) -> tuple[Address, ...]:
    if not isinstance(listed, list):
        raise CniError(code, f"{label} is no list of addresses")
    found: list[Address] = []
    for text in listed:
        try:
            found.append(ipaddress.ip_interface(str(text)).ip)
        except ValueError:
            raise CniError(code, f"{label}: {text!r} is no IP address") from None
    if len({address.version for address in found}) < len(found):
        raise CniError(code, f"{label}: one address of each family at most")
    return tuple(found)


def _mac(text: object, label: str, code: int) -> bytes:
    if not isinstance(text, str) or not MAC.match(text):
        raise CniError(code, f"{label}: {text!r} is no MAC address")
    packed = bytes.fromhex(text.replace(":", ""))
    if packed[0] & 1 or not any(packed):
        raise CniError(code, f"{label}: {text} is no address for an interface")
    return packed


def _dns(config: Config, runtime: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the DNS settings: those of the runtime (capability "dns"), else those of the configuration."""
    given = runtime.get("dns")
    if isinstance(given, dict):
        keys = {"servers": "nameservers", "searches": "search", "options": "options"}
        return {ours: given[theirs] for theirs, ours in keys.items() if given.get(theirs)}
    section = config.section("dns")
    return {key: value for key, value in section.items() if value} or None


def valid_attachments(config: Config) -> set[tuple[str, str]] | None:
    """Return (container id, interface name) of what GC shall keep; None where neither key is there.

    Absent is not empty: libcni leaves an empty list out, so nothing can be told from that. Raises `CniError`
    code 7 for what is no list of attachments.
    """
    for key in ("cni.dev/valid-attachments", "cni.dev/attachments"):
        if key not in config.data:
            continue
        listed = config.data[key]
        if listed is None:
            listed = []  # Go writes an empty slice so
        try:
            return {(str(item["containerID"]), str(item["ifname"])) for item in listed}
        except (TypeError, KeyError):
            raise CniError(BAD_CONFIG, f"{key} is no list of {{containerID, ifname}}") from None
    return None


def version_answer() -> bytes:
    """Return what VERSION prints."""
    return json.dumps({"cniVersion": NEWEST, "supportedVersions": VERSIONS}).encode() + b"\n"
