"""The `crossedge` command."""
