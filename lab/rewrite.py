"""IPv4 packets on their way through a modelled NAT: addresses and ports read and rewritten in place.

Checksums are updated incrementally (RFC 1624), also those that the kernel left half done for an offload.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from ipaddress import IPv4Network

from crossedge.lab.nat import Address, Nat, NatKind, make_nat
from crossedge.lab.trains import NEEDS_CSUM, VNET_SIZE, checksum_add

ICMP, TCP, UDP = 1, 6, 17
ECHO_REPLY, UNREACHABLE, ECHO, TIME_EXCEEDED, PARAMETER_PROBLEM = 0, 3, 8, 11, 12
CHECKSUM_AT = {TCP: 16, UDP: 6}
MORE_THAN_FIRST = 0x1FFF
_PORTS = struct.Struct("!HH")
_WORD = struct.Struct("!H")


def adjusted(check: int, old: bytes, new: bytes) -> int:
    """Return a checksum after `old` became `new` in what it covers (RFC 1624, equation 3)."""
    total = (~check & 0xFFFF) + checksum_add(new)
    for (word,) in _WORD.iter_unpack(old):
        total += ~word & 0xFFFF
    return ~checksum_add(b"", total) & 0xFFFF


def half_adjusted(partial: int, old: bytes, new: bytes) -> int:
    """Return the sum of a pseudo header, as an offload starts from, after `old` became `new` in it."""
    return ~adjusted(~partial & 0xFFFF, old, new) & 0xFFFF


class Translator:
    """A modelled NAT for UDP, TCP and ICMP echo, on packets with a virtio header in front."""

    def __init__(
        self, kind: NatKind, addresses: Sequence[str], lan: str, below: Callable[[int], int]
    ) -> None:
        self.nats: dict[int, Nat] = {p: make_nat(kind, addresses, below) for p in (UDP, TCP, ICMP)}
        self.own = frozenset(addresses)
        self.dropped: dict[str, int] = {}
        network = IPv4Network(lan)
        self._lan = int(network.network_address)
        self._mask = int(network.netmask)
        self._names: dict[bytes, str] = {}

    def translate(self, buffer: bytearray, length: int, now: float) -> bool:
        """Rewrite the packet in `buffer[:length]`; return False where it is dropped (and counted)."""
        reason = self._translate(buffer, length, now)
        if reason:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
        return not reason

    def _translate(self, buffer: bytearray, length: int, now: float) -> str:
        ip = VNET_SIZE
        if length < ip + 20 or buffer[ip] >> 4 != 4:
            return "not-ipv4"
        transport = ip + (buffer[ip] & 15) * 4
        protocol = buffer[ip + 9]
        if _WORD.unpack_from(buffer, ip + 6)[0] & MORE_THAN_FIRST:
            return "fragment"
        if length < transport + 8:
            return "short"
        nat = self.nats.get(protocol)
        if nat is None:
            return "protocol"
        source, destination = self._name(buffer[ip + 12 : ip + 16]), self._name(buffer[ip + 16 : ip + 20])
        if protocol == ICMP:
            kind = buffer[transport]
            if kind in (UNREACHABLE, TIME_EXCEEDED, PARAMETER_PROBLEM):
                return self._error(buffer, transport, length, destination, now)
            if kind not in (ECHO, ECHO_REPLY):
                return "icmp"
            identifier = _WORD.unpack_from(buffer, transport + 4)[0]
            sender = (source, identifier if kind == ECHO else 0)
            target = (destination, identifier if kind == ECHO_REPLY else 0)
        else:
            ports = _PORTS.unpack_from(buffer, transport)
            sender, target = (source, ports[0]), (destination, ports[1])
        new_sender, new_target = sender, target
        if destination in self.own:
            if self._inside(buffer[ip + 12 : ip + 16]):
                turned = nat.hairpin(sender, target, now)
                if turned is None:
                    return "hairpin"
                new_sender, new_target = turned
            else:
                inner = nat.translate_in(sender, target, now)
                if inner is None:
                    return "refused"
                new_target = inner
        else:
            outer = nat.translate_out(sender, target, now)
            if outer is None:
                return "no-mapping"
            new_sender = outer
        self._apply(buffer, transport, protocol, new_sender, new_target)
        return ""

    def _inside(self, packed: bytearray) -> bool:
        return int.from_bytes(packed, "big") & self._mask == self._lan

    def _name(self, packed: bytearray) -> str:
        key = bytes(packed)
        name = self._names.get(key)
        if name is None:
            if len(self._names) > 4096:
                self._names.clear()
            name = self._names[key] = socket.inet_ntoa(key)
        return name

    def _apply(
        self, buffer: bytearray, transport: int, protocol: int, sender: Address, target: Address
    ) -> None:
        """Write addresses and ports, one more TTL (the kernel takes two for one router), and checksums."""
        ip = VNET_SIZE
        old = bytes(buffer[ip + 12 : ip + 20])
        new = socket.inet_aton(sender[0]) + socket.inet_aton(target[0])
        old_head, new_head = bytes(buffer[ip + 8 : ip + 10]), bytes((min(255, buffer[ip + 8] + 1), protocol))
        buffer[ip + 8] = new_head[0]
        buffer[ip + 12 : ip + 20] = new
        check = _WORD.unpack_from(buffer, ip + 10)[0]
        _WORD.pack_into(buffer, ip + 10, adjusted(check, old + old_head, new + new_head))
        if protocol == ICMP:
            identifier = sender[1] or target[1]
            self._replace(buffer, transport + 4, transport + 2, _WORD.pack(identifier))
            return
        at = transport + CHECKSUM_AT[protocol]
        check = _WORD.unpack_from(buffer, at)[0]
        old_ports = bytes(buffer[transport : transport + 4])
        new_ports = _PORTS.pack(sender[1], target[1])
        buffer[transport : transport + 4] = new_ports
        if buffer[0] & NEEDS_CSUM:  # the ports are summed later
            _WORD.pack_into(buffer, at, half_adjusted(check, old, new))
        elif check or protocol == TCP:
            check = adjusted(check, old + old_ports, new + new_ports)
            _WORD.pack_into(buffer, at, check or (0xFFFF if protocol == UDP else 0))

    def _replace(self, buffer: bytearray, at: int, check_at: int, new: bytes) -> None:
        old = bytes(buffer[at : at + len(new)])
        buffer[at : at + len(new)] = new
        _WORD.pack_into(buffer, check_at, adjusted(_WORD.unpack_from(buffer, check_at)[0], old, new))

    def _error(self, buffer: bytearray, transport: int, length: int, destination: str, now: float) -> str:
        """Hand an ICMP error about a packet of ours to who sent that, its quotation translated back."""
        quoted = transport + 8
        if destination not in self.own:
            return "icmp-error-out"
        if length < quoted + 28 or buffer[quoted] >> 4 != 4:
            return "icmp-error"
        inner_transport = quoted + (buffer[quoted] & 15) * 4
        protocol = buffer[quoted + 9]
        nat = self.nats.get(protocol)
        if nat is None or protocol == ICMP or length < inner_transport + 8:
            return "icmp-error"
        ports = _PORTS.unpack_from(buffer, inner_transport)
        outer = (self._name(buffer[quoted + 12 : quoted + 16]), ports[0])
        remote = (self._name(buffer[quoted + 16 : quoted + 20]), ports[1])
        inner = nat.inner_of(outer, remote, now)
        if inner is None:
            return "icmp-error"
        packed = socket.inet_aton(inner[0])
        self._replace(buffer, quoted + 12, quoted + 10, packed)
        _WORD.pack_into(buffer, inner_transport, inner[1])
        _WORD.pack_into(buffer, transport + 2, 0)
        body = memoryview(buffer)[transport:length]
        _WORD.pack_into(buffer, transport + 2, ~checksum_add(body) & 0xFFFF)
        self._replace(buffer, VNET_SIZE + 16, VNET_SIZE + 10, packed)
        return ""
