"""The operators of the IR: ordinary functions on tensors, so that every stage runs.

Each takes a spec that names the last axes of its operands; axes before them (batch, heads) are mapped
over and broadcast as in torch. In graphs each node's ``meta["dims"]`` holds the names of its result.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from tttc.ir.functions import FUNCTIONS
from tttc.ir.spec import Dims, parse, parse_relation

Tensor = torch.Tensor


def align(x: Any, dims: Dims, target: Dims) -> Any:
    """``x`` with its last axes in the order of ``target``, size 1 where it lacks one."""
    if not isinstance(x, Tensor) or dims == target:
        return x
    lead = x.ndim - len(dims)
    order = [d for d in target if d in dims]
    if tuple(order) != dims:
        x = x.permute(*range(lead), *(lead + dims.index(d) for d in order))
    if len(order) != len(target):
        shape = iter(x.shape[lead:])
        x = x.reshape(*x.shape[:lead], *(next(shape) if d in dims else 1 for d in target))
    return x


@cache
def _einsum_equation(spec: str) -> str:
    parsed = parse(spec)
    letter = {label: chr(ord("a") + i) for i, label in enumerate(parsed.labels)}
    operands = ",".join("..." + "".join(letter[d] for d in o) for o in parsed.operands)
    return f"{operands}->...{''.join(letter[d] for d in parsed.result)}"


@cache
def product_plan(spec: str) -> tuple[Dims, Dims, Dims] | None:
    """How to run a contraction of two operands as one ``matmul``: orders of left, right and result."""
    parsed = parse(spec)
    if len(parsed.operands) != 2:
        return None
    left, right = parsed.operands
    batch = [d for d in parsed.result if d in left and d in right]
    rows = [d for d in parsed.result if d in left and d not in right]
    columns = [d for d in parsed.result if d in right and d not in left]
    inner = [d for d in parsed.summed if d in left and d in right]
    if len(parsed.summed) != 1 or len(inner) != 1 or len(rows) != 1 or len(columns) != 1:
        return None
    return (
        (*batch, rows[0], inner[0]),
        (*batch, inner[0], columns[0]),
        (*batch, rows[0], columns[0]),
    )


def contraction(spec: str, *operands: Tensor) -> Tensor:
    """The product of the operands, summed over the names that the result lacks.

    >>> contraction("t i, i j -> t j", torch.ones(2, 3), torch.ones(3, 4)).shape
    torch.Size([2, 4])
    """
    parsed = parse(spec)
    if len(operands) == 1:
        (dims,) = parsed.operands
        kept = tuple(d for d in dims if d in parsed.result)
        axes = [i - len(dims) for i, d in enumerate(dims) if d not in parsed.result]
        x = operands[0]
        return align(x.sum(axes) if axes else x, kept, parsed.result)
    plan = product_plan(spec)
    if plan is not None:
        left, right, result = plan
        product = torch.matmul(
            align(operands[0], parsed.operands[0], left),
            align(operands[1], parsed.operands[1], right),
        )
        return align(product, result, parsed.result)
    if not parsed.summed:
        x = align(operands[0], parsed.operands[0], parsed.result)
        for y, dims in zip(operands[1:], parsed.operands[1:], strict=True):
            x = x * align(y, dims, parsed.result)
        return x
    return torch.einsum(_einsum_equation(spec), *operands)


def _causal(relation: str, x: Tensor, earlier: int, later: int) -> Tensor:
    """The mask [later, earlier] of a relation."""
    strict = parse_relation(relation).strict
    mask = torch.ones(later, earlier, dtype=torch.bool, device=x.device)
    return mask.tril(-1 if strict else 0)


def _sizes(spec: str, operands: tuple[Tensor, ...]) -> dict[str, int]:
    sizes = {}
    for x, dims in zip(operands, parse(spec).operands, strict=True):
        for i, d in enumerate(dims):
            sizes[d] = x.shape[i - len(dims)]
    return sizes


def masked(relation: str, spec: str, x: Tensor) -> Tensor:
    """``x`` where the relation between two of its token dimensions holds, zero elsewhere."""
    r = parse_relation(relation)
    sizes = _sizes(spec, (x,))
    mask = _causal(relation, x, sizes[r.earlier], sizes[r.later])
    dims = parse(spec).operands[0]
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    x = torch.where(align(mask, (r.later, r.earlier), dims), x, zero)
    return align(x, dims, parse(spec).result)


def masked_contraction(relation: str, spec: str, *operands: Tensor) -> Tensor:
    """A contraction over the pairs of tokens for which the relation holds; the others contribute nothing.

    An operand that is not finite reaches only the tokens that see it, as it does token by token.
    """
    parsed, r = parse(spec), parse_relation(relation)
    sizes = _sizes(spec, operands)
    # A token dimension that only the relation ties has the size of the other.
    earlier = sizes.get(r.earlier, sizes.get(r.later, 0))
    later = sizes.get(r.later, sizes.get(r.earlier, 0))
    mask = _causal(relation, operands[0], earlier, later).to(operands[0].dtype)
    pair = (r.later, r.earlier)
    specs, values = list(parsed.operands), list(operands)
    both = [i for i, o in enumerate(specs) if r.earlier in o and r.later in o]
    if both:
        i = both[0]
        zero = torch.zeros((), dtype=values[i].dtype, device=values[i].device)
        values[i] = torch.where(align(mask, pair, specs[i]) != 0, values[i], zero)
    else:
        specs.insert(0, pair)
        values.insert(0, mask)
        i = 0
    text = f"{', '.join(' '.join(o) for o in specs)} -> {' '.join(parsed.result)}"
    raw = contraction(text, *values)
    rest = [k for k in range(len(values)) if k != i]
    # A sum is finite only where all of its terms are; the other way round it may overflow, which costs time alone.
    if raw.device.type == "cpu" and all(bool(values[k].sum().isfinite()) for k in rest):
        return raw
    # Zero times infinity is not a number: where a pair that holds meets a value that is not finite the
    # plain product is right, elsewhere the one without those values.
    clean = [v if k == i else v.nan_to_num(0.0, 0.0, 0.0) for k, v in enumerate(values)]
    held = align(mask, pair, specs[i]).expand_as(values[i])
    meets = torch.zeros_like(raw, dtype=torch.bool)
    for k in rest:
        ones = [held if m == i else torch.ones_like(v) for m, v in enumerate(values)]
        ones[k] = (~values[k].isfinite()).to(values[k].dtype)
        meets = meets | (contraction(text, *ones) > 0)
    return torch.where(meets, raw, contraction(text, *clean))


def running_product(relation: str, spec: str, x: Tensor) -> Tensor:
    """Products of per-token numbers over runs of tokens; never a quotient, so that zeros are exact.

    ``"s<=t"``, ``"t -> t"``: at t the product over the tokens up to t. ``"s<=t"``, ``"t -> t s"``: the product
    over the tokens after s and up to t, zero where s comes after t. With ``"s<t"`` token t itself is left out.

    >>> running_product("s<=t", "t -> t s", torch.tensor([2.0, 3.0, 5.0]))
    tensor([[ 1.,  0.,  0.],
            [ 3.,  1.,  0.],
            [15.,  5.,  1.]])
    """
    parsed, r = parse(spec), parse_relation(relation)
    (dims,), result = parsed
    x = align(x, dims, result)
    axis = result.index(r.later) - len(result)
    length = x.shape[axis]
    if r.strict:
        one = torch.ones_like(x.narrow(axis, 0, min(length, 1)))
        x = torch.cat([one, x.narrow(axis, 0, max(length - 1, 0))], axis)
    if r.earlier not in result:
        return x.cumprod(axis)
    pair = (r.later, r.earlier)
    ones = torch.ones(length, length, dtype=torch.bool, device=x.device)
    inside = align(ones.tril(-2 if r.strict else -1), pair, result)
    held = align(ones.tril(-1 if r.strict else 0), pair, result)
    one, zero = (torch.full((), n, dtype=x.dtype, device=x.device) for n in (1.0, 0.0))
    return torch.where(held, torch.where(inside, x, one).cumprod(axis), zero)


def triangular_solve(relation: str, spec: str, system: Any, x: Tensor) -> Tensor:
    """What ``y`` is where ``y[t] + sum over s of system[t, s] * y[s] = x[t]``, s those for which the relation holds.

    ``"s<t"``, ``"t s, t j -> t j"``: a unit-lower-triangular system, solved from the first token to the last;
    ``"t<s"``: from the last to the first. Only the entries the relation names are read. ``system`` may be a number,
    or lack a token dimension along which it is the same. What is not finite reaches only the tokens that are
    solved after it, as it does token by token.

    >>> triangular_solve("s<t", "t s, t -> t", torch.full((3, 3), 2.0), torch.ones(3))
    tensor([ 1., -1.,  1.])
    """
    parsed, r = parse(spec), parse_relation(relation)
    dims, result = parsed.operands[1], parsed.result
    (own,) = {r.earlier, r.later} & set(result)
    other = r.earlier if own == r.later else r.later
    columns = tuple(d for d in dims if d != own)
    shape = x.shape[x.ndim - len(dims) :]
    length = shape[dims.index(own)]
    rows = align(x, dims, (own, *columns))
    rows = rows.flatten(x.ndim - len(columns)) if columns else rows.unsqueeze(-1)
    pair = torch.as_tensor(system, dtype=x.dtype, device=x.device)
    pair = align(pair, parsed.operands[0], (own, other))
    pair = pair.expand(*pair.shape[: max(pair.ndim - 2, 0)], length, length)
    upper = own == r.earlier
    held = torch.ones(length, length, dtype=torch.bool, device=x.device)
    held = held.triu(1) if upper else held.tril(-1)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    pair = torch.where(held, pair, zero)

    def solved(pair: Tensor, rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(pair, rows, upper=upper, unitriangular=True)

    if x.device.type == "cpu" and bool(pair.isfinite().all()) and bool(rows.isfinite().all()):
        y = solved(pair, rows)
    else:
        bad = ~rows.isfinite() | ~pair.isfinite().all(-1, keepdim=True)
        later = bad.flip(-2).cummax(-2).values.flip(-2) if upper else bad.cummax(-2).values
        clean = solved(pair.nan_to_num(0.0, 0.0, 0.0), rows.nan_to_num(0.0, 0.0, 0.0))
        y = torch.where(later, torch.full_like(zero, torch.nan), clean)
    sizes = dict(zip(dims, shape, strict=True))
    y = y.reshape(*y.shape[:-1], *(sizes[d] for d in columns))
    return align(y, (own, *columns), result)


def elementwise(function: str, spec: str, *operands: Any) -> Tensor:
    """A function of :data:`tttc.ir.functions.FUNCTIONS` on operands aligned by name; numbers have no names.

    >>> elementwise("add", "t j, j -> t j", torch.ones(2, 3), torch.ones(3)).sum()
    tensor(12.)
    """
    parsed = parse(spec)
    aligned = [align(x, d, parsed.result) for x, d in zip(operands, parsed.operands, strict=True)]
    return FUNCTIONS[function].torch(*aligned)


def reduction(function: str, spec: str, x: Tensor) -> Tensor:
    """A reduction that is no sum (``amax``, ``amin``, ``prod``) over the names that the result lacks."""
    parsed = parse(spec)
    (dims,) = parsed.operands
    for d in reversed(dims):
        if d not in parsed.result:
            axis = dims.index(d) - len(dims)
            x = getattr(torch, function)(x, axis)
            dims = tuple(e for e in dims if e != d)
    return align(x, dims, parsed.result)


def rename(spec: str, x: Tensor) -> Tensor:
    """The same values under other names; the axes keep their places."""
    return x


def broadcast(spec: str, x: Any, like: Tensor) -> Tensor:
    """``x`` repeated along the names it lacks, whose sizes are those of ``like``; other axes of that say nothing."""
    parsed = parse(spec)
    dims = parsed.operands[1]
    for d in reversed(dims):
        if d not in parsed.result:
            like = like.select(dims.index(d) - len(dims), 0)
            dims = tuple(e for e in dims if e != d)
    like = align(like, dims, parsed.result)
    if not isinstance(x, Tensor):
        return torch.full_like(like, x)
    x = align(x, parsed.operands[0], parsed.result)
    return x.expand(torch.broadcast_shapes(x.shape, like.shape))


def last(spec: str, x: Tensor) -> Tensor:
    """The values of the last token of the mini-batch: the name that the result lacks."""
    (dims,), result = parse(spec)
    (d,) = [d for d in dims if d not in result]
    return x.select(dims.index(d) - len(dims), -1)


def at_last(spec: str, x: Tensor, like: Tensor) -> Tensor:
    """``x`` at the last token of the mini-batch, zero at the others; as many tokens as ``like`` has."""
    dims, like_dims = parse(spec).operands
    result = parse(spec).result
    (d,) = [d for d in result if d not in dims]
    length = like.shape[like_dims.index(d) - len(like_dims)]
    place = torch.zeros(length, dtype=torch.bool, device=like.device)
    place[-1:] = True
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.where(align(place, (d,), result), align(x, dims, result), zero)


OPERATORS: dict[Any, str] = {
    f: f.__name__
    for f in (
        contraction,
        masked_contraction,
        masked,
        running_product,
        triangular_solve,
        elementwise,
        reduction,
        rename,
        broadcast,
        last,
        at_last,
    )
}
