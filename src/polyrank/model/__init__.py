"""The only importer of transformers and peft: loading, sites, LoRA layers, PEFT folders."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
