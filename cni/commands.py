"""What ADD, DEL, CHECK, GC and STATUS do: plain functions over the store and the kernel.

The same code runs in the daemon, where it is warm, and in `local`, when the daemon is down. Each attachment
is held while it is changed, so an ADD waits for the DEL of the same one, whoever runs it.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from crossedge.cni import device, spec
from crossedge.cni.ipam import ADDED, ADDING, GONE, Entry
from crossedge.cni.node import Node
from crossedge.cni.recovery import recover
from crossedge.cni.result import Result, addresses, extended, previous
from crossedge.cni.spec import CniError, Config, Environment
from crossedge.cni.store import Store
from crossedge.host.links import get_link
from crossedge.host.namespaces import Namespace
from crossedge.host.netlink import Netlink

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """Where the operations work."""

    store: Store
    node: Callable[[], Node]
    """What pods get; raises `CniError`."""
    boot: str
    netlink: Callable[[], Netlink]
    """A socket in the host's namespace, for the calling thread alone."""
    own: int
    """Inode of the host's namespace, which is no pod's."""
    reap: Callable[[], None]
    """Has the links deleted that were taken down, now or soon."""
    health: Callable[[], CniError | None]
    """Whether pods can be served (50), and those that run are (51)."""
    kernel: AbstractContextManager[object] = field(default_factory=nullcontext)
    """Held while links are made and changed: the kernel does so one by one, waiting threads spin."""
    owed: set[int] = field(default_factory=set)
    """Serial numbers of attachments that are deleted, though the store could not be told."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request, parsed as far as it goes."""

    environment: Environment
    config: Config
    netns: Namespace | None
    token: str
    since: float | None
    """When the runtime started the plugin, in seconds since boot; None: now."""


def answer(
    host: Host,
    variables: Mapping[str, str],
    stdin: bytes,
    netns: Namespace | None,
    token: str = "",
    since: float | None = None,
) -> tuple[int, bytes]:
    """Return the exit status and what is printed on stdout; raises nothing but for faults of ours.

    Args:
        host: where to work.
        variables: those named CNI_*.
        stdin: the network configuration.
        netns: CNI_NETNS, opened; None where it cannot be.
        token: the same for a request and its repetition.
        since: when the plugin was started, in seconds since boot, if that was before now.
    """
    version = spec.NEWEST
    try:
        environment = spec.parse_environment(variables)
        if environment.command == "VERSION":
            return 0, spec.version_answer()
        config = spec.parse_config(stdin)
        version = config.version
        spec.check_version(environment.command, version)
        spec.check_names(environment)
        request = Request(environment, config, netns, token, since)
        return 0, COMMANDS[environment.command](host, request)
    except CniError as error:
        return 1, error.encode(version)
    except OSError as error:
        return 1, CniError(spec.IO_FAILURE, str(error)).encode(version)


def add(host: Host, request: Request) -> bytes:
    """Give a container an interface; whatever fails half-way is undone. Returns the result."""
    environment, config = request.environment, request.config
    wishes = spec.parse_wishes(environment, config)
    before = previous(config)
    netns = _namespace(host, request)
    node = host.node()
    spec.check_ranges(config, node.prefixes)
    device.require_ipv6(node.prefixes)
    identity = (config.name, environment.container, environment.interface)
    draft = Entry(
        serial=0,
        network=config.name,
        container=environment.container,
        interface=environment.interface,
        addresses=(),
        host=device.host_name(*identity),
        mac=wishes.mac.hex(":") or device.mac_address("pod", *identity),
        host_mac=device.mac_address("host", *identity),
        netns=environment.netns,
        inode=netns.inode,
        boot=host.boot,
        pod=wishes.pod,
        token=request.token,
    )
    with host.store.attachment(draft.key):
        entry = _repeated(host, draft)
        if entry is None:
            entry = _reserve(host, draft, node, wishes)
            _attach(host, entry, netns, node)
    return extended(before, _result(entry, node, wishes)).encode(config.version)


def _repeated(host: Host, draft: Entry) -> Entry | None:
    """Return the attachment if this very request made it already; clear what a killed one left."""
    held = host.store.look().live.get(draft.key)
    if held is None:
        return None
    alive = get_link(host.netlink(), held.host) is not None
    if held.state == ADDED and alive:
        if held.token and held.token == draft.token:
            return held
        return None  # an attachment that exists: `reserve` refuses
    if held.state == ADDED and _lives(held):
        return None
    _release(host, held)
    return None


def _lives(entry: Entry) -> bool:
    try:
        return os.stat(entry.netns).st_ino == entry.inode
    except OSError:
        return False


