"""tttc: a compiler for test-time-training layers."""

from tttc import models, nn
from tttc.compiler import CompiledModule, TTTCWarning, compile
from tttc.ir.errors import NotLowerable
from tttc.scan import ScanState, scan

__all__ = ["CompiledModule", "NotLowerable", "ScanState", "TTTCWarning", "compile", "models", "nn", "scan"]
