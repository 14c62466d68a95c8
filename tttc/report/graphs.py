"""The graphs of a report: every node with its kind, what it does in words, and its dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import fx

from tttc.ir import ops
from tttc.ir.body import Body, head_of, operands_of, role, source_line, spec_of
from tttc.ir.build import dims_of
from tttc.ir.spec import parse
from tttc.report.records import GraphReport, NodeReport

ROLES = {"anchor": "state", "carry": "state", "token": "token", "shared": "parameter"}
COTANGENTS = {"gstate": "state", "goutput": "token"}
VIEWS = ("rename", "last", "broadcast", "at_last")
CONTRACTIONS = ("mm", "bmm", "mv", "dot", "addmm", "baddbmm", "einsum", "matmul", "linear", "convolution",
                "_scaled_dot_product_flash_attention", "scaled_dot_product_attention")  # fmt: skip
REDUCTIONS = ("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "var_mean", "argmax", "argmin",
              "cumsum", "norm", "linalg_vector_norm", "native_layer_norm", "_softmax", "layer_norm")  # fmt: skip
MOVES = ("view", "reshape", "_unsafe_view", "t", "transpose", "permute", "expand", "squeeze", "unsqueeze", "clone",
         "slice", "select", "cat", "stack", "copy", "alias", "detach", "contiguous", "index", "getitem", "_to_copy",
         "sym_size", "unbind", "split", "chunk", "lift_fresh_copy", "broadcast_to")  # fmt: skip


def stage_graph(
    stage: Body | fx.GraphModule, names: Mapping[str, str], wanted: Sequence[str] | None = None
) -> GraphReport:
    """The graph of a stage of a scan.

    ``names`` are the user's, as :func:`tttc.report.leaves.leaf_names` has them; ``wanted``: of a VJP, the arguments
    whose cotangents it returns.
    """
    if isinstance(stage, Body):
        return GraphReport(_body_nodes(stage, names, wanted))
    kinds = [k for k, n in zip(ROLES, stage.meta.get("counts", ()), strict=False) for _ in range(n)]
    first = {k: kinds.index(k) for k in kinds}
    roles = [f"{k}_{i - first[k]}" for i, k in enumerate(kinds)]
    return aten_graph(stage, names, roles)


def _body_nodes(
    body: Body, names: Mapping[str, str], wanted: Sequence[str] | None
) -> list[NodeReport]:
    nodes = []
    for node in body.gm.graph.nodes:
        if node.op == "placeholder" and node.users:
            kind = (ROLES | COTANGENTS).get(role(node)[0], "constant")
            said = names.get(str(node.target), str(node.target))
            nodes.append(NodeReport(node.name, kind, said, "", dims_of(node), ()))
        elif node.op == "call_function":
            kind, operation, detail = operation_of(node)
            inputs = tuple(x.name for x in node.all_input_nodes)
            report = NodeReport(node.name, kind, operation, detail, dims_of(node), inputs)
            nodes.append(report)
    for i, node in enumerate(body.results):
        key = f"state_{i}" if i < body.states else f"output_{i - body.states}"
        said = names.get(key, key)
        if wanted is not None:
            key, said = f"g{wanted[i]}", f"∂ {names.get(wanted[i], wanted[i])}"
        nodes.append(NodeReport(key, "result", said, "", dims_of(node), (node.name,)))
    return nodes


def operation_of(node: fx.Node) -> tuple[str, str, str]:
    """Kind, words and details of an operator of the IR."""
    name = ops.OPERATORS[node.target]
    spec = parse(spec_of(node)) if name in KNOWN else None
    if spec is None:
        return "other", name, " ".join(str(a) for a in node.args if isinstance(a, str))
    detail = (
        f"{', '.join(' '.join(o) or '1' for o in spec.operands)} → {' '.join(spec.result) or '1'}"
    )
    summed = " ".join(spec.summed)
    if name == "contraction":
        if len(spec.operands) == 1:
            return "reduction", f"sum over {summed}", detail
        return "contraction", f"sum over {summed}" if summed else "product", detail
    if name == "masked_contraction":
        relation = head_of(node).replace("<=", "≤")
        return "contraction", f"sum over {summed or '—'}, {relation}", detail
    if name == "elementwise":
        numbers = [f"{x:.6g}" for x in operands_of(node) if isinstance(x, (int, float))]
        return "elementwise", " ".join([head_of(node), *numbers]), detail
    if name == "reduction":
        return "reduction", f"{head_of(node)} over {summed}", detail
    if name == "masked":
        return "elementwise", f"mask {head_of(node).replace('<=', '≤')}", detail
    if name == "triangular_solve":
        return "contraction", f"solve, {head_of(node)}", detail
    if name == "running_product":
        return "elementwise", f"running product, {head_of(node).replace('<=', '≤')}", detail
    return "view", {"last": "last token", "at_last": "at last token"}.get(name, name), detail


KNOWN = (
    "contraction",
    "masked_contraction",
    "triangular_solve",
    "running_product",
    "elementwise",
    "reduction",
    "masked",
    *VIEWS,
)


def aten_graph(
    gm: fx.GraphModule,
    names: Mapping[str, str] | None = None,
    roles: Sequence[str] = (),
    only: set[fx.Node] | None = None,
    sizes: Mapping[sympy.Expr, int] = MappingProxyType({}),
) -> GraphReport:
    """The graph of a module in ATen operators.

    Args:
        names: the user's names of arguments, by role or by node.
        roles: of the placeholders, where the module is a step.
        only: some of the nodes.
        sizes: numbers for symbolic sizes.
    """
    nodes = []

    def shape(node: fx.Node) -> tuple[str, ...]:
        value = node.meta.get("val", node.meta.get("example_value"))
        if isinstance(value, (tuple, list)) and value:  # several results: like the first
            value = value[0]
        if not isinstance(value, torch.Tensor):
            return ()
        return tuple(str(_number(n, sizes)) for n in value.shape)

    graph = [n for n in gm.graph.nodes if (only is None or n in only) and not _is_number(n)]
    known = {n.name for n in graph}
    place = {n: i for i, n in enumerate(n for n in gm.graph.nodes if n.op == "placeholder")}
    for node in graph:
        if node.op in ("placeholder", "get_attr"):
            if not node.users:
                continue
            key = roles[place[node]] if node in place and place[node] < len(roles) else ""
            own = node.op == "get_attr" or node.name in (names or {})
            kind = ROLES.get(key.rpartition("_")[0], "parameter" if own else "token")
            said = (names or {}).get(key or node.name, str(node.target))
            nodes.append(NodeReport(node.name, kind, said, "", shape(node), ()))
        elif node.op.startswith("call_"):
            kind, said = _aten_kind(node)
            numbers = [f"{x:.6g}" for x in node.args if isinstance(x, float)]
            inputs = tuple(x.name for x in node.all_input_nodes if x.name in known)
            line = source_line(node)
            operation = " ".join([said, *numbers])
            nodes.append(NodeReport(node.name, kind, operation, "", shape(node), inputs, "", line))
    if only is None:
        states = sum(r.startswith("carry_") for r in roles)
        returned = gm.graph.output_node().args[0]
        for i, node in enumerate(returned if isinstance(returned, (tuple, list)) else (returned,)):
            if isinstance(node, fx.Node):
                key = f"state_{i}" if i < states else f"output_{i - states}"
                said = (names or {}).get(key, key.replace("_", " "))
                nodes.append(NodeReport(key, "result", said, "", shape(node), (node.name,)))
    return GraphReport(nodes)


def _aten_kind(node: fx.Node) -> tuple[str, str]:
    if node.op == "call_module":
        module = node.graph.owning_module
        found = getattr(module, str(node.target), None) if module is not None else None
        inside = getattr(getattr(found, "graph_module", found), "graph", None)
        count = sum(n.op.startswith("call_") for n in inside.nodes) if inside is not None else 0
        return "elementwise", f"fused, {count} operators" if count else str(node.target)
    target: Any = node.target
    namespace = str(getattr(target, "namespace", ""))
    name = getattr(target, "__name__", str(target)).partition(".")[0]
    if namespace == "tttc":
        return "contraction", "tttc scan"
    if name in CONTRACTIONS:
        return "contraction", name
    if name in REDUCTIONS:
        return "reduction", name
    if name in MOVES:
        return "view", name
    return "elementwise", name


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val", node.meta.get("example_value")), (int, torch.SymInt))


def _number(n: Any, sizes: Mapping[sympy.Expr, int]) -> Any:
    return n.node.expr.subs(sizes) if isinstance(n, torch.SymInt) else n
