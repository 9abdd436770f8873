"""The process that trains the server-side parts of split clients: its parent, and itself."""

__all__ = []
