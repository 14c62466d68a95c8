"""What a training step of a scan holds at most: nothing of it grows faster than the sequence, and little is held at once.

The kernels are not run: what counts is what is allocated for them, on a device without values.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tttc.runtime import fused_scan, fused_scan_backward, replay, triton_scan_backward

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from scans import make_case


class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at any time."""

    def __init__(self, given):
        super().__init__()
        self.live, self.most = {}, 0
        self._add(given)

    def _add(self, tensors):
        for x in tree_leaves(tensors):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        self.most = max(self.most, sum(n for _, n in self.live.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self._add(out)
        return out


def peak(monkeypatch, length, heads=32):
    """The peak of forward and backward over the bytes of q, k, v, the output and their gradients."""
    for module, name in (
        (fused_scan, "runs_by_kernels"),
        (fused_scan, "uses_triton"),
        (fused_scan_backward, "runs_by_kernels"),
    ):
        monkeypatch.setattr(module, name, lambda *_: True)
    monkeypatch.setattr(replay, "launch", lambda call: None)
    case = make_case("ttt_linear_b16", 1, length, heads, 64, device="cpu")
    call = case.flat()
    rest = (call.key, 16, 0, "triton", False, 1)
    wanted = [False] * len(call.anchor) + [i < 3 for i in range(len(call.tokens))]
    wanted += [False] * len(call.shared)
    with Peak([call.anchor, call.tokens, call.shared]) as held:
        z, *saved = fused_scan.fused_scan(call.anchor, [], call.tokens, call.shared, *rest)
        g = torch.empty_like(z)
        out = fused_scan_backward.fused_scan_backward(
            [g], call.anchor, [], call.tokens, call.shared, saved, wanted, *rest
        )
    assert case.program().no_backward_kernels is None
    assert len(out) == 3
    return held.most / (8 * call.tokens[0].numel() * 2)


def test_a_training_step_holds_little(monkeypatch):
    ratio = peak(monkeypatch, 32768)
    print(f"peak {ratio:.2f} times q, k, v, output and their gradients")
    assert ratio <= 2.5


def test_what_a_token_takes_does_not_grow_with_the_sequence(monkeypatch):
    monkeypatch.setattr(triton_scan_backward, "ENOUGH_PROGRAMS", 256)  # as for 32 heads
    ratios = [peak(monkeypatch, n, 4) for n in (2048, 16384, 65536, 131072)]
    assert ratios == sorted(ratios, reverse=True)