def _reserve(host: Host, draft: Entry, node: Node, wishes: spec.Wishes) -> Entry:
    """Return the stored reservation; where nothing is left, after a look for what has leaked."""
    try:
        return _try_reserve(host, draft, node, wishes)
    except CniError as error:
        if error.code != spec.TRY_LATER or wishes.addresses:
            raise
    recover(host.store, host.netlink())
    return _try_reserve(host, draft, node, wishes)


def _try_reserve(host: Host, draft: Entry, node: Node, wishes: spec.Wishes) -> Entry:
    with host.store.transaction() as change:
        change.ledger.expire(change.now)
        dated = replace(draft, changed=change.now)
        return change.put(change.ledger.reserve(dated, node.prefixes, wishes.addresses))


def _attach(host: Host, entry: Entry, netns: Namespace, node: Node) -> None:
    with ExitStack() as undo:
        undo.callback(_release, host, entry)
        flush = _Flush(host.store)
        undo.callback(flush.wait)
        with host.kernel:
            device.set_up(host.netlink(), entry, netns, node)
        device.forward({address.version for address in entry.addresses})
        flush.wait()
        with host.store.transaction() as change:
            change.put(replace(entry, state=ADDED, changed=change.now))
        undo.pop_all()


class _Flush:
    """A flush of the store that goes on while the kernel is asked for something else."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._error: CniError | None = None
        self._thread = threading.Thread(target=self._run, name="cni-flush", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._store.sync()
        except CniError as error:
            self._error = error

    def wait(self) -> None:
        """Wait for its end; raises its `CniError`, once."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


def _release(host: Host, entry: Entry) -> None:
    """Turn an entry into a tombstone and cut its link off."""
    with host.store.transaction() as change:
        held = change.ledger.entries.get(entry.serial)
        if held is not None and held.state != GONE:
            change.put(replace(held, state=GONE, changed=change.now))
    device.take_down(host.netlink(), [entry.host])
    host.reap()


def _namespace(host: Host, request: Request) -> Namespace:
    path = request.environment.netns
    if request.netns is None:
        raise CniError(spec.BAD_NAMESPACE, f"CNI_NETNS {path!r} is no network namespace that can be opened")
    if request.netns.inode == host.own:
        raise CniError(spec.BAD_NAMESPACE, f"CNI_NETNS {path!r} is the namespace of the plugin itself")
    return request.netns


def _result(entry: Entry, node: Node, wishes: spec.Wishes) -> Result:
    ips, routes = [], []
    for address in entry.addresses:
        gateway = str(device.GATEWAYS[address.version])
        ips.append({"address": f"{address}/{address.max_prefixlen}", "gateway": gateway, "interface": 1})
        routes.append({"dst": str(device.DEFAULTS[address.version]), "gw": gateway})
    return Result(
        [
            {"name": entry.host, "mac": entry.host_mac, "mtu": node.mtu},
            {"name": entry.interface, "mac": entry.mac, "mtu": node.mtu, "sandbox": entry.netns},
        ],
        ips,
        routes,
        dict(wishes.dns or {}),
    )


def delete(host: Host, request: Request) -> bytes:
    """Take an interface from a container; what is gone already is no error. Returns nothing to print."""
    environment = request.environment
    if request.netns is not None:
        _namespace(host, request)
    key = environment.container, environment.interface
    with ExitStack() as stack:
        entry, flush = None, None
        try:
            stack.enter_context(host.store.attachment(key))
            with host.store.transaction() as change:
                change.ledger.expire(change.now)
                entry = change.ledger.live.get(key)
                if entry is not None:
                    change.put(replace(entry, state=GONE, changed=change.now))
            if entry is not None:
                flush = _Flush(host.store)
        except CniError as error:
            # The runtime would try for ever. The link goes all the same, and when the store can be written
            # again the address is recovered, for its namespace is gone.
            log.error("DEL of %s: %s", "/".join(key), error)
            if entry is not None:
                host.owed.add(entry.serial)
        names = [entry.host] if entry is not None else _unconfigured(host, request)
        if names:
            with host.kernel:
                device.take_down(host.netlink(), names)
        host.reap()  # even so: a killed DEL may have left what it had taken down
        if flush is not None:
            with suppress(CniError):
                flush.wait()
    return b""


def _unconfigured(host: Host, request: Request) -> list[str]:
    """Return links that this attachment may have, though nothing is stored of it."""
    environment = request.environment
    netlink = host.netlink()
    name = device.host_name(request.config.name, environment.container, environment.interface)
    try:
        taken = {entry.host for entry in host.store.look().live.values()}
    except CniError:
        return [name]  # which can be no other's
    names = {name}
    if request.netns is not None:
        found = device.owner(netlink, request.netns, environment.interface)
        if found is not None:
            names.add(found.name)
    links = device.host_links(netlink)
    return [name for name in names if name in links and name not in taken]


