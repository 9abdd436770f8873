"""polyrank on Flower: the server and client apps, their message channel, and the app folder."""

__all__ = []
