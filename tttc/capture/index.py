"""A loop variable that remembers what a program asked of it: which iterations can differ follows from that."""

from __future__ import annotations

import math
from typing import Any


class Facts:
    """What the body of a loop did with its loop variable, beside using it as an index."""

    def __init__(self) -> None:
        self.moduli: set[int] = set()  # in iterations: the value was taken modulo something
        self.limits: set[int] = set()  # iterations at which a comparison may change its result
        self.number = False  # the value itself went into arithmetic of another kind

    @property
    def period(self) -> int:
        """After how many iterations the remainders repeat."""
        return math.lcm(*self.moduli) if self.moduli else 1


class Index(int):
    """The value ``scale * n + offset`` of a loop variable in iteration n; an ordinary int to whoever uses it."""

    facts: Facts
    scale: int
    offset: int

    @classmethod
    def of(cls, facts: Facts, n: int, scale: int, offset: int) -> Index:
        """The value in iteration ``n``."""
        made = cls(scale * n + offset)
        made.facts, made.scale, made.offset = facts, scale, offset
        return made

    def _moved(self, value: int, scale: int, offset: int) -> Index:
        made = Index(value)
        made.facts, made.scale, made.offset = self.facts, scale, offset
        return made

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Index):
            return self._moved(
                int(self) + int(other), self.scale + other.scale, self.offset + other.offset
            )
        if isinstance(other, int):
            return self._moved(int(self) + other, self.scale, self.offset + other)
        return self._number().__add__(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, Index):
            scale, offset = self.scale - other.scale, self.offset - other.offset
            return self._moved(int(self) - int(other), scale, offset) if scale else offset
        if isinstance(other, int):
            return self._moved(int(self) - other, self.scale, self.offset - other)
        return self._number().__sub__(other)

    def __rsub__(self, other: Any) -> Any:
        return (-self) + other

    def __neg__(self) -> Any:
        return self._moved(-int(self), -self.scale, -self.offset)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, int) and not isinstance(other, Index):
            return self._moved(int(self) * other, self.scale * other, self.offset * other)
        return self._number().__mul__(other)

    __rmul__ = __mul__

    def _modulo(self, other: int) -> None:
        other = abs(int(other))
        self.facts.moduli.add(other // math.gcd(self.scale, other) if other else 1)

    def __mod__(self, other: Any) -> Any:
        if isinstance(other, int):
            self._modulo(other)
        return int(self) % other

    def __divmod__(self, other: Any) -> Any:
        return (self // other, self % other)

    def __floordiv__(self, other: Any) -> Any:
        if isinstance(other, int) and other and self.scale % int(other) == 0:
            return self._moved(
                int(self) // other, self.scale // int(other), self.offset // int(other)
            )
        if isinstance(other, int):
            self._modulo(other)
        return int(self) // other

    def _compared(self, other: Any) -> None:
        if isinstance(other, int) and self.scale:
            n = (int(other) - self.offset) // self.scale
            self.facts.limits |= {n - 1, n, n + 1}

    def __eq__(self, other: Any) -> bool:
        self._compared(other)
        return int(self) == other

    def __ne__(self, other: Any) -> bool:
        self._compared(other)
        return int(self) != other

    def __lt__(self, other: Any) -> bool:
        self._compared(other)
        return int(self) < other

    def __le__(self, other: Any) -> bool:
        self._compared(other)
        return int(self) <= other

    def __gt__(self, other: Any) -> bool:
        self._compared(other)
        return int(self) > other

    def __ge__(self, other: Any) -> bool:
        self._compared(other)
        return int(self) >= other

    def __bool__(self) -> bool:
        self._compared(0)
        return int(self) != 0

    def __hash__(self) -> int:
        return hash(int(self))

    def _number(self) -> int:
        self.facts.number = True
        return int(self)

    def __truediv__(self, other: Any) -> Any:
        return self._number() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._number()

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(self._number(), other)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(other, self._number())

    def __rmod__(self, other: Any) -> Any:
        return other % self._number()

    def __rfloordiv__(self, other: Any) -> Any:
        return other // self._number()

    def __float__(self) -> float:
        return float(self._number())
