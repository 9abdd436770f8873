"""Fine-tune one language model together on machines that are not equal.

Federated LoRA with a rank per client (FlexLoRA, arXiv 2402.11505), from a Hugging Face model and a
set of tasks to a PEFT adapter. The names here are imported when they are first used, so that
``import polyrank`` costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
