"""Graphs whose Python is made when somebody asks for it: many run as kernels, or are rewritten first."""

from __future__ import annotations

import threading

from torch.fx._lazy_graph_module import _LazyGraphModule

_lock = threading.RLock()


class LazyGraph(_LazyGraphModule):
    """An ``fx.GraphModule`` that threads may call for the first time at once.

    While torch.fx writes the Python of a graph it changes the graph's nodes.
    """

    def real_recompile(self) -> None:
        if self._needs_recompile():
            with _lock:
                super().real_recompile()
