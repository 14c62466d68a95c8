"""Layouts of Gluon kernels by name: what the three renderers in Gluon have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

LANES = 32  # of a warp


@dataclass
class NamedLayouts:
    """The layouts that a kernel uses, named by what they are; each is defined once, before the kernel."""

    warps: int
    definitions: dict[str, str] = field(default_factory=dict)

    def _named(self, name: str, definition: str) -> str:
        self.definitions.setdefault(name, definition)
        return name

    def slice(self, parent: str, axis: int) -> str:
        """What is left of a layout without an axis."""
        return self._named(f"{parent}_without_{axis}", f"gl.SliceLayout({axis}, {parent})")

    def lines(self) -> list[str]:
        """The definitions as source."""
        return [f"{name} = gl.constexpr({text})" for name, text in self.definitions.items()]
