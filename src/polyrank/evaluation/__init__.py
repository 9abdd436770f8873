"""Scores of an adapter: loss, exact match, ROUGE-L, perplexity; on clients, on a benchmark."""

from polyrank.evaluation.benchmark import Benchmark, BenchmarkSettings
from polyrank.evaluation.evaluator import Evaluator
from polyrank.evaluation.settings import Evaluation

__all__ = ["Benchmark", "BenchmarkSettings", "Evaluation", "Evaluator"]
