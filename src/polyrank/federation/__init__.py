"""Rounds, run folders and engines."""
