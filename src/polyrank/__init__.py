"""Fine-tune one language model together on machines that are not equal.

Federated LoRA with a rank per client (FlexLoRA, arXiv 2402.11505), from a Hugging Face model and a
set of tasks to a PEFT adapter. The names here are imported when they are first used, so that
``import polyrank`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyrank.aggregation import FFA, FedIT, FlexLoRA, FLoRA, HetLoRA, Segment, SLoRA
    from polyrank.data import load_tasks, partition
    from polyrank.errors import PolyrankError
    from polyrank.evaluation import Evaluation
    from polyrank.model import load_adapter, load_model, wrap_model
    from polyrank.planning import CutPoint, Fleet, LoRAType, Scaling
    from polyrank.rounds import Faults, Sampling, Weighting
    from polyrank.run import EarlyStopping, Federation, RunSettings
    from polyrank.training import Encoding, LocalTraining
    from polyrank.training.split import SplitSettings

__all__ = [
    "FFA",
    "CutPoint",
    "EarlyStopping",
    "Encoding",
    "Evaluation",
    "FLoRA",
    "Faults",
    "FedIT",
    "Federation",
    "Fleet",
    "FlexLoRA",
    "HetLoRA",
    "LoRAType",
    "LocalTraining",
    "PolyrankError",
    "RunSettings",
    "SLoRA",
    "Sampling",
    "Scaling",
    "Segment",
    "SplitSettings",
    "Weighting",
    "load_adapter",
    "load_model",
    "load_tasks",
    "partition",
    "wrap_model",
]

_HOMES = {
    "aggregation": ("FFA", "FedIT", "FlexLoRA", "FLoRA", "HetLoRA", "Segment", "SLoRA"),
    "data": ("load_tasks", "partition"),
    "errors": ("PolyrankError",),
    "evaluation": ("Evaluation",),
    "model": ("load_adapter", "load_model", "wrap_model"),
    "planning": ("Fleet", "LoRAType", "Scaling", "CutPoint"),
    "rounds": ("Faults", "Sampling", "Weighting"),
    "run": ("RunSettings", "EarlyStopping", "Federation"),
    "training": ("Encoding", "LocalTraining"),
    "training.split": ("SplitSettings",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"polyrank.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'polyrank' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
