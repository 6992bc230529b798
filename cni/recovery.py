"""Recovery of what crashes left: addresses of pods that are gone, reservations of killed requests.

A leak is proven by two observations, apart in time, and a last check under the attachment's lock, so that a
pod whose namespace was only out of sight keeps its address.
"""

from __future__ import annotations

import os
from dataclasses import replace

from crossedge.cni import device
from crossedge.cni.ipam import ADDED, ADDING, GONE, SUSPICION, Entry
from crossedge.cni.store import Store
from crossedge.host.links import get_link
from crossedge.host.netlink import Netlink


def vanished(entry: Entry, netlink: Netlink) -> bool:
    """Tell whether an attachment's namespace is gone: neither its path nor the link out of it is there."""
    if get_link(netlink, entry.host) is not None:
        return False
    try:
        return os.stat(entry.netns).st_ino != entry.inode
    except OSError:
        return True


def recover(store: Store, netlink: Netlink) -> list[Entry]:
    """Look at every attachment once; return those whose addresses were freed."""
    freed = []
    for entry in list(store.look().live.values()):
        leaked = entry.state == ADDED and vanished(entry, netlink)
        if entry.state == ADDED and not leaked and not entry.suspect:
            continue
        with store.attachment(entry.key, wait=False) as held:
            if held and _observe(store, netlink, entry):
                freed.append(entry)
    return freed


def _observe(store: Store, netlink: Netlink, entry: Entry) -> bool:
    """Note what is seen of an attachment that nobody is working on; return whether it was freed."""
    with store.transaction() as change:
        held = change.ledger.live.get(entry.key)
        if held is None or held.serial != entry.serial:
            return False
        if held.state == ADDING:  # and its lock is free: who made it was killed
            change.put(replace(held, state=GONE, changed=change.now))
        elif not vanished(held, netlink):
            if held.suspect:
                change.put(replace(held, suspect=0.0))
            return False
        elif not held.suspect:
            change.put(replace(held, suspect=change.now))
            return False
        elif change.now - held.suspect < SUSPICION:
            return False
        else:
            change.put(replace(held, state=GONE, changed=change.now))
    if get_link(netlink, held.host) is not None:
        device.remove(netlink, [held.host])
    return True
