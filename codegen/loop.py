"""What one scan kernel does, before it is rendered: a graph, where its arguments come from, where its results go."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx
from tttc.passes.backward import Backward

from tttc.ir import ops
from tttc.ir.apart import apart
from tttc.ir.body import Body, operands_of, role
from tttc.ir.build import ancestors, dims_of
from tttc.ir.program import Program


@dataclass(frozen=True)
class Source:
    """Where an argument of the graph comes from.

    ``kind``: "state" (carried from mini-batch to mini-batch, loaded once), "saved" (one value a mini-batch,
    ``[B, H, N, ...]``), "held" (``[B, H, ...]``, the same for all tokens), "value" (what an earlier kernel made for every mini-batch, ``[B, H, N, ...]``), "token" (a
    tile of tokens, ``[B, H, T, ...]``), "shared" (``[H, ...]``) or "constant" (no leading axes).
    """

    kind: str
    name: str  # of the tensor in the kernel's signature


@dataclass(frozen=True)
class Sink:
    """Where a result of the graph goes.

    ``kind``: "state" (the next value of the state ``name``), "token" (stored tile by tile, ``[B, H, T, ...]``),
    "sum" (added up over the mini-batches of a program, ``[B, H, ...]``, or ``[B, H, N, ...]`` where programs
    run in parallel), "value" (stored for a later kernel, ``[B, H, N, ...]``).
    """

    kind: str
    name: str


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: what lies from ``offset`` on along ``dim``."""

    of: str
    dim: str
    offset: int


@dataclass
class Loop:
    """One kernel: a program a (batch, head), or a (batch, head, mini-batch) where ``parallel``."""

    name: str
    graph: fx.Graph
    sizes: dict[str, int]
    mini_batch_size: int
    sources: dict[fx.Node, Source]
    sinks: list[tuple[fx.Node, Sink]]
    tokens: bool = True  # the graph handles a tile of tokens (dimension t), not one token
    refresh: int | None = None  # one token at a time: the anchors are refreshed every so many
    reverse: bool = False  # mini-batches from the last to the first
    parallel: bool = False  # mini-batches are independent
    once: bool = False  # there is only one mini-batch
    save: tuple[str, ...] = ()  # states stored before mini-batches, as ``saved_<name>``
    interval: int = 1  # of the mini-batches before which states are stored
    store_state: bool = True  # the states are stored after the last mini-batch
    pieces: dict[str, Piece] = field(default_factory=dict)  # of arguments, by name
    whole: dict[str, int] = field(default_factory=dict)  # sizes of dimensions that are in pieces
    notes: list[str] = field(default_factory=list)

    @property
    def states(self) -> list[str]:
        """The names of the carried states, in order."""
        return list(dict.fromkeys(s.name for s in self.sources.values() if s.kind == "state"))

    def piece(self, tensor: str) -> Piece | None:
        """What part of which tensor an argument is (``saved_`` and ``new_`` states too), None for a whole one."""
        for prefix in ("", "saved_", "new_"):
            if found := self.pieces.get(tensor.removeprefix(prefix)):
                lead = prefix if tensor.startswith(prefix) else ""
                return Piece(lead + found.of, found.dim, found.offset)
        return None

    def whole_size(self, dim: str) -> int:
        """The size of a feature dimension, all of its pieces together."""
        return self.whole.get(dim, self.sizes[dim])


def scan_loop(
    name: str,
    body: Body,
    mini_batch_size: int,
    live: set[int],
    *,
    save: set[int] | None = None,
    interval: int = 1,
    continued: bool = False,
    store_state: bool = True,
    outputs: bool = True,
) -> Loop:
    """The loop of a forward body.

    Args:
        live: the state leaves to compute.
        save: the state leaves whose anchors are stored for every ``interval``-th mini-batch.
        continued: one mini-batch, or part of one, from a carry that has left its anchor.
        store_state: store the states after the last mini-batch.
        outputs: store outputs; without, states are all there is to make.
    """
    sources: dict[fx.Node, Source] = {}
    for node in body.placeholders:
        kind, index = role(node)
        if kind in ("anchor", "carry"):
            if body.batched and not continued:
                sources[node] = Source("state", f"anchor_{index}")
            else:
                sources[node] = Source("state", f"{kind}_{index}")
        else:
            sources[node] = Source(kind, f"{kind}_{index}")
    sinks: list[tuple[fx.Node, Sink]] = []
    results = body.results
    carried = "anchor" if body.batched and not continued else "carry"
    sinks += [(results[i], Sink("state", f"{carried}_{i}")) for i in sorted(live)]
    if outputs:
        sinks += [
            (node, Sink("token", f"output_{k}")) for k, node in enumerate(results[body.states :])
        ]
    return Loop(
        name,
        body.gm.graph,
        body.sizes,
        mini_batch_size if body.batched else 1,
        sources,
        sinks,
        tokens=body.batched,
        # At 1 the body reads no anchor: there is none to refresh.
        refresh=None if body.batched or mini_batch_size == 1 else mini_batch_size,
        once=continued,
        save=tuple(f"{carried}_{i}" for i in sorted(save or ())),
        interval=interval,
        store_state=store_state,
    )


