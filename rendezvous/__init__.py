"""The rendezvous: STUN, directory, calls and relay for nodes that sit behind NATs. It is trusted with nothing."""
