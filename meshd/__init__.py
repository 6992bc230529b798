"""The daemon on every edge host: punching, sessions, the data path."""
