"""Test-time-training layers, written on :func:`tttc.scan`."""

from tttc.nn.conv import CausalConv
from tttc.nn.layers import TTTMLP, TTTLayer, TTTLinear, TTTState

__all__ = ["TTTMLP", "CausalConv", "TTTLayer", "TTTLinear", "TTTState"]
