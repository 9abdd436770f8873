"""Texts and tables for people: what a run did, beside its control, and what is in its adapter.

Everything fits 80 columns, unless names of tasks and matrices are very long.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
