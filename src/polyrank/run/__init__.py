"""A run on disk: its folder, its rounds, its checkpoints and records."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
