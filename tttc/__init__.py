"""tttc: a compiler for test-time-training layers."""

from tttc.scan import ScanState, scan

__all__ = ["ScanState", "scan"]
