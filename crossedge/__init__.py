"""crossedge: one encrypted pod network over nodes behind different NATs."""
