"""Latency between nodes, estimated from the heartbeats of their paths."""
