"""The work of a loop: bytes, matrix products and elementwise operations, as sympy expressions in the sizes of a call.

``B`` sequences of ``T`` tokens, ``H`` heads, mini-batches of ``b``, and a symbol for every feature dimension (``d``, the
width of a hidden layer). What a schedule changes of it is small: how many mini-batches share what a program loads once,
the dtype of what passes between kernels, and what keeps apart what is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx
from tttc.codegen.loop import Loop, only_products_read, used
from tttc.codegen.schedule import Schedule

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, spec_of
from tttc.ir.build import dims_of
from tttc.ir.cost import MINI_BATCH, symbol, volume
from tttc.ir.spec import parse

BATCH, HEADS, LENGTH = (sympy.Symbol(x, positive=True, integer=True) for x in "BHT")
VIEWS = (ops.rename, ops.last, ops.at_last, ops.broadcast)
WIDE = 4  # bytes of a number on chip
# Instructions of a function for each of its values, where it is more than one.
INSTRUCTIONS = {
    "div": 8, "reciprocal": 6, "exp": 4, "log": 4, "log1p": 8, "expm1": 8, "sqrt": 6, "rsqrt": 4,
    "sin": 16, "cos": 16, "tanh": 10, "sigmoid": 8, "erf": 20, "pow": 20,
}  # fmt: skip


def is_product(node: fx.Node) -> bool:
    """Whether a matrix unit makes the values of a node: two operands, one dimension summed, two kept."""
    if node.target not in (ops.contraction, ops.masked_contraction):
        return False
    spec = parse(spec_of(node))
    return (
        len(spec.operands) == 2
        and len(spec.result) == 2
        and len(spec.labels) == 3
        and all(len(o) == 2 for o in spec.operands)
    )


def instructions(node: fx.Node) -> int:
    """Instructions for each value of an operator outside matrix units."""
    if node.op != "call_function" or node.target in VIEWS:
        return 0
    return INSTRUCTIONS.get(str(node.args[0]), 1) if node.target is ops.elementwise else 1


def through_memory(loop: Loop) -> tuple[list[fx.Node], list[fx.Node]]:
    """What is loaded and what is stored for every mini-batch."""
    wanted = used(loop)
    passing = ("token", "saved", "value")
    loaded = [n for n, s in loop.sources.items() if s.kind in passing and n in wanted]
    stored = [n for n, s in loop.sinks if s.kind in ("token", "value")]
    stored += [n for n, s in loop.sources.items() if s.kind == "state" and s.name in loop.save]
    return loaded, stored


def narrow(loop: Loop, node: fx.Node, schedule: Schedule) -> bool:
    """Whether a number of what passes through memory has the dtype of the tokens."""
    source = loop.sources.get(node)
    tokens = (source is not None and source.kind == "token") or any(
        n is node and s.kind == "token" for n, s in loop.sinks
    )
    wide = not only_products_read(loop, node) and not (schedule.narrow and len(dims_of(node)) > 1)
    return tokens or not wide


@dataclass(frozen=True)
class Work:
    """What all programs of a kernel do together.

    Attributes:
        programs: how many there are.
        turns: mini-batches that one of them handles.
        traffic: bytes through device memory.
        products: FLOPs of matrix units.
        instructions: of single threads, outside matrix units.
    """

    programs: sympy.Expr
    turns: sympy.Expr
    traffic: sympy.Expr
    products: sympy.Expr
    instructions: sympy.Expr

    def table(self, loop: Loop, batch: int, heads: int, length: int) -> dict[sympy.Expr, int]:
        """The numbers to put for the symbols."""
        sizes = {symbol(d): n for d, n in loop.sizes.items() if d not in (TOKEN, EARLIER)}
        return {
            **sizes,
            MINI_BATCH: loop.mini_batch_size,
            BATCH: batch,
            HEADS: heads,
            LENGTH: length,
        }


def work(loop: Loop, schedule: Schedule, element_size: int) -> Work:
    """The work of a loop under a schedule, ``element_size`` bytes to a number of a token."""
    heads = BATCH * HEADS
    count = sympy.ceiling(LENGTH / (MINI_BATCH if loop.tokens else 1))
    turns = sympy.Integer(schedule.group) if loop.parallel else count
    programs = heads * sympy.ceiling(count / schedule.group) if loop.parallel else heads
    loaded, stored = through_memory(loop)
    wanted = used(loop)
    each = [
        volume(dims_of(n)) * (element_size if narrow(loop, n, schedule) else WIDE)
        for n in (*loaded, *stored)
    ]
    once = [
        WIDE * volume(dims_of(n))
        for n, s in loop.sources.items()
        if s.kind in ("state", "shared", "constant") and n in wanted
    ]
    once += [WIDE * volume(dims_of(n)) for n, s in loop.sinks if s.kind in ("state", "sum")]
    products = sympy.Integer(0)
    others = sympy.Integer(0)
    for node in wanted:
        if node.op != "call_function":
            continue
        labels = parse(spec_of(node)).labels
        if node.target is ops.triangular_solve:
            # An inverse by doubling, then a product with it.
            pairs = volume((TOKEN, EARLIER))
            doublings = 2 * sympy.log(MINI_BATCH, 2)
            products += 2 * (doublings * pairs * MINI_BATCH + volume(labels))
        elif is_product(node):
            products += 2 * volume(labels)
            if node.target is ops.masked_contraction and schedule.nan == "product":
                products += 2 * volume(labels)
        else:
            others += instructions(node) * volume(labels)
    repeats = heads * count
    return Work(
        programs,
        turns,
        repeats * sum(each, sympy.Integer(0)) + programs * sum(once, sympy.Integer(0)),
        repeats * products,
        repeats * others,
    )
