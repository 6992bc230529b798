"""Routing rules, by raw netlink messages."""

from __future__ import annotations

import errno
import socket
import struct
from typing import NamedTuple

from crossedge.host.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    U32,
    Batch,
    Netlink,
    Reply,
    attribute_u8,
    attribute_u32,
    parse_attributes,
)

RTM_NEWRULE = 32
RTM_DELRULE = 33
RTM_GETRULE = 34
RULE = struct.Struct("=BBBBBxxBI")
"""Family, destination length, source length, TOS, table, action, flags."""
FRA_PRIORITY = 6
FRA_FWMARK = 10
FRA_SUPPRESS_PREFIXLEN = 14
FRA_TABLE = 15
FRA_FWMASK = 16
FRA_PROTOCOL = 21
FR_ACT_TO_TBL = 1
FIB_RULE_INVERT = 2
MASK_ALL = 0xFFFFFFFF


class Rule(NamedTuple):
    """A rule "[not] fwmark MARK lookup TABLE"; rules of other forms are shown by what they have of this."""

    family: int
    priority: int
    table: int
    mark: int = 0
    """0: any mark."""
    mask: int = MASK_ALL
    invert: bool = False
    protocol: int = 0
    """Who made it, as for routes; 0 where the kernel (before 4.17) does not know."""
    plain: bool = True
    """Whether it looks a table up, with no selector besides the mark."""


def _body(rule: Rule) -> bytes:
    flags = FIB_RULE_INVERT if rule.invert else 0
    table = rule.table if rule.table < 256 else 0
    body = RULE.pack(rule.family, 0, 0, 0, table, FR_ACT_TO_TBL, flags)
    body += attribute_u32(FRA_PRIORITY, rule.priority) + attribute_u32(FRA_TABLE, rule.table)
    if rule.mark:
        body += attribute_u32(FRA_FWMARK, rule.mark) + attribute_u32(FRA_FWMASK, rule.mask)
    if rule.protocol:
        body += attribute_u8(FRA_PROTOCOL, rule.protocol)
    return body


def add_rule(batch: Batch, rule: Rule) -> None:
    """Make a rule; the same one that exists already is no error, and is not made twice."""
    what = f"add the rule {rule.priority} to table {rule.table}"
    batch.add(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _body(rule), what, (errno.EEXIST,))


def delete_rule(batch: Batch, rule: Rule) -> None:
    """Delete a rule; one that is gone already is no error."""
    what = f"delete the rule {rule.priority} to table {rule.table}"
    batch.add(RTM_DELRULE, 0, _body(rule), what, (errno.ENOENT, errno.ESRCH, errno.EAFNOSUPPORT))


def list_rules(netlink: Netlink) -> list[Rule]:
    """Return all rules, IPv4 and IPv6, as the kernel tries them."""
    rules: list[Rule] = []
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            replies = netlink.dump(RTM_GETRULE, RULE.pack(family, 0, 0, 0, 0, 0, 0), "list rules")
        except OSError as error:
            if error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                continue
            raise
        rules += [rule for reply in replies if reply.kind == RTM_NEWRULE and (rule := parse_rule(reply))]
    return rules


def parse_rule(reply: Reply) -> Rule | None:
    """Parse RTM_NEWRULE or RTM_DELRULE; None for what is not IP."""
    family, to, source, tos, table, action, flags = RULE.unpack_from(reply.payload)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = parse_attributes(reply.payload, RULE.size)

    def number(kind: int, default: int) -> int:
        data = found.get(kind, b"")
        return int(U32.unpack(data)[0]) if len(data) == U32.size else default

    known = {FRA_PRIORITY, FRA_FWMARK, FRA_TABLE, FRA_FWMASK, FRA_PROTOCOL, FRA_SUPPRESS_PREFIXLEN}
    suppress = number(FRA_SUPPRESS_PREFIXLEN, MASK_ALL)
    protocol = found.get(FRA_PROTOCOL, b"\0")
    return Rule(
        family=family,
        priority=number(FRA_PRIORITY, 0),
        table=number(FRA_TABLE, table),
        mark=number(FRA_FWMARK, 0),
        mask=number(FRA_FWMASK, MASK_ALL),
        invert=bool(flags & FIB_RULE_INVERT),
        protocol=protocol[0],
        plain=action == FR_ACT_TO_TBL
        and not (to or source or tos)
        and suppress == MASK_ALL
        and found.keys() <= known,
    )
