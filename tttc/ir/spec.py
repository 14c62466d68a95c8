"""Specs: how the axes of an operator's operands are named, ``"t i, i j -> t j"``."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

Dims = tuple[str, ...]


class Spec(NamedTuple):
    """The names of the axes of each operand and of the result."""

    operands: tuple[Dims, ...]
    result: Dims

    def __str__(self) -> str:
        return f"{', '.join(' '.join(o) for o in self.operands)} -> {' '.join(self.result)}"

    @property
    def labels(self) -> Dims:
        """Every name, in order of appearance."""
        return tuple(dict.fromkeys(x for o in (*self.operands, self.result) for x in o))

    @property
    def summed(self) -> Dims:
        """The names that the result lacks."""
        return tuple(x for x in self.labels if x not in self.result)


@cache
def parse(spec: str) -> Spec:
    """Read a spec.

    >>> parse("t i, i j -> t j").summed
    ('i',)
    """
    left, right = spec.split("->")
    return Spec(tuple(tuple(o.split()) for o in left.split(",")), tuple(right.split()))


class Relation(NamedTuple):
    """A causal relation between two token dimensions, ``"s<=t"`` or ``"s<t"``."""

    earlier: str
    later: str
    strict: bool

    def __str__(self) -> str:
        return f"{self.earlier}{'<' if self.strict else '<='}{self.later}"


@cache
def parse_relation(text: str) -> Relation:
    """Read a relation.

    >>> parse_relation("s<=t")
    Relation(earlier='s', later='t', strict=False)
    """
    strict = "<=" not in text
    earlier, later = text.split("<" if strict else "<=")
    return Relation(earlier, later, strict)
