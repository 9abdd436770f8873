"""Texts and tables for people: what a run did, beside its control, and what is in its adapter.

Everything fits 80 columns, unless names of tasks and matrices are very long.
"""

from polyrank.report.cuts import hosted, leaks
from polyrank.report.lines import own_rank, perplexity, remarks, round_header, round_line, spent
from polyrank.report.tables import attendance, benchmark, categories, ranks, scores, spectra, table
from polyrank.report.words import count, duration, loading, number

__all__ = [
    "attendance",
    "benchmark",
    "categories",
    "count",
    "duration",
    "hosted",
    "leaks",
    "loading",
    "number",
    "own_rank",
    "perplexity",
    "ranks",
    "remarks",
    "round_header",
    "round_line",
    "scores",
    "spectra",
    "spent",
    "table",
]
