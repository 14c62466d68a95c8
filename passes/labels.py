"""Names for axes, found by unification: two axes that an operator aligns get one name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Label:
    """A name-to-be of an axis; labels that were unified share a root."""

    __slots__ = ("name", "parent", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.parent: Label | None = None
        self.name: str | None = None

    @property
    def root(self) -> Label:
        """The label that stands for all those unified with this one."""
        label = self
        while label.parent is not None:
            label = label.parent
        return label


def roots(labels: Iterable[Label]) -> tuple[Label, ...]:
    """The roots of some labels."""
    return tuple(x.root for x in labels)


class Labels:
    """Labels and the scopes in which they must stay apart (the axes of one operator)."""

    def __init__(self) -> None:
        self._scopes: list[tuple[Label, ...]] = []

    def separate(self, labels: Sequence[Label]) -> None:
        """Labels that must never become one: they name different axes of one operator."""
        self._scopes.append(tuple(labels))

    def unify(self, a: Label, b: Label) -> bool:
        """Make ``a`` and ``b`` one; False, and nothing done, where a scope forbids it."""
        a, b = a.root, b.root
        if a is b:
            return True
        for scope in self._scopes:
            inside = roots(scope)
            if a in inside and b in inside:
                return False
        a.parent = b
        return True

    @staticmethod
    def name(labels: Iterable[Label], taken: Iterable[str] = ()) -> None:
        """Give each root among the labels a letter, in order of appearance."""
        used = set(taken)
        # Kernels call their dimensions so too: letters that other names in them begin with are left out.
        letters = (
            f"{letter}{suffix}"
            for suffix in ("", *map(str, range(1, 1000)))
            for letter in "ijklopquvwz"
        )
        for label in labels:
            root = label.root
            if root.name is None:
                root.name = next(x for x in letters if x not in used)
                used.add(root.name)
