"""An embedded miniature: a small pretrained language model, and generated data for it.

``MODEL`` is a folder that ``transformers`` loads. ``TASKS``, two dozen tasks, and ``CODES``, a code
book, are files with one JSON object a line (keys ``task``, ``category``, ``instruction``,
``input``, ``output``, ``unseen``). All were made by ``python -m polyrank.sample.make``;
``README.md`` beside them tells how.

>>> MODEL.joinpath("config.json").is_file() and TASKS.is_file() and CODES.is_file()
True
"""

from pathlib import Path

__all__ = ["CODES", "MODEL", "SAMPLE", "TASKS"]

MODEL: Path = Path(__file__).parent / "model"
SAMPLE = "sample"
"""The name of both in a recipe, as `model.source` and `data.source`."""
TASKS: Path = Path(__file__).parent / "tasks.jsonl"
CODES: Path = Path(__file__).parent / "codes.jsonl"
