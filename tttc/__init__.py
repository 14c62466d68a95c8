"""tttc: a compiler for test-time-training layers."""

from tttc._garbage import not_collected

with not_collected():  # PyTorch's compiler is among what is imported
    from tttc import logs, models, nn
    from tttc.compiler import CompiledModule, compile
    from tttc.ir.errors import NotLowerable
    from tttc.options import TTTCWarning
    from tttc.report.benchmark import benchmark
    from tttc.report.explain import explain
    from tttc.report.explanation import Explanation
    from tttc.report.results import BenchmarkResult
    from tttc.scan import ScanState, scan

__all__ = [
    "BenchmarkResult",
    "CompiledModule",
    "Explanation",
    "NotLowerable",
    "ScanState",
    "TTTCWarning",
    "benchmark",
    "compile",
    "explain",
    "logs",
    "models",
    "nn",
    "scan",
]