def check(host: Host, request: Request) -> bytes:
    """See that an attachment is as ADD left it; raises `CniError` code 102 that names what is not."""
    environment, config = request.environment, request.config
    before = previous(config, required=True)
    netns = _namespace(host, request)
    entry = host.store.look().live.get((environment.container, environment.interface))
    if entry is None or entry.state != ADDED:
        raise CniError(
            spec.UNKNOWN_CONTAINER,
            f"container {environment.container} has no interface {environment.interface} on this node",
        )
    expected = addresses(before, environment.interface) if before is not None else []
    found = [f"{address} is not reserved for it" for address in entry.addresses if address not in expected]
    netlink = host.netlink()
    outside = get_link(netlink, entry.host)
    with netns:
        pod = Netlink()
    with pod:
        inside = get_link(pod, environment.interface)
        if inside is None:
            found.append(f"the sandbox has no interface {environment.interface}")
        else:
            host_mac = entry.host_mac if outside is None else outside.mac
            found += device.pod_differences(pod, inside, entry, host_mac)
    if outside is None:
        found.append(f"the host link {entry.host} is gone")
    else:
        found += device.host_differences(netlink, outside, entry)
    if found:
        raise CniError(spec.CHANGED, found[0], "; ".join(found[1:]))
    return b""


def collect(host: Host, request: Request) -> bytes:
    """Free whatever of this network the runtime does not know; goes on past errors and reports them all."""
    keep = spec.valid_attachments(request.config)
    with host.store.transaction() as change:
        change.ledger.expire(change.now)
        started = change.now if request.since is None else min(request.since, change.now)
        stale = [
            entry
            for entry in change.ledger.live.values()
            if keep is not None and entry.network == request.config.name and entry.key not in keep
        ]
    errors = []
    for entry in stale:
        try:
            with host.store.attachment(entry.key):
                held = host.store.look().live.get(entry.key)
                # What was finished after the runtime wrote its list, and started us, is not on it.
                if held is not None and held.serial == entry.serial and held.changed <= started:
                    _release(host, held)
        except (CniError, OSError) as error:
            errors.append(f"{'/'.join(entry.key)}: {error}")
    try:
        sweep(host)
        recover(host.store, host.netlink())
    except (CniError, OSError) as error:
        errors.append(str(error))
    if errors:
        raise CniError(spec.INCOMPLETE, f"{len(errors)} could not be freed", "; ".join(errors))
    return b""


def sweep(host: Host) -> list[str]:
    """Delete our links at the host's side that no attachment has; return their names."""
    netlink = host.netlink()
    links = device.host_links(netlink)  # before the ledger: what is in it now was stored before its link
    taken = {entry.host for entry in host.store.look().live.values()}
    stale = [name for name in links if name not in taken]
    if stale:
        device.take_down(netlink, stale)
    device.reap(netlink)
    return stale


def settle(host: Host) -> None:
    """Tell the store of what was deleted while it could not be written; raises `CniError`."""
    if not host.owed:
        return
    with host.store.transaction() as change:
        for serial in list(host.owed):
            held = change.ledger.entries.get(serial)
            if held is not None and held.state != GONE:
                change.put(replace(held, state=GONE, changed=change.now))
    host.owed.clear()


def status(host: Host, request: Request) -> bytes:
    """Say whether ADD would work: code 50 if not, 51 if running pods are cut off as well."""
    try:
        node = host.node()
        spec.check_ranges(request.config, node.prefixes)
        device.require_ipv6(node.prefixes)
        host.store.check()
        with host.store.transaction() as change:
            change.ledger.expire(change.now)
            free = change.ledger.available(node.prefixes)
    except CniError as error:
        raise CniError(spec.UNAVAILABLE, error.message, error.details) from error
    if not free:
        raise CniError(
            spec.UNAVAILABLE, "no address is left on this node", ", ".join(map(str, node.prefixes))
        )
    trouble = host.health()
    if trouble is not None:
        raise trouble
    return b""


COMMANDS: Mapping[str, Callable[[Host, Request], bytes]] = {
    "ADD": add,
    "DEL": delete,
    "CHECK": check,
    "GC": collect,
    "STATUS": status,
}


def open_netns(path: str) -> Namespace | None:
    """Return the namespace at a path; None where there is none."""
    if not path:
        return None
    try:
        return Namespace.open(path if "/" in path else f"./{path}")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None


def shown(entry: Entry) -> dict[str, Any]:
    """Return an entry as `crossedge-cni ips` shows it."""
    return {
        "container": entry.container,
        "interface": entry.interface,
        "addresses": [str(address) for address in entry.addresses],
        "state": {ADDING: "being added", ADDED: "in use", GONE: "cooling down"}[entry.state],
        "network": entry.network,
        "pod": entry.pod,
        "link": entry.host,
        "netns": entry.netns,
    }
