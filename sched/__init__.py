"""The scheduler: latency matrices, groups of near nodes, placements near the proven optimum."""
