"""The steps behind the scans of a graph: what they are called in another process, and whether they are the same there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tttc._scan_op import approximation, intern_known, interned
from tttc.ir.body import Body
from tttc.ir.program import Program
from tttc.pipeline import build_program, forget, in_tokens, unseen
from tttc.tuning.plan import Plan
from tttc.warm.names import resolve
from tttc.warm.recording import NotKept


@dataclass(frozen=True)
class Step:
    """A step as it is written.

    Attributes:
        place: the module and the name of its function.
        returned: the tree of what it returns, shapes and dtypes.
        derived: what was made of it ("anchor", "tokens"), in order.
        outputs: as ``returned``, of the last of these.
        programs: of each mini-batch size the digest of its program, and plans that rules made for it: to make them takes
            as long as to capture the step.
        device: where it runs.
    """

    place: tuple[str, str]
    structure: Any
    shapes: Any
    dtypes: Any
    returned: Any
    derived: tuple[str, ...]
    outputs: Any
    programs: tuple[tuple[int, str, dict[Any, Plan]], ...]
    device: torch.device


def written(key: str, used: set[tuple[int, torch.device]]) -> Step:
    """The step behind a key, at these mini-batch sizes.

    Raises:
        NotKept: where its function has no name.
    """
    entry = interned(key)
    function: Any = entry.step
    place = (function.__module__, function.__qualname__)
    if "<locals>" in place[1] or resolve(*place) is not function:
        raise NotKept(f"the step {place[1]} is in no module")
    base, *derived = key.split("@")
    first = interned(base)
    built = [(n, build_program(entry, n)) for n in {n for n, _ in used}]
    programs = tuple((n, digest(program), dict(program.rules)) for n, program in built)
    device = next(device for _, device in used)
    return Step(
        place,
        first.structure,
        first.shapes,
        first.dtypes,
        (first.output, first.outputs),
        tuple(derived),
        (entry.output, entry.outputs),
        programs,
        device,
    )


def read(step: Step) -> str:
    """The key of a step in this process.

    Its function is captured anew: programs say what it computes now, whatever it is made of.

    Raises:
        NotKept: where it is another one.
    """
    function = resolve(*step.place)
    with unseen():  # until it is known to return what it is said to
        base, new = intern_known(function, step.structure, step.shapes, step.dtypes, *step.returned)
        try:
            return _checked(base, step)
        except BaseException:
            if new:
                forget(base)
            raise


def _checked(base: str, step: Step) -> str:
    key: str | None = base
    for how in step.derived:
        if key is not None:
            key = approximation(key) if how == "anchor" else in_tokens(key)
    if key is None:
        raise NotKept(f"the step {step.place[1]} has changed")
    entry = interned(key)
    programs = [build_program(entry, size) for size, *_ in step.programs]
    if (entry.output, entry.outputs) != step.outputs or any(
        _returned(program) != step.returned or digest(program) != wanted
        for program, (_, wanted, _) in zip(programs, step.programs, strict=True)
    ):
        raise NotKept(f"the step {step.place[1]} has changed")
    for program, (*_, rules) in zip(programs, step.programs, strict=True):
        program.rules = rules | program.rules
    return key


def _returned(program: Program) -> Any:
    """The tree of what the step returned when it was captured, shapes and dtypes."""
    return program.stages["capture"].meta["returned"]  # type: ignore[union-attr]


def digest(program: Program) -> str:
    """What a program computes."""
    bodies = (program.token, program.full, program.continued)
    lines = [repr((program.mini_batch_size, program.reason, program.chunk_size))]
    lines += ["" if body is None else _text(body) for body in bodies]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _text(body: Body) -> str:
    number: dict[fx.Node, int] = {}

    def plain(x: Any) -> Any:
        return ("node", number[x]) if isinstance(x, fx.Node) else x

    lines = [
        repr((sorted(body.sizes.items()), body.states, sorted(body.leaf_shapes.items()))),
        repr((body.output_shapes, body.batched, sorted(body.whole))),
        *(repr((x.dtype, x.tolist())) for x in body.constants),
    ]
    for i, node in enumerate(body.gm.graph.nodes):
        number[node] = i
        target = node.target if isinstance(node.target, str) else str(node.target)
        if not isinstance(node.target, str):
            target = getattr(node.target, "__name__", target)
        arguments = (
            fx.node.map_aggregate(node.args, plain),
            fx.node.map_aggregate(node.kwargs, plain),
        )  # type: ignore[arg-type]
        lines.append(repr((node.op, target if node.op != "output" else "", arguments)))
    return "\n".join(lines)