def backward_loop(name: str, made: Backward, mini_batch_size: int, handed_on: str) -> Loop:
    """The loop of a VJP: mini-batches from the last to the first, each from the states saved at its start.

    Carried are the cotangents of the state, ``gstate_k``. Cotangents of tokens (``gtoken_k``) are stored tile by
    tile, those of parameters (``gshared_k``), and of states that are not carried, added up. ``handed_on``: the
    kind of state whose cotangents are carried, "anchor" or "carry".
    """
    body = made.body
    kinds = {"anchor": "saved", "carry": "saved", "gstate": "state", "goutput": "token"}
    sources = {
        node: Source(kinds.get(role(node)[0], role(node)[0]), str(node.target))
        for node in body.placeholders
    }
    given = {str(node.target) for node in body.placeholders}
    sinks = []
    for leaf, node in zip(made.wanted, body.results, strict=True):
        kind, _, index = leaf.rpartition("_")
        if kind == handed_on and f"gstate_{index}" in given:
            sinks.append((node, Sink("state", f"gstate_{index}")))
        else:
            sinks.append((node, Sink("token" if kind == "token" else "sum", f"g{leaf}")))
    size = mini_batch_size if body.batched else 1
    return Loop(
        name, body.gm.graph, body.sizes, size, sources, sinks, tokens=body.batched, reverse=True
    )


def used(loop: Loop) -> set[fx.Node]:
    """The nodes that the results of a loop need."""
    return ancestors(node for node, _ in loop.sinks)


def only_products_read(loop: Loop, node: fx.Node) -> bool:
    """Whether a matrix is read by matrix products alone, which round it to the dtype of their operands anyway.

    A sum that only products read, such as a state's after its update, counts as one of them: it is rounded once more.
    """
    results = {n for n, _ in loop.sinks}
    wanted = used(loop)

    def is_product(user: fx.Node) -> bool:
        products = (ops.contraction, ops.masked_contraction)
        return user.target in products and len(user.all_input_nodes) == 2

    def rounds(user: fx.Node) -> bool:
        if is_product(user):
            return True
        total = user.target is ops.elementwise and user.args[0] in ("add", "sub")
        return (
            total
            and set(dims_of(user)) == set(dims_of(node))
            and user not in results
            and all(is_product(u) for u in user.users if u in wanted)
        )

    return len(dims_of(node)) > 1 and all(rounds(u) for u in node.users if u in wanted)


def forgotten(loop: Loop) -> str:
    """A state that may lose what is not finite in the old one; empty for none.

    Sums keep it, and so do products with whatever: infinity times zero is NaN.
    """
    first = {"add": 2, "sub": 2, "mul": 2, "neg": 1, "div": 1}  # of how many operands
    for node, sink in loop.sinks:
        if sink.kind != "state":
            continue
        keep = {n for n, s in loop.sources.items() if s.kind == "state" and s.name == sink.name}
        for x in loop.graph.nodes:
            if x.target in (ops.elementwise, ops.contraction):
                count = first.get(str(x.args[0]), 0) if x.target is ops.elementwise else None
                if any(y in keep for y in operands_of(x)[:count]):
                    keep.add(x)
        if node not in keep:
            return sink.name
    return ""


def constant_tensors(program: Program, device: torch.device) -> dict[str, torch.Tensor]:
    """The constants of a program by the names a loop gives them, brought to a device once.

    Copies from the host make it wait for the device, and cannot be captured in a CUDA graph.
    """
    if not program.token.constants:
        return {}
    if device not in program.constants:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a CUDA graph is recorded of a scan that never ran on this device: run it once before")  # fmt: skip
        program.constants[device] = apart(
            device,
            lambda: {f"constant_{i}": x.to(device) for i, x in enumerate(program.token.constants)},
        )
    return dict(program.constants[device])
