"""Blocks of a model that are alike are traced by TorchDynamo once.

::

    x = block0(x)       traced
    x = block1(x)       the same nodes again, with the parameters of block1; and, on what block1 holds, the
    ...                 guards that tracing block0 left on what block0 holds

This is PyTorch's ``nested_compile_region`` with two things more. What it traced of one block PyTorch takes for another
if those guards hold there that it has a test for: here the two also have to be alike in all that makes a module. And
on the other it keeps no guards, so that a change of it would go unseen: here it has those of the first.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from tttc.capture import stamps
from tttc.capture.same_blocks import Pairs, alike, by_another_name, guarded, is_known
from tttc.ir.copies import another

try:
    from torch._dynamo.variables import invoke_subgraph as dynamo

    _known: Callable[..., bool] | None = dynamo.is_reusable
except (ImportError, AttributeError):  # a PyTorch that traces every block anew, but for our stamps
    _known = None

LIMIT = 1 << 16  # kinds of blocks in a model: PyTorch raises where there are more

wanted = False  # read by models while they are traced
_lock = threading.Lock()
_within = 0  # threads that trace blocks once now


def takes(target: Any) -> bool:
    """Whether blocks of this model may be traced once: nobody's hooks run between them, nobody's modules in them."""
    return (
        (_known is not None or stamps.WORK)
        and isinstance(target, nn.Module)
        and not any(
            hooks
            for m in target.modules()
            for name, hooks in vars(m).items()
            if name.endswith("_hooks")
        )
        and all(map(is_known, _in_ours(target)))
    )


def _in_ours(target: nn.Module) -> Iterator[nn.Module]:
    """The modules in models of the package, which may be parts of somebody's."""
    ours = type(target).__module__.startswith("tttc.")
    for child in target.children():
        yield from child.modules() if ours else _in_ours(child)


@contextlib.contextmanager
def traced_once(on: bool) -> Iterator[None]:
    """Within, models send their blocks through :func:`run`, and PyTorch asks :func:`_reusable`."""
    if not on:
        yield
        return
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(more: int) -> None:
    """A thread that begins or ends: the last one leaves PyTorch as it was."""
    global wanted, _within
    with _lock:
        _within += more
        wanted = _within > 0
        if _known is None:
            stamps.switch(wanted, _run)
        else:
            dynamo.is_reusable = _reusable if wanted else _known  # type: ignore[assignment]


def _run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = block(x)
    return y


# ``block(x)``: under TorchDynamo one node, until :func:`put_in_place`.
_options: dict[str, Any] = {} if _known is None else {"max_reuse_entries": LIMIT}
run = (
    torch.compiler.nested_compile_region(_run, **_options)
    if _known is not None or stamps.WORK
    else _run
)


def put_in_place(gm: fx.GraphModule) -> None:
    """Put the nodes of blocks in the place of the calls they were traced as, in a captured graph, in place."""
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
    traced: dict[str, Any] = {}  # the operands of the block that was traced
    for call in calls:
        at, region, *operands = call.args
        renamed = _renaming(traced.setdefault(region, operands), operands)
        inner = getattr(gm, at.target)
        given = iter(operands)
        env: dict[fx.Node, Any] = {}
        with gm.graph.inserting_before(call):
            for node in inner.graph.nodes:
                if node.op == "placeholder":
                    env[node] = next(given)
                elif node.op != "output":
                    env[node] = made = another(gm.graph, node, env.__getitem__)
                    if node.op == "get_attr":
                        made.target = f"{region}_{node.target.replace('.', '_')}"
                        setattr(gm, made.target, attrgetter(node.target)(inner))
                    stack = made.meta.get("nn_module_stack") or {}
                    made.meta["nn_module_stack"] = {
                        key: (renamed(name), kind) for key, (name, kind) in stack.items()
                    }
        results = inner.graph.output_node().args[0]
        for pick in list(call.users):
            pick.replace_all_uses_with(env[results[pick.args[1]]])
            gm.graph.erase_node(pick)
        gm.graph.erase_node(call)
        if not at.users:
            gm.graph.erase_node(at)
    if calls:  # what nobody reads stays: it may write into a tensor, which fx takes for nothing
        gm.delete_all_unused_submodules()
        gm.recompile()


_MODULE = re.compile(r"\._modules\['([^']*)'\]")


def _renaming(traced: list[fx.Node], given: list[fx.Node]) -> Callable[[str], str]:
    """From names of modules in the block that was traced to those in another, by where their operands are from."""
    for one, other in zip(traced, given, strict=True):
        sources = [n.meta["grapharg"].source.name for n in (one, other) if n.meta.get("grapharg")]
        names = [_MODULE.findall(source) for source in sources]
        if len(names) != 2 or len(names[0]) != len(names[1]) or names[0] == names[1]:
            continue
        depth = next(i for i, (a, b) in enumerate(zip(*names, strict=True)) if a != b) + 1
        root = sources[0].partition("._modules")[0]
        old, new = (".".join([root, *path[:depth]]) for path in names)
        return lambda name: new + name[len(old) :] if f"{name}.".startswith(f"{old}.") else name
    return lambda name: name


def _reusable(tx: Any, condition: Any, fingerprint: Any, entry: Any) -> bool:
    """In the place of PyTorch's: whether what was traced of one block is what would be traced of another."""
    assert _known is not None
    if not _known(tx, condition, fingerprint, entry):
        return False
    caches = tx.output.tracing_context.hop_dispatch_set_cache
    known = caches.get_cache(torch.ops.higher_order.invoke_subgraph).subgraph_reuse_cache
    if all(e is not entry for _, e in known.get(_run.__code__, ())):
        return True  # a region of somebody else
    if stamps.touched(tx):
        return False
    pairs = zip(entry.arg_sources, fingerprint.arg_sources, strict=True)
    changed = [(a, b) for a, b in pairs if a is not None and b is not None and a != b]
    value = tx.output.resolve_source_value
    same = Pairs()
    if not all(alike(value(old), value(new), same) for old, new in changed):
        return False
    arguments = {getattr(x, "source", None) for x in entry.subgraph_input_mapping}
    block = entry.arg_sources[0]
    return not by_another_name(tx, arguments, block, same, value) and guarded(
        tx, entry, changed, arguments, value
    )
