"""Tasks, clients and batches: from files or a hub to token ids."""

from polyrank.data.clients import Clients, Summary
from polyrank.data.collate import collate
from polyrank.data.encode import encode
from polyrank.data.partition import partition
from polyrank.data.split import split
from polyrank.data.tasks import load_tasks, tasks_from_rows
from polyrank.data.template import PLAIN, Tokenizer
from polyrank.data.types import Batch, ClientData, Encoded, Example, Skipped, Tasks

__all__ = [
    "PLAIN",
    "Batch",
    "ClientData",
    "Clients",
    "Encoded",
    "Example",
    "Skipped",
    "Summary",
    "Tasks",
    "Tokenizer",
    "collate",
    "encode",
    "load_tasks",
    "partition",
    "split",
    "tasks_from_rows",
]
