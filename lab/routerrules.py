"""The nftables rules of the lab's routers, as text."""

from __future__ import annotations

MASQUERADE = {
    "kernel": "masquerade",
    "kernel-accepting": "masquerade",
    "kernel-random": "masquerade random",
    "kernel-fully-random": "masquerade fully-random",
}


def kernel_nat(kind: str) -> str:
    """Return the rules of a router that leaves NAT to the kernel."""
    drop = "" if kind == "kernel-accepting" else 'iifname "wan" drop'
    return f"""
table ip lab {{
  chain input {{
    type filter hook input priority filter; policy accept;
    ct state established,related accept
    {drop}
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "lan" accept
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "wan" {MASQUERADE[kind]}
  }}
}}
"""


def firewall6() -> str:
    """Return the rules of an IPv6 firewall that lets in what answers something that went out."""
    return """
table ip6 lab {
  chain forward {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname "lan" accept
  }
  chain input {
    type filter hook input priority filter; policy accept;
    ct state established,related accept
    meta l4proto ipv6-icmp accept
    iifname "wan" drop
  }
}
"""


def mark_lan(mark: int) -> str:
    """Return the rule that sends what comes from the LAN to the modelled NAT, by way of a routing rule."""
    return f"""
table ip lab {{
  chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "lan" meta mark set {mark}
  }}
}}
"""
