"""The process that trains the server-side parts of split clients' models."""

__all__ = []
