"""Forward (and training) of TTT scans on a GPU beside flash-linear-attention: values first, then times.

    python benchmarks/scan_forward.py benchmarks/results/OUT.json

flash-linear-attention 0.6 joins where it is installed (the extra "bench"). Inputs are bf16, heads 32 of 64,
laid out [B, T, H, d] as projections leave them; times are medians of repeated runs, in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import traceback
from pathlib import Path
from typing import Any

import torch
import triton
from scans import SHAPES, Case, make_case
from timing import bandwidth, matrix_rate, record, relative
from torch.utils import _pytree as pytree
from tttc.codegen.torch_scan import run_program

import tttc
from tttc._scan_op import scan_info
from tttc.runtime.launch import Launch
from tttc.runtime.triton_scan import run_kernels

CASES = ("ttt_linear_b16", "ttt_mlp_b16", "ttt_mlp_chunk64")
D, HEADS = 64, 32
DRAWS = 16  # of weights and inputs, of which errors of layers are a mean: of a sum of few large terms one says little


def median(run, rep: int = 100) -> dict[str, float]:
    """Median, lower and upper quartile of a function's time, in microseconds."""
    low, mid, high = triton.testing.do_bench(run, warmup=20, rep=rep, quantiles=[0.25, 0.5, 0.75])
    return {"us": 1e3 * mid, "q25": 1e3 * low, "q75": 1e3 * high}


def prefixed(prefix: str, times: dict[str, float]) -> dict[str, float]:
    """Times under other names."""
    return {prefix + name: time for name, time in times.items()}


def replayed(run) -> dict[str, float]:
    """A function's time as a CUDA graph: what the GPU takes, without the Python that launches it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median(graph.replay, 60)


def exact_output(case: Case) -> torch.Tensor:
    """The output in float64 by the torch backend, which the tests hold to the naive loop within 1e-9."""
    call = case.flat()
    groups = [[x.double() for x in g] for g in (call.anchor, call.carry, call.tokens, call.shared)]
    return run_program(case.program(), *groups, 0, False)[2][0]


def naive_output(case: Case) -> torch.Tensor:
    """The output of the naive loop in float64, on the same values."""

    def to(tree: Any) -> Any:
        return torch.utils._pytree.tree_map(lambda x: x.double(), tree)

    return tttc.scan(
        case.step, to(case.init), to(case.tokens), case.mini_batch_size, shared=to(case.shared)
    )[1]


def launches(case: Case) -> list[Launch]:
    """What a call launches; none is made."""
    call, found = case.flat(), []
    dtype = scan_info(call.anchor, call.tokens, call.shared).output
    run_kernels(case.program(), *call[1:5], 0, dtype, False, launcher=found.append)
    return found


def forward_rows() -> list[dict[str, Any]]:
    rows = []
    rate = bandwidth()
    for name in CASES:
        small = make_case(name, 1, 2048, HEADS, D)
        call, program = small.flat(), small.program()
        dtype = scan_info(call.anchor, call.tokens, call.shared).output
        z = run_kernels(
            program, call.anchor, call.carry, call.tokens, call.shared, 0, dtype, False
        )[2][0]
        dual = exact_output(small)
        errors = {"T2048 against the dual form in float64": relative(z, dual)}
        if name == "ttt_linear_b16":
            naive = naive_output(small)
            errors["T2048 against the naive loop in float64"] = relative(z, naive)
            errors["naive against dual, both float64"] = relative(dual, naive)
        long = make_case(name, 1, 32768, HEADS, D)
        call = long.flat()
        z = run_kernels(
            program, call.anchor, call.carry, call.tokens, call.shared, 0, dtype, False
        )[2][0]
        errors["T32768 against the dual form in float64"] = relative(z, exact_output(long))
        print(name, {k: f"{v:.1e}" for k, v in errors.items()})
        for shape, (batch, length) in SHAPES.items():
            case = make_case(name, batch, length, HEADS, D)
            call = case.flat()

            @torch.no_grad()
            def run(call=call, b=case.mini_batch_size):
                return torch.ops.tttc.fused_scan(*call[1:5], call.key, b, 0, "auto", False, 0)

            floor = 4 * batch * length * HEADS * D * 2 / rate * 1e6
            row = {"case": name, "shape": shape, **median(run), "floor_us": floor, "errors": errors}
            row |= prefixed("graph_", replayed(run))
            row["kernels"] = {
                x.kernel.name: str(x.kernel.config["schedule"]) for x in launches(case)
            }
            rows.append(row)
            print(
                f"  {name} {shape}: {row['us']:.0f} us, as a graph {row['graph_us']:.0f} (floor {floor:.0f})"
            )
    return rows


def peer_row(peer: Any, shape: str, batch: int, length: int) -> dict[str, Any]:
    """One kernel of flash-linear-attention on the inputs of the TTT-Linear case."""
    raw = make_case("ttt_linear_b16", batch, length, HEADS, D).raw
    rest = {
        "w": raw["gain"].bfloat16(),
        "b": raw["bias"].bfloat16(),
        "eta": raw["eta"][..., None],
        "chunk_size": 16,
        "initial_state": raw["W1"].expand(batch, HEADS, D, D).contiguous(),
        "initial_state_bias": raw["b1"][None, :, None].expand(batch, HEADS, 1, D).contiguous(),
    }
    leaves = [raw[n].detach().clone().requires_grad_() for n in ("q", "k", "v")]

    @torch.no_grad()
    def forward() -> Any:
        return peer(*leaves, **rest)

    cotangent = torch.ones_like(raw["v"])

    def train() -> None:
        out = peer(*leaves, **rest)
        torch.autograd.grad(out[0] if isinstance(out, tuple) else out, leaves, cotangent)

    row = {"case": f"fla {peer.__name__}", "shape": shape, **median(forward)}
    row |= prefixed("graph_", replayed(forward))
    if peer.__name__ == "chunk_ttt_linear":
        row |= prefixed("training_", median(train))
        row |= prefixed("training_replayed_", replayed(train))
    return row


def peer_rows() -> list[dict[str, Any]]:
    """flash-linear-attention's two kernels at every shape."""
    from fla.ops.ttt import chunk_ttt_linear, fused_chunk_ttt_linear

    rows = []
    for shape, (batch, length) in SHAPES.items():
        for peer in (chunk_ttt_linear, fused_chunk_ttt_linear):
            row = peer_row(peer, shape, batch, length)
            rows.append(row)
            print(
                f"  {row['case']} {shape}: {row['us']:.0f} us, as a graph {row['graph_us']:.0f}, "
                f"training {row.get('training_us', 0):.0f}, as a graph {row.get('training_replayed_us', 0):.0f}"
            )
    return rows


