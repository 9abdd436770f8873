"""Scores of an adapter: loss, exact match, ROUGE-L, perplexity; on clients, on a benchmark."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
