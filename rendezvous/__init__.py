"""The rendezvous: STUN, directory, calls and relay for nodes behind NATs. It is trusted with nothing."""