def training_rows() -> list[dict[str, Any]]:
    """Forward and backward of a scan, as ``tttc.compile`` runs it, and its gradients against float64."""
    rows = []
    for name in ("ttt_linear_b16", "ttt_mlp_chunk64"):
        for shape, (batch, length) in SHAPES.items():
            case = make_case(name, batch, length, HEADS, D)
            call = case.flat()
            from tttc.runtime.fused_scan import saving_interval

            leaves = [x.detach().requires_grad_() for x in call.tokens[:3]]
            tokens = [*leaves, *call.tokens[3:]]
            interval = saving_interval(
                call.anchor, [], tokens, call.shared, call.key, case.mini_batch_size, "auto"
            )

            def run(call=call, tokens=tokens, case=case, interval=interval):
                return torch.ops.tttc.fused_scan(
                    call.anchor, [], tokens, call.shared, call.key, case.mini_batch_size, 0, "auto", False, interval
                )[0]  # fmt: skip

            cotangent = torch.ones_like(run().detach())

            def train(run=run, leaves=leaves, cotangent=cotangent):
                return torch.autograd.grad(run(), leaves, cotangent)

            row: dict[str, Any] = {"case": name, "shape": shape}
            if shape == "B1 T2048":
                groups = [
                    [x.detach().double() for x in g] for g in (call.anchor, [], tokens, call.shared)
                ]
                inputs = [x.requires_grad_() for x in groups[2][:3]]
                z = torch.ops.tttc.fused_scan(groups[0], [], groups[2], groups[3], call.key, case.mini_batch_size,
                                              0, "torch", False, 1)[0]  # fmt: skip
                exact = torch.autograd.grad(z, inputs, torch.ones_like(z))
                row["gradient_errors"] = [
                    relative(x, y) for x, y in zip(train(), exact, strict=True)
                ]
            row |= prefixed("training_", median(train, 60))
            row |= prefixed("training_graph_", replayed(train))
            row |= prefixed("training_replayed_", reduced(case, leaves))
            row["backward_by_kernels"] = case.program().no_backward_kernels is None
            rows.append(row)
            print(
                f"  training {name} {shape}: {row['training_us']:.0f} us, as a graph {row['training_graph_us']:.0f}, "
                f"under reduce-overhead {row['training_replayed_us']:.0f} {row.get('gradient_errors', '')}"
            )
    return rows


