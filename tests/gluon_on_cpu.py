"""Gluon kernels run as ordinary Python on torch tensors: what they compute, without layouts, threads or races.

Triton's interpreter does not know Gluon. The kernels that are emitted use little of it, and every layout is a matter
of where a value is, not of what it is.
"""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import torch


class Pointer:
    """An address, or a tile of them, within the memory of a tensor."""

    def __init__(self, memory: torch.Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def of(cls, x: torch.Tensor) -> Pointer:
        size = x.untyped_storage().nbytes() // x.element_size()
        return cls(torch.as_strided(x, (size,), (1,), 0), x.storage_offset())

    def to(self, kind: Any) -> Any:
        """The address as an integer, or as that of numbers of another dtype."""
        size = self.memory.element_size()
        if kind is torch.int64:
            return self.memory.data_ptr() + int(self.offset) * size
        assert self.offset * size % kind.itemsize == 0
        whole = self.memory[: self.memory.numel() * size // kind.itemsize * kind.itemsize // size]
        return Pointer(whole.view(kind), self.offset * size // kind.itemsize)

    def __add__(self, steps: Any) -> Pointer:
        return Pointer(self.memory, self.offset + steps)

    def __sub__(self, steps: Any) -> Pointer:
        return self + -steps


class Shared:
    """A tile in shared memory, not a number until something is stored."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        assert value.shape == self.data.shape and value.dtype == self.data.dtype
        self.data.copy_(value)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def index(self, i: int) -> Shared:
        return Shared(self.data[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))


def allocate(dtype: torch.dtype, shape: list[int], layout: Any, value: Any = None) -> Shared:
    numbers = torch.float32 if dtype is torch.int32 else dtype  # of which words are made
    made = Shared(torch.full(shape, float("nan"), dtype=numbers).view(dtype))
    if value is not None:
        made.store(value)
    return made


def number_in(pointer: Pointer, word: torch.Tensor, place: Any) -> torch.Tensor:
    """As the function of that name in kernels: PyTorch takes a tensor's bits for another dtype by ``view``."""
    halves = word.contiguous().view(pointer.memory.dtype).view(*word.shape, -1)
    which = torch.as_tensor(place) % halves.shape[-1]
    return halves.gather(-1, which.broadcast_to(word.shape)[..., None])[..., 0].float()


def multiply(a: Shared, b: Shared, acc: torch.Tensor, use_acc: bool = True) -> torch.Tensor:
    made = a.data.float() @ b.data.float()
    assert made.shape == acc.shape and acc.dtype == torch.float32
    return acc + made if use_acc else made


def multiply_here(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    made = a.float() @ b.float()
    assert made.shape == acc.shape and acc.dtype == torch.float32
    return acc + made


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> torch.Tensor:
    offset = torch.as_tensor(pointer.offset)
    if mask is None:
        return pointer.memory[offset]
    return torch.where(mask, pointer.memory[torch.where(mask, offset, 0)], other)


def store(pointer: Pointer, value: torch.Tensor, mask: Any = None) -> None:
    offset = torch.as_tensor(pointer.offset)
    value = torch.as_tensor(value).broadcast_to(offset.shape)
    assert offset.numel() == offset.unique().numel(), "two elements of a tile have one address"
    if mask is not None:
        mask = torch.as_tensor(mask).broadcast_to(offset.shape)
        offset, value = offset[mask], value[mask]
    pointer.memory[offset] = value.to(pointer.memory.dtype)


def scalar(integer: Any, tensor: Any) -> Any:
    def call(x: Any, y: Any) -> Any:
        if any(isinstance(v, torch.Tensor) for v in (x, y)):
            return tensor(torch.as_tensor(x), torch.as_tensor(y))
        return integer(x, y)

    return call


def run(call: Any) -> None:
    """A launch as :func:`tttc.runtime.launch.launch` does it, products in the dtype of the launch."""
    place: list[int] = []
    gl = SimpleNamespace(
        **{n: getattr(torch, n) for n in ("float32", "float16", "bfloat16", "int16", "int32", "int64", "exp", "exp2", "rsqrt", "sqrt", "log", "log2", "sin", "cos", "erf", "abs", "where")},
        constexpr=lambda x: x, pointer_type=lambda x: x, program_id=lambda i: torch.tensor(place[i]), cast=lambda x, to: int(x),
        arange=lambda start, end, layout: torch.arange(start, end), load=load, store=store,
        sum=lambda x, axis: x.sum(axis), permute=lambda x, order: x.permute(order),
        convert_layout=lambda x, layout: x, minimum=scalar(min, torch.minimum), maximum=scalar(max, torch.maximum),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), cdiv=lambda x, y: -(-x // y),
        allocate_shared_memory=allocate,
        **{n: lambda *args, **kwargs: None for n in ("NVMMADistributedLayout", "BlockedLayout", "SliceLayout", "NVMMASharedLayout",
                                                      "DotOperandLayout", "SwizzledSharedLayout", "DistributedLinearLayout")},
        expand_dims=lambda x, axis: x.unsqueeze(axis), broadcast=torch.broadcast_tensors,
        reshape=lambda x, shape: x.reshape(shape), gather=lambda x, index, axis: x.gather(axis, index),
        join=lambda x, y: torch.stack([x, y], -1), split=lambda x: x.unbind(-1),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
    )  # fmt: skip

    def copy(target: Shared, source: Pointer) -> None:
        target.store(load(source))

    names = {
        "gl": gl, "gluon": SimpleNamespace(jit=lambda f=None, noinline=False: f or (lambda f: f)), "warpgroup_mma": multiply, "mma_v2": multiply_here,
        "fence_async_shared": lambda: None,
        "async_copy": SimpleNamespace(async_copy_global_to_shared=copy, commit_group=lambda: None,
                                      wait_group=lambda n: None),
    }  # fmt: skip
    lines = call.kernel.source.splitlines()
    source = "\n".join(x for x in lines if not x.startswith(("from triton", "import triton")))
    exec(compile(source, call.kernel.name, "exec"), names)
    names["number_in"] = number_in
    arguments: list[Any] = []
    for name, rank in call.kernel.config["arguments"]:
        x = call.tensors[name]
        arguments += [Pointer.of(x), *x.stride()[:rank]]
    for place[:] in product(*(range(n) for n in call.grid)):
        names[call.kernel.name](
            *arguments, *call.sizes.values(), **call.constants(False) | {"DOT": call.dtype}
        )
