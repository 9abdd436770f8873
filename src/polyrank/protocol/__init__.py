"""The messages between a server and its clients, as bytes: each to write, and to read back.

Import from the modules: `train_request`, `train_result`, `evaluate` and `client_info` are messages,
`packet` their common form, `adapters` the tensors in them, `size_limits` how large they may be.
"""

__all__ = []
