from .benchmark import Benchmark as Benchmark
from .evaluator import Evaluator as Evaluator
from .settings import BenchmarkSettings as BenchmarkSettings
from .settings import Evaluation as Evaluation
