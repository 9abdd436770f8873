"""A client's work, and evaluation."""
