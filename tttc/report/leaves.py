"""What the user calls the arguments and results of a step: ``carry.W1``, ``token.k``."""

from __future__ import annotations

import inspect
from typing import Any

from torch.utils import _pytree as pytree

from tttc import _tracing
from tttc._scan_op import InternedStep

KINDS = ("anchor", "carry", "token", "shared")


def leaf_names(entry: InternedStep) -> dict[str, str]:
    """The user's name for each argument of a body: ``{"token_1": "token.k"}``; ``state_0``, ``output_0`` too."""
    anchor, carry, tokens, shared = entry.structure[2]
    carry = anchor if carry == _tracing.NONE else carry
    counts = [len(entry.shapes[i]) for i in (0, 0, 1, 2)]
    table: dict[str, str] = {}
    groups = zip(
        KINDS, _parameters(entry.step), (anchor, carry, tokens, shared), counts, strict=True
    )
    for kind, said, structure, count in groups:
        for i, path in enumerate(_paths(structure, count)):
            table[f"{kind}_{i}"] = f"{said}{path}"
    said = _parameters(entry.step)[1]
    for i, path in enumerate(_paths(anchor, counts[0])):
        table[f"state_{i}"] = f"new {said}{path}"
    for i, path in enumerate(_paths(entry.output, len(entry.outputs))):
        table[f"output_{i}"] = f"output{path}"
    # Cotangents, which a backward is given.
    made = [name for name in table if name.startswith(("state_", "output_"))]
    return table | {f"g{name}": f"∂ {table[name]}" for name in made}


def _paths(structure: Any, count: int) -> list[str]:
    tree = _tracing.rebuild(structure, list(range(count)))
    found, _ = pytree.tree_flatten_with_path(tree)
    return [pytree.keystr(path) for path, leaf in found if isinstance(leaf, int)][:count]


def _parameters(step: Any) -> tuple[str, ...]:
    """The step's own names for (anchor, carry, token, shared)."""
    try:
        names = tuple(inspect.signature(step).parameters)
    except (TypeError, ValueError):
        return KINDS
    return names if len(names) == len(KINDS) else KINDS
