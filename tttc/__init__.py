"""tttc: a compiler for test-time-training layers."""

from tttc import models, nn
from tttc.scan import ScanState, scan

__all__ = ["ScanState", "models", "nn", "scan"]
