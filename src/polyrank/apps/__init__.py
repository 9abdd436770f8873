"""What runs as a process of its own: a server, its clients, and the split server."""

__all__: list[str] = []
