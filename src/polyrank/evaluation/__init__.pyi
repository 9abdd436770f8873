from .benchmark import Benchmark as Benchmark
from .benchmark import BenchmarkSettings as BenchmarkSettings
from .evaluator import Evaluator as Evaluator
from .settings import Evaluation as Evaluation
