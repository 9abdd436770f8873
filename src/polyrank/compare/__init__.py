"""Methods beside each other: the same clients, data and sampling for all, over several seeds."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
