"""The Triton backend of a scan: which kernels a call takes, on which tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from tttc.codegen.kernel import Kernel
from tttc.codegen.loop import constant_tensors, scan_loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.torch_scan import squeeze_features
from tttc.codegen.triton_loop import render
from tttc.ir.program import Program
from tttc.passes.prune_state import live_states
from tttc.runtime.launch import Launch, launch

Tensor = torch.Tensor
Launcher = Callable[[Launch], None]
_lock = threading.Lock()


def scan_kernel(
    program: Program, part: str, states: bool = True, schedule: Schedule | None = None
) -> Kernel:
    """One kernel of a program, rendered once.

    ``part``: "full" (all mini-batches), "continued" (one mini-batch from any carry) or "tokens" (token after
    token); ``states``: whether the final states are wanted.

    Raises:
        NotLowerable: where an operator has no Triton form.
    """
    with _lock:
        schedule = schedule or program.schedules.get(part) or Schedule()
        if (part, states, schedule) not in program.kernels:
            body = {"tokens": program.token, "continued": program.continued}.get(part, program.full)
            assert body is not None
            live = live_states(
                body, range(body.states) if states else [], range(len(body.results) - body.states)
            )
            loop = scan_loop(
                f"scan_{part}",
                body,
                program.mini_batch_size,
                live,
                continued=part == "continued",
                store_state=states,
            )
            program.kernels[part, states, schedule] = render(loop, schedule)
        return program.kernels[part, states, schedule]


def run_kernels(
    program: Program,
    anchor: Sequence[Tensor],
    carry: Sequence[Tensor],
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    place: int,
    output_dtype: torch.dtype,
    states: bool = True,
    launcher: Launcher = launch,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Scan by kernels; arguments and results as :func:`tttc.codegen.torch_scan.run_program`.

    Tokens keep their dtypes. Outputs are laid out ``[B, T, H, ...]`` in memory, as projections take them.
    ``states=False`` leaves the states out; the lists are then empty. ``launcher`` gets every launch there is:
    one that only records them, on meta tensors, tells what a call would run.
    """
    batch, heads, length = tokens[0].shape[:3]
    shapes = [x.shape for x in anchor]
    named: dict[str, Tensor] = constant_tensors(program.token, anchor[0].device)
    named |= {f"shared_{i}": squeeze_features(x, 1) for i, x in enumerate(shared)}
    now_anchor = [squeeze_features(x, 2) for x in anchor]
    now_carry = [squeeze_features(x, 2) for x in carry] if carry else now_anchor
    rows = [squeeze_features(x, 3) for x in tokens]
    outputs = [
        torch.empty(
            batch, length, heads, *shape, dtype=output_dtype, device=tokens[0].device
        ).transpose(1, 2)
        for shape in program.token.output_shapes
    ]
    results = [squeeze_features(x, 3) for x in outputs]

    def run(part: str, start: int, count: int, place: int, states: bool) -> None:
        nonlocal now_anchor, now_carry
        kernel = scan_kernel(program, part, states)
        given = dict(named)
        given |= {f"token_{i}": x[:, :, start : start + count] for i, x in enumerate(rows)}
        given |= {f"output_{i}": x[:, :, start : start + count] for i, x in enumerate(results)}
        given |= {f"anchor_{i}": x for i, x in enumerate(now_anchor)}
        given |= {f"carry_{i}": x for i, x in enumerate(now_carry)}
        made = {
            name: torch.empty_like(given[name[4:]], memory_format=torch.contiguous_format)
            for name, _ in kernel.config["arguments"]
            if name.startswith("new_")
        }
        launcher(
            Launch(kernel, {**given, **made}, (batch * heads,), count, heads, place, output_dtype)
        )
        if not states:
            return
        new = "new_anchor_" if part == "full" else "new_carry_"
        now_carry = [made.get(f"{new}{i}", x) for i, x in enumerate(now_carry)]
        if part == "tokens":
            now_anchor = [made.get(f"new_anchor_{i}", x) for i, x in enumerate(now_anchor)]
        if (place + count) % program.mini_batch_size == 0:
            now_anchor = now_carry

    if program.sequential:
        run("tokens", 0, length, place, states)
    else:
        b = program.mini_batch_size
        start = min((-place) % b, length)
        # A mini-batch that stays unfinished leaves its anchor as state: it is run by itself.
        whole = (length - start) // b * b if states else length - start
        rest = length - start - whole
        if start:
            run("continued", 0, start, place, states or whole > 0)
        if whole:
            run("full", start, whole, 0, states)
        if rest:
            run("continued", start + whole, rest, 0, states)
    if not states:
        return [], [], outputs
    return (
        [x.reshape(s) for x, s in zip(now_anchor, shapes, strict=True)],
        [x.reshape(s) for x, s in zip(now_carry, shapes, strict=True)],
        outputs,
    )
