"""Between the axes of a program's tensors and those of a scan, ``[B, H, T, features]``.

Names stand for axes. ``sizes`` says how large each is; TorchDynamo sees plain views, whatever the sizes.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor
Names = tuple[str, ...]
TIME = "*"


def moving(x: Tensor, dim: int, start: Any, count: Any, step: int, width: int | None) -> Tensor:
    """The entries that ``count`` iterations read, one each, as the first axis.

    With a ``width`` each reads so many, in the place of the axis.
    """
    if width is not None:
        if start < 0:
            raise IndexError(f"expected indices of at least 0, got {start}")
        x = x.narrow(dim, start, (count - 1) * step + width)
        if step == width:
            return x.unflatten(dim, (count, width)).movedim(dim, 0)
        return x.unfold(dim, width, step).movedim(dim, 0).movedim(-1, dim + 1)
    if step == 1 and start == 0 and x.shape[dim] == count:
        return x.movedim(dim, 0)
    if start < 0:
        # A slice never reaches before the start of a tensor as an index of Python does.
        raise IndexError(f"expected indices of at least 0, got {start}")
    return x.narrow(dim, start, (count - 1) * step + 1)[
        (slice(None),) * dim + (slice(None, None, step),)
    ].movedim(dim, 0)


def apart(x: Tensor, axes: tuple[Names, ...], sizes: dict[str, Any], lead: int) -> Tensor:
    """One axis for each name: axes of size 1 without a name go, merged ones are taken apart."""
    at = lead
    for names in axes:
        if not names:
            x = x.squeeze(at)
            continue
        if len(names) > 1:
            x = x.unflatten(at, [sizes[n] for n in names])
        at += len(names)
    return x


def scanned(
    x: Tensor, names: Names, grid: tuple[Names, Names], features: Names, sizes: dict[str, Any]
) -> Tensor:
    """``x``, whose axes have these names, as ``[B, H, (T,) features]``; what it lacks it is repeated along."""
    batch, heads = grid
    time = (TIME,) if TIME in names else ()
    order = [n for n in (*batch, *heads, *time, *features) if n in names]
    x = x.permute([names.index(n) for n in order])
    for i, n in enumerate((*batch, *heads)):
        if n not in names:
            x = x.unsqueeze(i)
            x = x.expand([*x.shape[:i], sizes[n], *x.shape[i + 1 :]])
    x = _merged(x, 0, len(batch))
    return _merged(x, 1, len(heads))


def per_head(
    x: Tensor, names: Names, heads: Names, features: Names, sizes: dict[str, Any]
) -> Tensor:
    """A parameter as ``[H, features]``."""
    order = [n for n in (*heads, *features) if n in names]
    x = x.permute([names.index(n) for n in order])
    for i, n in enumerate(heads):
        if n not in names:
            x = x.unsqueeze(i)
            x = x.expand([*x.shape[:i], sizes[n], *x.shape[i + 1 :]])
    return _merged(x, 0, len(heads))


def _merged(x: Tensor, at: int, count: int) -> Tensor:
    if count == 0:
        return x.unsqueeze(at)
    return x if count == 1 else x.flatten(at, at + count - 1)


def unscanned(
    x: Tensor,
    names: Names,
    grid: tuple[Names, Names],
    features: Names,
    time: bool,
    sizes: dict[str, Any],
) -> Tensor:
    """``[B, H, (T,) features]`` with one axis for each of ``names``, time first."""
    batch, heads = grid
    x = _parted(x, 1, heads, sizes)
    x = _parted(x, 0, batch, sizes)
    have = (*batch, *heads, *((TIME,) if time else ()), *features)
    want = (*((TIME,) if time else ()), *names)
    return x.permute([have.index(n) for n in want])


def _parted(x: Tensor, at: int, names: Names, sizes: dict[str, Any]) -> Tensor:
    if not names:
        return x.squeeze(at)
    return x if len(names) == 1 else x.unflatten(at, [sizes[n] for n in names])


def together(x: Tensor, axes: tuple[Names, ...], sizes: dict[str, Any], lead: int) -> Tensor:
    """The inverse of :func:`apart`."""
    at = lead
    for names in axes:
        if not names:
            x = x.unsqueeze(at)
        elif len(names) > 1:
            x = x.flatten(at, at + len(names) - 1)
        at += 1
    return x


def expanded(x: Tensor, axes: tuple[Names, ...], sizes: dict[str, Any]) -> Tensor:
    """A state as it comes into the loop, in the shape that iterations leave it."""
    shape = []
    for names in axes:
        size: Any = 1
        for n in names:
            size = size * sizes[n]
        shape.append(size)
    return x.expand(shape)


def like(known: Tensor, x: Tensor) -> Tensor:
    """A constant where ``x`` is, floating ones in its dtype."""
    return known.to(x.device, x.dtype if known.is_floating_point() else known.dtype)


class Joined:
    """What a loop appended to a list: all items as one tensor, ``[T, ...]``."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.rest: list[Tensor] = []  # of iterations that ran after the scan

    def append(self, x: Tensor) -> None:
        """What a last iteration appends that takes fewer tokens than the others."""
        self.rest.append(x)


def joined(function: Any, items: Any, *args: Any, **kwargs: Any) -> Any:
    """``torch.stack``, ``torch.cat`` and the like of a list that a loop may have left as one tensor."""
    if not isinstance(items, Joined):
        return function(items, *args, **kwargs)
    x = items.values
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args else 0))
    name = function.__name__
    rank = x.dim() - 1
    if name == "stack":
        out, dim = x.movedim(0, dim), dim % (rank + 1)
    elif name == "vstack" and rank == 1:
        out, dim = x, 0
    else:
        if name in ("hstack", "vstack"):
            dim = 0 if name == "vstack" or rank == 1 else 1
        dim = dim % rank
        out = x.movedim(0, dim).flatten(dim, dim + 1)
    if not items.rest:
        return out
    return torch.cat([out, *(y.unsqueeze(dim) if name == "stack" else y for y in items.rest)], dim)


def unbound(x: Tensor, dim: int = 0) -> Tensor:
    """What ``x.unbind(dim)`` gives one after another: ``x`` with that dimension first."""
    return x.movedim(dim, 0)


class Pieces:
    """What ``x.split(size, dim)`` gives one after another, the last one shorter where sizes do not divide.

    Attributes:
        whole: ``x``.
    """

    def __init__(self, whole: Tensor, size: int, dim: int) -> None:
        self.whole, self.size, self.dim = whole, size, dim

    def __len__(self) -> int:
        return (self.whole.shape[self.dim] + self.size - 1) // self.size

    def __getitem__(self, n: int) -> Tensor:
        picked = slice(n * self.size, n * self.size + self.size)
        return self.whole[(slice(None),) * self.dim + (picked,)]


def pieces_of(x: Tensor, size: Any = None, dim: int = 0, **names: Any) -> Any:
    """``x.split(size, dim)``, not made yet where all pieces but the last are as long."""
    size = names.get("split_size", names.get("split_size_or_sections", size))
    if not isinstance(size, int):
        return torch.split(x, size, dim)
    return Pieces(x, size, dim % x.dim())


def chunks_of(x: Tensor, chunks: int, dim: int = 0) -> Any:
    """Likewise for ``x.chunk(chunks, dim)``."""
    return pieces_of(x, -(-x.shape[dim] // chunks), dim)
