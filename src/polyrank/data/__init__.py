"""Tasks, clients and batches: from files or a hub to token ids."""

from polyrank.data.clients import Clients, Summary
from polyrank.data.collate import collate
from polyrank.data.encode import encode, encode_each
from polyrank.data.partition import partition
from polyrank.data.sequences import joined
from polyrank.data.single import single
from polyrank.data.split import split
from polyrank.data.store import ExampleStore
from polyrank.data.tasks import load_tasks, tasks_from_rows
from polyrank.data.template import PLAIN, Tokenizer
from polyrank.data.tokens import RowsElsewhere, Size, TokenStore, sizes
from polyrank.data.types import Batch, ClientData, Encoded, Example, Skipped, Tasks

__all__ = [
    "PLAIN",
    "Batch",
    "ClientData",
    "Clients",
    "Encoded",
    "Example",
    "ExampleStore",
    "RowsElsewhere",
    "Size",
    "Skipped",
    "Summary",
    "Tasks",
    "TokenStore",
    "Tokenizer",
    "collate",
    "encode",
    "encode_each",
    "joined",
    "load_tasks",
    "partition",
    "single",
    "sizes",
    "split",
    "tasks_from_rows",
]
