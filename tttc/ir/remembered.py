"""A piece of the model graph whose results follow from sizes alone: run once for each, and remembered."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch

MOST_BYTES = 64 << 20  # of all that is remembered
MOST_KEPT = 256
_lock = threading.Lock()
_made: OrderedDict[Any, tuple[torch.Tensor, ...]] = OrderedDict()  # the latest last


class Remembered(torch.nn.Module):
    """``graph_module`` of sizes: tensors that nobody may write into.

    Equal graphs share what they made, on one stream of one device. What would take more than half of ``MOST_BYTES`` is
    made anew by each call, and so is what is read while a CUDA graph is recorded (the graph would go on to read memory
    that somebody else has by then) or while something looks at operators (a mode of dispatch).

    Args:
        graph_module: of sizes to a tensor or a tuple of tensors.
        key: equal for equal graphs.
        device: where its tensors lie.
        kept: False to remember nothing.
    """

    def __init__(
        self,
        graph_module: Any,
        key: Any,
        device: torch.device,
        kept: bool = True,
    ) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.key, self.device, self.kept = key, device, kept

    def forward(self, *sizes: int) -> tuple[torch.Tensor, ...]:
        """The tensors for these sizes."""
        cuda = self.device.type == "cuda"
        looked_at = torch._C._len_torch_dispatch_stack() > 0
        if not self.kept or looked_at or (cuda and torch.cuda.is_current_stream_capturing()):
            return self._made(sizes)
        stream = torch._C._cuda_getCurrentRawStream(self.device.index or 0) if cuda else 0
        key = (self.key, sizes, stream)
        known = _made.get(key)
        return self._remembered(key, sizes) if known is None else known

    __call__ = forward

    def _made(self, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        result = self.graph_module(*sizes)
        return result if isinstance(result, tuple) else (result,)

    def _remembered(self, key: Any, sizes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(False), torch.no_grad():  # a backward may keep them
            result = self._made(sizes)
        if _bytes(result) > MOST_BYTES // 2:
            return result
        with _lock:
            _made[key] = result
            while len(_made) > MOST_KEPT or sum(map(_bytes, _made.values())) > MOST_BYTES:
                _made.popitem(last=False)
        return result


def _bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)
