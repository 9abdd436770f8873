"""A split server of tests: its identity, made once."""

from polyrank.transport.remote import new_identity

IDENTITY = new_identity(["127.0.0.1", "localhost"])
