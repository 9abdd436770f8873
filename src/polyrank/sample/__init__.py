"""An embedded miniature: a small pretrained language model and two dozen generated tasks.

``MODEL`` is a folder that ``transformers`` loads; ``TASKS`` is a file with one JSON object a line
(keys ``task``, ``category``, ``instruction``, ``input``, ``output``, ``unseen``). Both were made by
``python -m polyrank.sample.make``; ``README.md`` beside them tells how.

>>> MODEL.joinpath("config.json").is_file() and TASKS.is_file()
True
"""

from pathlib import Path

__all__ = ["MODEL", "TASKS"]

MODEL: Path = Path(__file__).parent / "model"
TASKS: Path = Path(__file__).parent / "tasks.jsonl"
