"""What the core can say of itself: plain values with units in their keys, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from crossedge.meshd.natplan import plan
from crossedge.meshd.path import Path, State
from crossedge.meshd.punch import Phase
from crossedge.wire.endpoint import Endpoint, Network, RelayEndpoint

if TYPE_CHECKING:
    from crossedge.meshd.mesh import Mesh
    from crossedge.meshd.peer import MeshPeer
    from crossedge.meshd.staticpeer import StaticPeer


class MeshRoute(NamedTuple):
    """A prefix that leads to a peer."""

    prefix: Network
    mtu: int
    """Largest inner packet in bytes; 0: that of the TUN."""
    peer: str
    groups: tuple[str, ...]
    stock: bool
    """A stock WireGuard peer."""


def routes(mesh: Mesh) -> list[MeshRoute]:
    """Return every prefix that is reached through the mesh."""
    found = [
        MeshRoute(prefix, 0, peer.name, peer.member.certificate.groups, False)
        for peer in mesh.members.values()
        for prefix in peer.member.certificate.allowed_ips
    ]
    found += [
        MeshRoute(prefix, static.mtu, static.name, (), True)
        for static in mesh.static.values()
        for prefix in static.settings.allowed_ips
    ]
    return found


def peers(mesh: Mesh, now: float) -> list[dict[str, Any]]:
    """Return what is known of each peer, by name."""
    rows = [_member(mesh, peer, now) for peer in mesh.members.values()]
    rows += [_static(static, now) for static in mesh.static.values()]
    return sorted(rows, key=lambda row: str(row["name"]))


def rendezvous(mesh: Mesh, now: float) -> list[dict[str, Any]]:
    """Return what is known of each rendezvous."""
    return [
        {
            "endpoint": str(client.endpoint),
            "state": client.state.value,
            "observed": None if client.observed is None else str(client.observed),
            "rtt_ms": _ms(client.rtt),
            "heard_s_ago": _ago(client.last_heard, now),
            "keepalive_s": client.keepalive,
        }
        for client in mesh.control.clients.values()
    ]


def status(mesh: Mesh, now: float) -> dict[str, Any]:
    """Return the state of the node and, under "problems", what is wrong and what mends it."""
    control = mesh.control
    certificate, blocklist = mesh.settings.certificate, control.directory.blocklist
    unix = control.clock.issuing(now)
    rows = peers(mesh, now)
    verdict = control.nat.verdict
    return {
        "name": certificate.name,
        "network": certificate.network.hex(),
        "uptime_s": round(now - mesh.started, 1),
        "certificate": {
            "serial": certificate.serial,
            "groups": list(certificate.groups),
            "roles": list(certificate.roles),
            "ends_in_s": round(certificate.not_after + 1 - unix),
        },
        "prefixes": [str(prefix) for prefix in certificate.allowed_ips],
        "blocklist": {
            "serial": blocklist.serial,
            "revoked": len(blocklist.revoked),
            "age_s": max(0, round(unix - blocklist.issued)),
        },
        "clock": {"synchronised": control.clock.synchronised},
        "nat": {
            "mapping": verdict.mapping.name.lower(),
            "filtering": verdict.filtering.name.lower(),
            "allocation": verdict.allocation.name.lower(),
            "hairpin": verdict.hairpin,
        },
        "candidates": [
            {"kind": candidate.kind.name.lower(), "endpoint": str(candidate.endpoint)}
            for candidate in control.candidates.current
        ],
        "rendezvous": rendezvous(mesh, now),
        "peers": {
            "known": len(rows),
            "direct": sum(row["path"] == "direct" for row in rows),
            "relay": sum(row["path"] == "relay" for row in rows),
        },
        "latency": _latency(mesh, now),
        "problems": _problems(mesh, rows, unix),
    }


def _latency(mesh: Mesh, now: float) -> dict[str, Any]:
    states = [pair.state for pair in mesh.latency.pairs(now)]
    return {
        "measured": sum(state.measured for state in states),
        "unreachable": sum(not state.measured for state in states),
        "interval_s": round(mesh.latency.prober.interval, 1) if mesh.settings.measure else None,
    }


def _problems(mesh: Mesh, rows: list[dict[str, Any]], unix: float) -> list[dict[str, str]]:
    control = mesh.control
    certificate = mesh.settings.certificate
    found: list[dict[str, str]] = []

    def say(what: str, fix: str) -> None:
        found.append({"what": what, "fix": fix})

    if not control.clients:
        say("no rendezvous is in use", "see whether the names in the bundle resolve, or take a new bundle")
    for client in control.clients.values():
        if client.state.value == "refused":
            say(f"the rendezvous {client.endpoint} refuses this node", "its log and `dropped` say why")
        elif client.state.value != "registered":
            say(
                f"the rendezvous {client.endpoint} does not answer",
                f"see that UDP {client.endpoint.port} passes",
            )
    if mesh.reach.cut_off:
        say(
            f"no peer was reached for {mesh.reach.window:.0f} s: pods here are cut off",
            "see the rendezvous above, and crossedge peers",
        )
    if not certificate.valid_at(unix, control.clock.synchronised):
        say("this node's certificate has ended", "crossedge ca sign its request again, and node join")
    if control.directory.blocklist.revokes(certificate):
        say("this node's certificate was revoked", "ask who keeps the network's authority")
    if not control.clock.synchronised:
        say(
            "the clock is not synchronised",
            "start an NTP client; certificates are judged leniently until then",
        )
    for row in rows:
        if row["state"] == "up" and row["path"] == "none":
            say(f"{row['name']} cannot be reached by any path", "crossedge ping and netcheck on both ends")
    return found


def _member(mesh: Mesh, peer: MeshPeer, now: float) -> dict[str, Any]:
    certificate = peer.member.certificate
    current = peer.paths.current
    shown = [path for path in peer.paths if path.endpoint in peer.link.endpoints]
    best = min((path for path in shown if not path.relay), key=lambda path: path.cost, default=None)
    path = best or (shown[0] if shown else current)
    return {
        "name": peer.name,
        "kind": "member",
        "groups": list(certificate.groups),
        "prefixes": [str(prefix) for prefix in certificate.allowed_ips],
        **_measured(mesh, peer, now),
        **{key: value for key, value in _path(peer, path, now).items() if value is not None},
        "why_not_direct": why_not_direct(mesh, peer, now),
        "time_to_direct_ms": _ms(peer.time_to_direct),
        "superframes": peer.link.superframes,
        "handshake_s_ago": None if peer.session is None else _ago(peer.session.handshake_at, now),
        "heard_s_ago": _ago(peer.last_heard, now),
        "sent_bytes": peer.link.sent.size,
        "received_bytes": peer.link.received.size,
        "paths": [_one_path(each, now) for each in peer.paths],
    }


def why_not_direct(mesh: Mesh, peer: MeshPeer, now: float) -> str | None:
    """Return in a few words why a pair with a session is not direct; None where it is, or has no session."""
    if not peer.up(now):
        return None
    proven = [path for path in peer.paths.directs() if path.state is State.PROVEN]
    if proven:
        used = peer.paths.current
        if used is None or not used.relay or used.endpoint not in peer.link.endpoints:
            return None
        loss = min(path.rtt.loss for path in proven)
        if not loss:
            return "the direct path was proven just now"
        return f"the relay is better now: the direct path loses {loss:.0%} of its probes"
    ours = {":" in candidate.endpoint.host for candidate in mesh.control.candidates.current}
    theirs = {":" in endpoint.host for endpoint in peer.member.record.endpoints}
    if not theirs or not ours & theirs:
        return "no address of one IP version in common"
    if any(path.state is State.SUSPECT for path in peer.paths.directs()):
        return "the direct path went silent; it is being proven again"
    if peer.punch.phase is Phase.TRYING:
        return f"punching, try {peer.punch.attempt}"
    services = mesh.services
    reason = plan(services.verdict(), services.verdict_of(peer), leads=True).reason
    nat = f"; {reason}" if reason else ""
    if peer.punch.phase is Phase.SPENT:
        return f"punching failed, again when a network changes{nat}"
    if peer.punch.resume is not None:
        return f"punching failed, again in {max(0.0, peer.punch.resume - now):.0f} s{nat}"
    return f"no traffic that would need it{nat}"


def _path(peer: MeshPeer, path: Path | None, now: float) -> dict[str, Any]:
    up = peer.up(now) and not peer.measuring.only
    opening = peer.active and not peer.measuring.only and not peer.parting
    if not peer.link.endpoints or path is None or not up:
        kind = "none"
    elif path.relay:
        kind = "relay"
    else:
        # An idle pair starts over both; its direct path is still proven by keepalives.
        kind = "direct" if path.state is State.PROVEN else "both"
    return {
        "state": "up" if up else "opening" if opening else "idle",
        "path": kind,
        "endpoint": None if kind == "none" or path is None else str(path.endpoint),
        "rtt_ms": None if path is None else _ms(path.rtt.smoothed),
        "rtt_min_ms": None if path is None else _ms(path.rtt.minimum(now)),
        "measured_s_ago": None if path is None or path.rtt.updated is None else _ago(path.rtt.updated, now),
        "jitter_ms": None if path is None or path.rtt.smoothed is None else _ms(path.rtt.deviation),
        "loss_percent": None if path is None else _percent(path.rtt.loss),
        "datagram_bytes": None if path is None else path.size,
    }


def _measured(mesh: Mesh, peer: MeshPeer, now: float) -> dict[str, Any]:
    """Return what the last measurement said, for a pair that has no path now; None for every other value."""
    pair = mesh.latency.pair(peer, now)
    known = pair if pair is not None and pair.state.measured else None
    return {
        "endpoint": None,
        "rtt_ms": None if known is None else _ms(known.smoothed),
        "rtt_min_ms": None if known is None else _ms(known.minimum),
        "jitter_ms": None if known is None else _ms(known.deviation),
        "loss_percent": None if known is None else _percent(known.loss),
        "measured_s_ago": None if known is None else round(known.age, 1),
        "datagram_bytes": None,
    }


def _one_path(path: Path, now: float) -> dict[str, Any]:
    return {
        "endpoint": str(path.endpoint),
        "kind": "relay" if isinstance(path.endpoint, RelayEndpoint) else "direct",
        "state": path.state.value if not path.relay or path.state is not State.UNPROVEN else "open",
        "role": path.role.value,
        "rtt_ms": _ms(path.rtt.smoothed),
        "loss_percent": _percent(path.rtt.loss),
        "datagram_bytes": path.size,
        "proved_s_ago": _ago(path.last_proof, now),
    }


def _static(static: StaticPeer, now: float) -> dict[str, Any]:
    session = static.session
    up = session is not None and session.usable(now)
    endpoints: tuple[Endpoint, ...] = static.link.endpoints
    return {
        "name": static.name,
        "kind": "static",
        "groups": [],
        "prefixes": [str(prefix) for prefix in static.settings.allowed_ips],
        "state": "up" if up else "idle",
        "path": "direct" if up else "none",
        "endpoint": str(endpoints[0]) if endpoints else None,
        "rtt_ms": None,
        "rtt_min_ms": None,
        "jitter_ms": None,
        "loss_percent": None,
        "measured_s_ago": None,
        "datagram_bytes": static.datagram_size,
        "why_not_direct": None,
        "time_to_direct_ms": None,
        "superframes": False,
        "handshake_s_ago": None if session is None else _ago(session.handshake_at, now),
        "heard_s_ago": _ago(static.last_heard, now),
        "sent_bytes": static.link.sent.size,
        "received_bytes": static.link.received.size,
        "paths": [],
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _percent(share: float | None) -> float | None:
    return None if share is None else round(share * 100, 1)


def _ago(when: float | None, now: float) -> float | None:
    return None if when is None or when == float("-inf") else round(max(0.0, now - when), 1)
