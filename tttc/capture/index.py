"""A loop variable that notes what a program asks of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from tttc.capture.facts import Facts
from tttc.capture.lines import user_line
from tttc.ir.errors import NotLowerable

LONGEST = 4096  # iterations over which a quotient is followed where it is compared, at least
Binary = Callable[[Any, Any], Any]


class Length(int):
    """A number made of the number of iterations: what is compared with it moves when there are more."""

    def _made(self, how: Binary, other: Any) -> Any:
        if isinstance(other, Index) or not isinstance(other, int):
            return NotImplemented
        return Length(how(int(self), int(other)))

    def __add__(self, other: Any) -> Any:
        return self._made(operator.add, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._made(operator.sub, other)

    def __neg__(self) -> Any:
        return Length(-int(self))

    def __mul__(self, other: Any) -> Any:
        return self._made(operator.mul, other)

    __rmul__ = __mul__

    def __mod__(self, other: Any) -> Any:
        return self._made(operator.mod, other)

    def __floordiv__(self, other: Any) -> Any:
        return self._made(operator.floordiv, other)

    def __hash__(self) -> int:
        return hash(int(self))


class Earlier:
    """What an earlier iteration made of the loop variable: nothing is known of it here."""

    def _read(self, *_: Any) -> Any:
        raise NotLowerable(
            "it reads what an earlier iteration made of the loop variable", user_line()
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __neg__ = __mod__ = (
        __floordiv__
    ) = _read
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __int__ = __index__ = (
        __float__
    ) = _read
    __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _read
    __hash__ = object.__hash__


class Index(int):
    """A number that follows from n, the number of the iteration; an ordinary int to whoever uses it.

    Attributes:
        at: its value in any iteration.
        every, rise: in ``every`` iterations it grows by ``rise``, wherever they start.
        moves: whether the number of iterations went into it.
    """

    facts: Facts
    at: Callable[[int], int]
    every: int
    rise: int
    moves: bool

    @classmethod
    def of(cls, facts: Facts, n: int, scale: int, offset: int) -> Index:
        """The loop variable ``scale * n + offset`` in iteration ``n``."""
        return _index(facts, scale * n + offset, lambda m: scale * m + offset, 1, scale, False)

    @property
    def scale(self) -> int | None:
        """How much it grows with every iteration; None where that differs."""
        return self.rise if self.every == 1 else None

    def _sum(self, other: Any) -> Any:
        if not isinstance(other, int):
            return self._lost(operator.add, other)
        value = int(self) + int(other)
        if not isinstance(other, Index):
            by, moves = int(other), self.moves or isinstance(other, Length)
            return _index(
                self.facts, value, lambda n: self.at(n) + by, self.every, self.rise, moves
            )
        every = math.lcm(self.every, other.every)
        rise = self.rise * (every // self.every) + other.rise * (every // other.every)
        moves = self.moves or other.moves
        return _index(self.facts, value, lambda n: self.at(n) + other.at(n), every, rise, moves)

    def _product(self, other: Any) -> Any:
        if isinstance(other, Index) or not isinstance(other, int):
            return self._lost(operator.mul, other)
        by, moves = int(other), self.moves or isinstance(other, Length)
        value = int(self) * by
        return _index(
            self.facts, value, lambda n: self.at(n) * by, self.every, self.rise * by, moves
        )

    def _divided(self, how: Binary, other: Any) -> Any:
        """A remainder or a quotient."""
        if isinstance(other, Index) or not isinstance(other, int) or not other:
            return self._lost(how, other)
        by, moves = int(other), self.moves or isinstance(other, Length)
        every = self.every * (abs(by) // math.gcd(self.rise, by))
        rise = 0 if how is operator.mod else self.rise * (every // self.every) // by
        if not rise:
            self.facts.moduli.add(every)
        value = how(int(self), by)
        return _index(self.facts, value, lambda n: how(self.at(n), by), every, rise, moves)

    def _lost(self, how: Callable[..., Any], *others: Any) -> Any:
        self.facts.lost.append(user_line())
        return how(int(self), *(int(x) if isinstance(x, Index) else x for x in others))

    def _compared(self, how: Binary, other: Any) -> bool:
        if isinstance(other, Index):
            difference = self - other
            same = isinstance(difference, Index)
            return difference._compared(how, 0) if same else how(int(difference), 0)
        if not isinstance(other, (int, float)) or other != other:
            return how(int(self), other)
        facts, value = self.facts, other
        moves = self.moves or isinstance(other, Length)
        if isinstance(other, int):
            value = int(other)
        if self.every == 1 and math.isfinite(value):
            n = math.floor((value - self.at(0)) / self.rise)
            edges = {n - 1, n, n + 1, n + 2}
        else:
            longest = max(facts.count, LONGEST) if self.rise else self.every
            outcomes = [how(self.at(n), value) for n in range(longest)]
            changes = [n for n in range(longest) if outcomes[n] != outcomes[n - 1]]
            edges = {m % longest for n in changes for m in (n - 1, n)}
            if not self.rise:
                facts.phases |= {(longest, n) for n in edges}
                return bool(how(int(self), value))
            facts.fixed.add(longest)
        facts.limits |= edges
        if not moves:
            facts.fixed |= edges
        return bool(how(int(self), value))

    def __add__(self, other: Any) -> Any:
        return self._sum(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._sum(-other)

    def __rsub__(self, other: Any) -> Any:
        return (-self)._sum(other)

    def __neg__(self) -> Any:
        return self._product(-1)

    def __mul__(self, other: Any) -> Any:
        return self._product(other)

    __rmul__ = __mul__

    def __mod__(self, other: Any) -> Any:
        return self._divided(operator.mod, other)

    def __floordiv__(self, other: Any) -> Any:
        return self._divided(operator.floordiv, other)

    def __divmod__(self, other: Any) -> Any:
        return (self // other, self % other)

    def __eq__(self, other: Any) -> bool:
        return self._compared(operator.eq, other)

    def __ne__(self, other: Any) -> bool:
        return self._compared(operator.ne, other)

    def __lt__(self, other: Any) -> bool:
        return self._compared(operator.lt, other)

    def __le__(self, other: Any) -> bool:
        return self._compared(operator.le, other)

    def __gt__(self, other: Any) -> bool:
        return self._compared(operator.gt, other)

    def __ge__(self, other: Any) -> bool:
        return self._compared(operator.ge, other)

    def __bool__(self) -> bool:
        return self._compared(operator.ne, 0)

    def __hash__(self) -> int:
        return hash(int(self))


def _index(
    facts: Facts, value: int, at: Callable[[int], int], every: int, rise: int, moves: bool
) -> Any:
    """An index; an ordinary number where it is the same in every iteration."""
    if every == 1 and not rise:
        return value
    made = Index(value)
    made.facts, made.at, made.every, made.rise, made.moves = facts, at, every, rise, moves
    return made


def _not_followed(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Index, *others: Any) -> Any:
        return self._lost(plain, *others)

    return method


for _name in ["abs", "and", "rand", "float", "invert", "lshift", "or", "pow", "rfloordiv", "rlshift", "rmod", "ror", "rpow", "rrshift", "rshift", "rtruediv", "rxor", "truediv", "xor"]:  # fmt: skip
    setattr(Index, f"__{_name}__", _not_followed(f"__{_name}__"))


def _deferred(name: str) -> Callable[[Length, Any], Any]:
    plain = getattr(int, name)

    def method(self: Length, other: Any) -> Any:
        # An index on the other side is asked instead.
        return NotImplemented if isinstance(other, Index) else plain(self, other)

    return method


for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Length, f"__{_name}__", _deferred(f"__{_name}__"))
