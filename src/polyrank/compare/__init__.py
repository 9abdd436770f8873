"""Methods beside each other: the same clients, data and sampling for all, over several seeds."""

from polyrank.compare.command import Compared, is_comparison, resume, start
from polyrank.compare.progress import Following
from polyrank.compare.request import Request
from polyrank.compare.table import failure, markdown, sheets

__all__ = [
    "Compared",
    "Following",
    "Request",
    "failure",
    "is_comparison",
    "markdown",
    "resume",
    "sheets",
    "start",
]
