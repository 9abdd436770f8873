"""Server and clients of a run whose clients are on other machines, over any message channel."""

__all__ = []
