"""Which functions take untrusted bytes, and which entry of `fuzz_entries` tries each.

What says in its docstring that it takes something untrusted is a decoder, and must be in `COVERED`: a test
sees to it.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import FunctionType, ModuleType

ROOMS = ("wire", "latency", "meshd", "rendezvous", "sched", "cni")

COVERED: dict[str, str] = {
    "wire.armour.dearmour": "armour",
    "wire.blocklist.Blocklist.from_text": "texts",
    "wire.blocklist.Delegation.from_text": "texts",
    "wire.bundle.Bundle.from_text": "texts",
    "wire.certificate.Request.from_text": "texts",
    "wire.codec.load": "map",
    "wire.endpoint.unpack_address": "address",
    "wire.endpoint.unpack_endpoint": "endpoint",
    "wire.envelope.CookieReply.parse": "cookie reply",
    "wire.envelope.Sealed.parse": "sealed message",
    "wire.identity.Signed.decode": "certificate",
    "wire.messages.decode": "message",
    "wire.messages.unpack_endpoints": "value: unpack_endpoints",
    "wire.messages.unpack_known": "value: unpack_known",
    "wire.messages.unpack_observed_by": "value: unpack_observed_by",
    "wire.prefixes.unpack_prefix": "value: unpack_prefix",
    "wire.prefixes.unpack_prefixes": "value: unpack_prefixes",
    "wire.prefixes.unpack_v4": "value: unpack_v4",
    "wire.prefixes.unpack_v6": "value: unpack_v6",
    "wire.record.unpack_candidates": "value: unpack_candidates",
    "wire.record.unpack_verdict": "value: unpack_verdict",
    "wire.relay.unpack_header": "relay envelope",
    "wire.stun.decode": "STUN",
    "latency.feed.Feed.apply": "latency report at the scheduler",
    "latency.report.unpack_coordinates": "value: unpack_coordinates",
    "latency.report.unpack_pairs": "value: unpack_pairs",
    "meshd.client.RendezvousClient.receive": "what a rendezvous sends",
    "meshd.client_channel.SealedChannel.receive": "what a rendezvous sends",
    "meshd.directory.Directory.offer": "statements for a directory",
    "meshd.directory.Directory.offer_blocklist": "statements for a directory",
    "meshd.inner.decode": "in-session message",
    "meshd.lifetime.LifetimeCheck.receive": "STUN answer to a question",
    "meshd.mesh_control.ControlPlane.receive": "datagram at a daemon",
    "meshd.natdiscovery.NatDiscovery.receive": "datagram at a daemon",
    "meshd.netcheck.Netcheck.receive": "STUN answer to a question",
    "meshd.packet.dissect": "IP packet",
    "meshd.packet.outline": "IP packet",
    "meshd.stunclient.StunClient.receive": "STUN answer to a question",
    "meshd.stunclient.StunObservers.receive": "STUN answer to a question",
    "meshd.virtio.Header.for_packet": "IP packet",
    "meshd.wireguard.handshake_type": "WireGuard's form",
    "rendezvous.admission.examine": "statements at a rendezvous",
    "rendezvous.door.Door.open": "datagram at a rendezvous",
    "sched.extender.parsed_args": "kube-scheduler's request",
}
"""What takes untrusted bytes, by name, and the entry that tries it."""


def decoders() -> Iterator[str]:
    """Yield the names of all functions that take bytes, or values from them, and call them untrusted."""
    for room in ROOMS:
        package = importlib.import_module(f"crossedge.{room}")
        for found in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"crossedge.{room}.{found.name}")
            for function in _functions(module, module):
                takes = [str(kind) for name, kind in function.__annotations__.items() if name != "return"]
                if "untrusted" in (function.__doc__ or "").lower() and any(
                    re.search(r"bytes|Buffer|memoryview|object", kind) for kind in takes
                ):
                    yield f"{room}.{found.name}.{function.__qualname__}"


def _functions(owner: ModuleType | type, module: ModuleType) -> Iterator[FunctionType]:
    for name, value in vars(owner).items():
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if getattr(value, "__module__", "") != module.__name__ or name.startswith("_"):
            continue
        if inspect.isclass(value) and owner is module:
            yield from _functions(value, module)
        elif isinstance(value, FunctionType):
            yield value
