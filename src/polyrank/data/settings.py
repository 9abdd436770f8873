"""Settings of data: the source of the examples, their layout, and their clients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyrank.sample import SAMPLE, TASKS

if TYPE_CHECKING:
    from polyrank.data.types import Tasks


@dataclass(frozen=True)
class ReadingSettings:
    """Which examples, and what of a row is prompt, input and completion."""

    source: str
    """A file, a folder, or a data set of the hub; `sample` is the embedded miniature."""
    split: str | None = None
    """Which split, where a source has several."""
    subset: str | None = None
    """A hub data set's configuration."""
    revision: str | None = None
    """A hub data set's branch, tag or commit."""
    format: str = "auto"
    """`json`, `csv`, `tsv`, `text`, `parquet`, `folder` or `hub`, where the name does not tell."""
    prompt: str | None = None
    """Column or format string of the prompt; left out, `instruction`."""
    input: str | None = None
    """Column or format string of the input below the prompt; left out, `input`."""
    completion: str = "output"
    """Column or format string of the answer; a list of references is allowed."""
    separator: str | None = None
    """For text files: what divides a line into input and output."""

    def tasks(self) -> Tasks:
        """Load the tasks; DataError for a source that cannot be read."""
        from polyrank.data.tasks import load_tasks

        return load_tasks(
            TASKS if self.source == SAMPLE else self.source,
            split=self.split,
            subset=self.subset,
            revision=self.revision,
            format=self.format,
            prompt=self.prompt,
            input=self.input,
            completion=self.completion,
            separator=self.separator,
        )
