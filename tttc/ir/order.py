"""A product whose order of evaluation was chosen, and what other orders would have taken."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import opt_einsum

from tttc.ir.spec import Dims

Path = tuple[tuple[int, ...], ...]
OPTIMAL = 6  # operands up to which every order is tried
PROGRAMMED = 16  # up to which the best is found all the same; more take seconds each


@dataclass(frozen=True)
class Order:
    """A product of several operands, evaluated two at a time.

    Attributes:
        operands: the name of each operand's node ("" for a mask alone), and the labels of its axes.
        result: the labels that are kept.
        sizes: of each label.
        path: which two operands are multiplied in each step; the product goes to the end (``opt_einsum``).
        operations: what that takes.
        at_once: operations of the product as one sum over all labels.
    """

    operands: tuple[tuple[str, Dims], ...]
    result: Dims
    sizes: tuple[tuple[str, int], ...]
    path: Path
    operations: int
    at_once: int

    def largest(self, path: Path | None = None) -> tuple[int, Dims]:
        """Elements and labels of the largest product on the way, the result included."""
        table = dict(self.sizes)
        labels = [o[1] for o in self.operands]
        made = []
        for step in self.path if path is None else path:
            taken = [labels.pop(i) for i in sorted(step, reverse=True)][::-1]
            needed = {x for o in labels for x in o} | set(self.result)
            labels.append(tuple(dict.fromkeys(x for o in taken for x in o if x in needed)))
            made.append((math.prod(table[x] for x in labels[-1]), labels[-1]))
        return max(made, key=lambda x: x[0], default=(0, ()))

    def alternatives(self) -> list[tuple[Path, int]]:
        """The best order for each other first step, and the operations it takes; cheapest first."""
        table = dict(self.sizes)
        labels = [o[1] for o in self.operands]
        found: list[tuple[Path, int]] = []
        for first in itertools.combinations(range(len(labels)), 2):
            if not self.path or set(first) == set(self.path[0]):
                continue
            rest = [x for i, x in enumerate(labels) if i not in first]
            needed = {x for o in rest for x in o} | set(self.result)
            both = dict.fromkeys(x for i in first for x in labels[i])
            remaining = [*rest, tuple(x for x in both if x in needed)]
            later = best_path(remaining, self.result, table)[0] if rest else []
            path = (first, *(tuple(p) for p in later if len(p) == 2))
            info = best_path(labels, self.result, table, path)[1]
            found.append((path, int(info.opt_cost)))
        return sorted(found, key=lambda x: (x[1], self.largest(x[0])[0]))

    def written(self, path: Path | None = None) -> str:
        """The order with parentheses: ``((q · k) · g)``."""
        names = [name or "mask" for name, _ in self.operands]
        for step in self.path if path is None else path:
            taken = [names.pop(i) for i in sorted(step, reverse=True)][::-1]
            names.append(f"({' · '.join(taken)})" if names else " · ".join(taken))
        return " · ".join(names)

    def __str__(self) -> str:
        return (
            f"{self.written()} -> [{' '.join(self.result)}]: {self.operations} operations in the order chosen, "
            f"{self.at_once} at once"
        )


def best_path(
    operands: Sequence[Dims], result: Dims, sizes: dict[str, int], path: Path | None = None
) -> tuple[list[tuple[int, ...]], Any]:
    """The order of pairwise products that takes the fewest operations (or ``path``), and its cost."""
    labels = list(dict.fromkeys(x for o in operands for x in o))
    letter = dict(zip(labels, string.ascii_letters, strict=False))
    inputs = ",".join("".join(letter[x] for x in o) for o in operands)
    output = "".join(letter[x] for x in result if x in letter)
    shapes = [tuple(sizes[x] for x in o) for o in operands]
    method = (
        "optimal" if len(operands) <= OPTIMAL else "dp" if len(operands) <= PROGRAMMED else "greedy"
    )
    found, info = opt_einsum.contract_path(
        f"{inputs}->{output}", *shapes, shapes=True, optimize=method if path is None else list(path)
    )
    return list(found), info
