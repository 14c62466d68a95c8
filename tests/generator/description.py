"""What a random program is, as plain data: it prints, it goes into JSON and back, and hypothesis can shrink it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """A layer of the inner model; ``width`` is that of its result, ``inner`` that of a hidden one."""

    kind: str  # see source.LAYERS
    name: str = ""  # which activation, norm, or way to write a product
    width: int = 0
    inner: int = 0


@dataclass(frozen=True)
class Loop:
    """How the program is written as a Python loop over tokens in a module."""

    gradient: str = "func"  # func, autograd, hand
    output: str = "list"  # list, preallocated, cat
    anchor: str = "before"  # before, after: where the anchor is renewed
    state: str = "locals"  # locals, dict, dataclass, attribute
    tokens: str = "range"  # range, zip, enumerate
    heads: str = "BHT"  # BHT, BTH, BT, T: the grid around the features


@dataclass(frozen=True)
class Program:
    """A rule, its sizes, and how it is called."""

    layers: tuple[Layer, ...]
    d: int = 2  # features of q and k
    B: int = 1
    H: int = 1
    T: int = 1
    b: int = 1
    tile: int = 0  # tokens are tiles of so many rows; 0: vectors
    loss: str = "half square"
    update: str = "descent"
    at: str = "anchor"  # where the gradient is taken
    rate: str = "constant"
    decay: str = "none"
    beta: str = "constant"  # of momentum
    gradient: str = "func"  # func, value
    after: str = "none"  # what is done to new weights
    extra: str = "none"  # what else is carried
    mask: bool = False  # a boolean per token: whether it updates
    output: str = "after"
    container: str = "dict"  # of the state
    batched: bool = True  # whether init is [B, H, ...] or [H, ...]
    strided: bool = False  # whether tokens lie in memory as [B, T, H, ...]
    cut: int = 0  # tokens of a first call; 0: one call
    around: str = "none"  # what surrounds the scan
    wanted: str = "all"  # which arguments want a gradient
    used: str = "all"  # which results have one
    dtype: str = "float64"
    path: str = "direct"  # direct, dynamo, loop, triton
    loop: Loop | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """As plain dictionaries and lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Program:
        """Back from :meth:`to_json`."""
        data = dict(data)
        data["layers"] = tuple(Layer(**x) for x in data["layers"])
        data["loop"] = None if data["loop"] is None else Loop(**data["loop"])
        return cls(**data)

    @property
    def digest(self) -> str:
        """The same for equal programs, in every process."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def features(self) -> list[str]:
        """What it has of everything that may be drawn: ``"loss: huber"``."""
        skip = ("layers", "loop", "seed", "cut", "T", "d")
        named = {k: v for k, v in self.to_json().items() if k not in skip}
        found = {f"{k}: {v}" for k, v in named.items()}
        found |= {f"layer: {x.kind} {x.name}".rstrip() for x in self.layers}
        found.add(f"depth: {sum(x.kind in WEIGHTED for x in self.layers)}")
        found.add(f"calls: {2 if self.cut else 1}")
        if self.loop is not None:
            found |= {f"loop {k}: {v}" for k, v in dataclasses.asdict(self.loop).items()}
        return sorted(found)


WEIGHTED = ("matrix", "transposed", "bias", "gain", "number", "swiglu")  # layers with fast weights