def reduced(case: Case, leaves: list[torch.Tensor]) -> dict[str, float]:
    """Forward and backward of a scan as ``tttc.compile(..., mode="reduce-overhead")`` runs it."""

    def scan(*tokens: torch.Tensor) -> torch.Tensor:
        given = type(case.tokens)(*tokens)
        return tttc.scan(case.step, case.init, given, case.mini_batch_size, shared=case.shared)[1]

    compiled = tttc.compile(scan, strict=True, mode="reduce-overhead")
    tokens = [*leaves, *pytree.tree_leaves(case.tokens)[len(leaves) :]]
    cotangent = torch.ones_like(compiled(*tokens).detach())

    def train() -> list[torch.Tensor]:
        return list(torch.autograd.grad(compiled(*tokens), leaves, cotangent))

    return median(train, 60)


def layer_gradients(
    compiled: torch.nn.Module, weights: dict[str, torch.Tensor], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The output of a compiled layer with ``weights``, and the gradients of its input and parameters: in float64 where
    it is of that, else under autocast to bf16."""
    compiled.load_state_dict(weights)
    compiled.zero_grad(set_to_none=True)
    exact = next(compiled.parameters()).dtype is torch.float64
    x = (x.double() if exact else x.clone()).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=not exact):
        z = compiled(x)
    z.backward(torch.cos(torch.arange(z.numel(), device=z.device)).reshape(z.shape).to(z.dtype))
    grads = {n: p.grad for n, p in compiled.named_parameters() if p.grad is not None}
    return {"output": z.detach(), "input": x.grad, **grads}


def model_rows() -> list[dict[str, Any]]:
    """Whole layers through ``tttc.compile`` on the GPU: output and every gradient under autocast to bf16, relative to
    float64, by kernels and by torch operations.

    Errors are root mean squares over draws of weights and inputs: of a gradient of a few numbers (a bias a head) one
    draw says little.
    """
    rows = []
    for cls in (tttc.nn.TTTLinear, tttc.nn.TTTMLP):
        made = [cls(512, 8, gate=True, share_qk=True).cuda() for _ in range(3)]
        made[0].double()
        exact, kernels, operations = (
            tttc.compile(layer, backend=backend, strict=True)
            for layer, backend in zip(made, ("torch", "triton", "torch"), strict=True)
        )
        squares: dict[str, dict[str, list[float]]] = {"triton": {}, "torch": {}}
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            weights = cls(512, 8, gate=True, share_qk=True).state_dict()
            x = torch.randn(2, 2048, 512, device="cuda")
            want = layer_gradients(exact, weights, x)
            for backend, compiled in (("triton", kernels), ("torch", operations)):
                found = layer_gradients(compiled, weights, x)
                for name, value in found.items():
                    error = relative(value, want[name])
                    squares[backend].setdefault(name, []).append(error**2)
        row: dict[str, Any] = {"case": f"layer {cls.__name__}", "draws": DRAWS}
        for backend, by_name in squares.items():
            row[backend] = {n: statistics.fmean(x) ** 0.5 for n, x in by_name.items()}
        row["ratios"] = {n: row["triton"][n] / max(row["torch"][n], 1e-9) for n in row["triton"]}
        row["of each draw"] = {
            n: [(x / max(y, 1e-18)) ** 0.5 for x, y in zip(a, squares["torch"][n], strict=True)]
            for n, a in squares["triton"].items()
        }
        row["worst"] = max(row["ratios"].items(), key=lambda r: r[1])
        rows.append(row)
        print(" ", row["case"], "worst ratio", row["worst"])
    return rows


SECTIONS = {
    "training": training_rows,
    "peers": peer_rows,
    "layers": model_rows,
    "forward": forward_rows,
}


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out", type=Path)
    p.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS,
                   help="others stay in OUT as they are, if it is of the same versions and device")  # fmt: skip
    args = p.parse_args()
    made = record() | {"matrix_flops": matrix_rate()}
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if all(before.get(k) == made[k] for k in ("device", "versions", "date")):
            made |= {k: v for k, v in before.items() if k in SECTIONS}
    for section in args.sections:
        try:
            made[section] = SECTIONS[section]()
        except Exception:
            made[section] = {"error": traceback.format_exc()}
            print(section, "FAILED", made[section]["error"][-1500:])
        args.out.write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
