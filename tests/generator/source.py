"""The Python source of a described program, as a user would write it."""

from __future__ import annotations

import textwrap

from generator.description import WEIGHTED, Layer, Program

ACTIVATIONS = {
    "tanh": "torch.tanh(x)", "sigmoid": "torch.sigmoid(x)", "silu": "F.silu(x)", "gelu": "F.gelu(x)",
    "gelu tanh": 'F.gelu(x, approximate="tanh")', "softplus": "F.softplus(x)", "relu": "F.relu(x)",
    "leaky relu": "F.leaky_relu(x, 0.1)", "elu": "F.elu(x)", "softmax": "torch.softmax(x, -1)",
    "log softmax": "torch.log_softmax(x, -1)", "cube": "x**3", "sinh": "torch.sinh(0.5 * x)",
    "sine": "torch.sin(2.0 * x) - 0.5", "bell": "torch.exp(-x.square())", "mish": "F.mish(x)",
    "square": "x * x", "squared relu": "F.relu(x).square()", "root": "torch.sqrt(1.0 + x.square())",
    "rational": "x / (1.0 + x.abs())", "clamp": "x.clamp(-0.4, 0.7)", "log sigmoid": "F.logsigmoid(x)",
    "cosine": "torch.cos(x) * x", "erf": "torch.erf(x)", "log1p": "torch.log1p(x.square())",
    "power": "(x.square() + 0.1) ** 0.7", "where": "torch.where(x > 0.05, x, 0.3 * x)",
    "maximum": "torch.maximum(x, 0.5 * x + 0.1)", "hardtanh": "F.hardtanh(x)",
    "peak": "x - x.amax(-1, keepdim=True)", "expm1": "torch.expm1(0.5 * x)", "cosh": "torch.cosh(x)",
}  # fmt: skip
NORMS = {
    "layer": "F.layer_norm(x, x.shape[-1:], eps=1e-3)",
    "rms": "x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)",
    "root mean square": "F.rms_norm(x, x.shape[-1:], eps=1e-3)",
    "unit": "x / (0.1 + x.square().sum(-1, keepdim=True)).sqrt()",
    "normalize": "F.normalize(x + 0.1, dim=-1)",
    "mean": "x - x.mean(-1, keepdim=True)",
    "affine": "F.layer_norm(x, x.shape[-1:], eps=1e-3) * {gain} + {bias}",
}
PRODUCTS = {  # of one vector and a matrix
    "matmul": "x @ {w}",
    "einsum": 'torch.einsum("i,ij->j", x, {w})',
    "row": "(x.unsqueeze(-2) @ {w}).squeeze(-2)",
    "sum": "(x[..., :, None] * {w}).sum(-2)",
    "linear": "F.linear(x, {w}.T)",
}
ROWS = {  # of the rows of a tile and a matrix
    "matmul": "x @ {w}", "einsum": 'torch.einsum("ci,ij->cj", x, {w})', "row": "torch.mm(x, {w})",
    "sum": "(x[:, :, None] * {w}).sum(1)", "linear": "F.linear(x, {w}.T)",
}  # fmt: skip
GRIDS = {  # of vectors and matrices under a grid
    "matmul": "(x.unsqueeze(-2) @ {w}).squeeze(-2)",
    "einsum": 'torch.einsum("...i,...ij->...j", x, {w})',
    "row": "torch.matmul(x[..., None, :], {w})[..., 0, :]",
    "sum": "(x[..., :, None] * {w}).sum(-2)",
    "linear": "({w}.transpose(-1, -2) @ x.unsqueeze(-1)).squeeze(-1)",
}
LOSSES = {  # {sum}: over one token's features; y is the model's result
    "half square": "(0.5 * (y - {v}).square()).sum({sum})",
    "mean square": "(y - {v}).square().mean({sum})",
    "minus product": "-(y * {v}).sum({sum})",
    "huber": 'F.huber_loss(y, {v}, reduction="none", delta=0.2).sum({sum})',
    "smooth l1": 'F.smooth_l1_loss(y, {v}, reduction="none", beta=0.3).mean({sum})',
    "l1": "(y - {v}).abs().sum({sum})",
    "cube": "(y - {v}).abs().pow(3).sum({sum})",
    "lp": "((y - {v}).square() + 1e-2).pow(0.75).sum({sum})",
    "fourth power": "0.1 * (y - {v}).pow(4).sum({sum})",
    "log cosh": "torch.log(torch.cosh(y - {v})).mean({sum})",
    "cross entropy": "-(torch.softmax({v}, -1) * torch.log_softmax(y, -1)).sum({sum})",
    "norm": "((y - {v}).square().sum({sum}) + 1e-2).sqrt()",
    "cosine": "-(y * {v}).sum({sum}) / (0.1 + y.square().sum({sum})).sqrt()",
    "weighted": "(torch.sigmoid({v}) * (y - {v}).square()).sum({sum})",
    "with decay": "0.5 * (y - {v}).square().sum({sum}) + {weights}",
}
MOMENTA = ("momentum", "averaged", "nesterov")
HALVES = ("since anchor", *MOMENTA, "adaptive")  # updates that carry a second tree


def weights_of(program: Program) -> dict[str, tuple[int, ...]]:
    """The fast weights and their shapes."""
    found: dict[str, tuple[int, ...]] = {}
    width = program.d
    for i, layer in enumerate(program.layers):
        if layer.kind == "matrix":
            found[f"w{i}"] = (width, layer.width)
        elif layer.kind == "transposed":
            found[f"w{i}"] = (layer.width, width)
        elif layer.kind in ("bias", "gain"):
            found[f"w{i}"] = (width,)
        elif layer.kind == "number":
            found[f"w{i}"] = ()
        elif layer.kind == "swiglu":
            found[f"w{i}a"] = found[f"w{i}b"] = (width, layer.inner)
            found[f"w{i}c"] = (layer.inner, layer.width)
        width = layer.width or width
    return found


def width_of(program: Program) -> int:
    """The features of v and of outputs."""
    return next((x.width for x in reversed(program.layers) if x.width), program.d)


class Writer:
    """Collects what a program takes while its lines are written."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights = weights_of(program)
        self.grid = program.loop is not None
        self.tokens: dict[str, tuple[int, ...] | str] = {}  # shapes of one token's leaves
        self.shared: dict[str, tuple[int, ...]] = {}
        self.kinds: dict[str, str] = {}  # of numbers: how they are drawn

    # -- arguments ------------------------------------------------------------------------------------

    def token(self, name: str, shape: tuple[int, ...], kind: str = "normal") -> str:
        """A leaf of a token, as a local variable."""
        self.tokens[name] = shape
        self.kinds[name] = kind
        return f"{name}_t"

    def parameter(self, name: str, shape: tuple[int, ...], kind: str = "normal") -> str:
        """A slow parameter, as an expression."""
        self.shared[name] = shape
        self.kinds[name] = kind
        return f"self.{name}" if self.grid else f'shared["{name}"]'

    def rows(self, name: str, width: int) -> str:
        """q, k or v of a token."""
        tile = self.program.tile
        return self.token(name, (tile, width) if tile else (width,))

    # -- numbers and vectors that meet weights ----------------------------------------------------------

    def number(self, expression: str, rank: int) -> str:
        """A number per head, as it meets a weight of this rank."""
        return (
            f"{expression}[..., {', '.join(['None'] * rank)}]" if self.grid and rank else expression
        )

    def gate(self, role: str, kind: str, weight: str, draw: str) -> str:
        """A rate, decay or momentum of a weight: an expression that multiplies it."""
        shape = self.weights[weight]
        rank = len(shape)
        if kind == "constant":
            return {"rate": "0.1", "decay": "0.9", "beta": "0.8"}[role]
        if kind == "token":
            return self.number(self.token(role, (), draw), rank)
        if kind == "sigmoid":
            return f"0.3 * torch.sigmoid({self.number(self.token(role, ()), rank)})"
        if kind == "shared":
            return self.number(self.parameter(f"{role}_s", (), draw), rank)
        if kind == "product":
            return self.number(
                f"({self.token(role, (), draw)} * {self.parameter(f'{role}_s', (), draw)})", rank
            )
        if kind == "projection":
            k, u, c = self.rows("k", self.program.d), self.parameter("u", (self.program.d,)), ""
            c = self.parameter("c", ())
            inside = f"({k} * {u}).sum(-1){'.mean(-1)' if self.program.tile else ''} + {c}"
            return f"0.3 * torch.sigmoid({self.number(f'({inside})', rank)})"
        if rank == 0:
            return self.number(self.token(role, (), draw), 0)
        if kind in ("channels", "token channels"):
            make = self.parameter if kind == "channels" else self.token
            vector = make(f"{role}_{weight}", (shape[-1],), draw)
            return f"{vector}[..., None, :]" if self.grid and rank == 2 else vector
        assert kind == "rows", kind
        vector = self.token(f"{role}_{weight}", (shape[0],), draw)
        return f"{vector}[..., :, None]" if rank == 2 else vector

    # -- the inner model ----------------------------------------------------------------------------------

    def product(self, form: str, weight: str) -> str:
        forms = GRIDS if self.grid else ROWS if self.program.tile else PRODUCTS
        return forms[form].format(w=f'w["{weight}"]')

    def weight(self, i: int | str, rank: int) -> str:
        """A vector or number of fast weights as it meets features."""
        return self.number(f'w["w{i}"]', 1) if rank == 0 else f'w["w{i}"]'

    def layer(self, i: int, layer: Layer, before: str, same: bool) -> list[str]:
        """The lines of one layer: x to x; ``before`` is what a residual adds where its width is the same."""
        if layer.kind == "matrix":
            return [f"x = {self.product(layer.name, f'w{i}')}"]
        if layer.kind == "transposed":
            if self.program.tile:
                return [f'x = x @ w["w{i}"].T']
            grid = f'(w["w{i}"] @ x.unsqueeze(-1)).squeeze(-1)'
            return [f"x = {grid}" if self.grid else f'x = w["w{i}"] @ x']
        if layer.kind == "bias":
            return [f'x = x + w["w{i}"]']
        if layer.kind == "gain":
            return [f'x = x * w["w{i}"]']
        if layer.kind == "number":
            return [f"x = x * {self.weight(i, 0)}"]
        if layer.kind == "swiglu":
            a, b, c = (self.product(layer.name, f"w{i}{part}") for part in "abc")
            return [f"x = F.silu({a}) * ({b})", f"x = {c}"]
        if layer.kind == "residual":
            return [f"x = x + {before}" if same else "x = x + 0.5 * torch.tanh(x)"]
        if layer.kind == "slow":
            p = self.parameter(f"p{i}", (self.widths[i], layer.width))
            if self.grid:
                return [f'x = torch.einsum("...i,...ij->...j", x, {p})']
            return [f"x = x @ {p}"]
        if layer.kind == "gated":
            return [f"x = x * torch.sigmoid({self.token(f'g{i}', (self.widths[i],))})"]
        if layer.kind == "norm":
            n = self.widths[i]
            affine = layer.name == "affine"
            gain = self.parameter(f"gain{i}", (n,), "gain") if affine else ""
            bias = self.parameter(f"bias{i}", (n,)) if affine else ""
            return [f"x = {NORMS[layer.name].format(gain=gain, bias=bias)}"]
        assert layer.kind == "activation", layer.kind
        return [f"x = {ACTIVATIONS[layer.name]}"]

    def model(self) -> list[str]:
        """Lines of the body of ``f(w, x)``."""
        widths = [self.program.d]
        for layer in self.program.layers:
            widths.append(layer.width or widths[-1])
        self.widths = widths
        lines = ["first = x"] if any(x.kind == "residual" for x in self.program.layers) else []
        for i, layer in enumerate(self.program.layers):
            lines += self.layer(i, layer, "first", widths[i] == widths[0])
        return [*lines, "return x"]

    def loss(self) -> list[str]:
        """Lines of the body of ``loss(w)``."""
        tile = self.program.tile
        over = "-1" if self.grid else "(-2, -1)" if tile else ""
        text = LOSSES[self.program.loss]
        squares = " + ".join(
            f'0.05 * w["{n}"].square()' + (f".sum({self.over(len(s))})" if s else "")
            for n, s in self.weights.items()
        )
        v = self.rows("v", width_of(self.program))
        text = text.format(sum=over, v=v, weights=squares)
        return [f"y = f(w, {self.key})", f"return ({text}){'.sum()' if self.grid else ''}"]

    def over(self, rank: int) -> str:
        return ("-1" if rank == 1 else "(-2, -1)") if self.grid else ""

    # -- the update ------------------------------------------------------------------------------------------

    @property
    def key(self) -> str:
        k = self.rows("k", self.program.d)
        return {
            "previous": f"(0.5 * {k} + 0.5 * old_p)",
            "centred": f"({k} - new_m)",
        }.get(self.program.extra, k)

    def extra(self) -> list[str]:
        """Lines before the gradient that renew what else is carried."""
        k = self.rows("k", self.program.d)
        beta = "0.9"
        return {
            "previous": [f"new_p = {k}"],
            "centred": [f"new_m = 0.9 * old_m + 0.1 * {k}"],
            "count": ["new_n = old_n + 1.0"],
            "sum": [f"new_m = {beta} * old_m + {k}"],
            "unused": ["new_m = old_m"],
        }.get(self.program.extra, [])

    def extras(self) -> dict[str, tuple[int, ...]]:
        """What else is carried, and its shape."""
        k = (self.program.tile, self.program.d) if self.program.tile else (self.program.d,)
        return {
            "previous": {"p": k}, "centred": {"m": k}, "count": {"n": ()}, "sum": {"m": k},
            "unused": {"m": k},
        }.get(self.program.extra, {})  # fmt: skip

    def update_of(self, name: str) -> list[str]:
        """Lines that make ``new["name"]`` (and ``half["name"]``) from ``g["name"]``."""
        p = self.program
        w, g, s = f'old["{name}"]', f'g["{name}"]', f'past["{name}"]'
        rank = len(self.weights[name])
        rate = self.gate("rate", p.rate, name, "rate")
        if p.extra == "count":
            rate = f"{rate} / {self.number('new_n', rank)}"
        if p.mask:
            mask = self.token("mask", (), "mask")
            rate = f"{rate} * {self.number(f'{mask}.to({g}.dtype)', rank)}"
        decayed = w if p.decay == "none" else f"{self.gate('decay', p.decay, name, 'decay')} * {w}"
        beta = self.gate("beta", p.beta, name, "decay") if p.update in MOMENTA else ""
        if p.update == "clipped":
            total = f"{g}.square().sum({self.over(rank)})" if rank else f"{g}.square()"
            g = f"({g} / {self.number(f'(1.0 + {total}).sqrt()', rank)})"
        if p.update == "squashed":
            g = f"torch.tanh(2.0 * {g})"
        if p.update == "since anchor":
            tau = self.number(self.token("tau", (), "decay"), rank)
            start, base = f'anchor_past["{name}"]', f'base["{name}"]'
            return [
                f'half["{name}"] = {s} + {rate} * {g}',
                f'new["{name}"] = {base} - {tau} * (half["{name}"] - {start})',
            ]
        if p.update == "momentum":
            return [
                f'half["{name}"] = {beta} * {s} - {rate} * {g}',
                f'new["{name}"] = {decayed} + half["{name}"]',
            ]
        if p.update == "averaged":
            return [
                f'half["{name}"] = {beta} * {s} + (1.0 - {beta}) * {g}',
                f'new["{name}"] = {decayed} - {rate} * half["{name}"]',
            ]
        if p.update == "nesterov":
            return [
                f'half["{name}"] = {beta} * {s} - {rate} * {g}',
                f'new["{name}"] = {decayed} + {beta} * half["{name}"] - {rate} * {g}',
            ]
        if p.update == "adaptive":
            return [
                f'half["{name}"] = 0.9 * {s} + 0.1 * {g}.square()',
                f'new["{name}"] = {decayed} - {rate} * {g} / (half["{name}"] + 1e-2).sqrt()',
            ]
        return [f'new["{name}"] = {decayed} - {rate} * {g}']

    def gradient(self, at: str) -> list[str]:
        """Lines that make ``g``."""
        p = self.program
        if p.loop is not None and p.loop.gradient == "autograd":
            names = list(self.weights)
            values = ", ".join(f'{at}["{n}"]' for n in names)
            return [
                f"found = torch.autograd.grad(loss({at}), [{values}], create_graph=True)",
                f"g = dict(zip({names}, found))",
            ]
        if p.loop is not None and p.loop.gradient == "hand":
            (name,) = self.weights
            k, v = self.rows("k", p.d), self.rows("v", width_of(p))
            return [f'g = {{"{name}": {k}[..., :, None] * (f({at}, {k}) - {v})[..., None, :]}}']
        if p.gradient == "value":
            return [f"g, value = torch.func.grad_and_value(loss)({at})"]
        return [f"g = torch.func.grad(loss)({at})"]

    def updating(self) -> list[str]:
        """Lines from ``old``, ``base`` (the weights at the anchor) and the token to ``new``."""
        p = self.program
        at = "base" if p.at == "anchor" else "old"
        lines = self.extra()
        lines += ["def loss(w):", *indented(self.loss()), "new, half = {}, {}"]
        if p.update == "several":
            rates = [(n, self.gate("rate", p.rate, n, "rate")) for n in self.weights]
            steps = [f'"{n}": own["{n}"] - {rate} * g["{n}"]' for n, rate in rates]
            lines += [f"own = {at}", "for _ in range(2):"]
            lines += indented([*self.gradient("own"), f"own = {{{', '.join(steps)}}}"])
            for n in self.weights:
                decay = self.gate("decay", p.decay, n, "decay") if p.decay != "none" else "1.0"
                lines.append(f'new["{n}"] = {decay} * old["{n}"] + (own["{n}"] - {at}["{n}"])')
        else:
            lines += self.gradient(at)
            for name in self.weights:
                lines += self.update_of(name)
        for name, shape in self.weights.items():
            lines += self.afterwards(name, len(shape))
        return lines

    def afterwards(self, name: str, rank: int) -> list[str]:
        """Lines that change new weights, token by token."""
        w = f'new["{name}"]'
        if self.program.after == "norm" and rank:
            total = self.number(f"(1.0 + {w}.square().sum({self.over(rank)})).sqrt()", rank)
            return [f"{w} = {w} / {total}"]
        if self.program.after == "columns" and rank == 2:
            return [f"{w} = {w} / (0.5 + {w}.square().sum(-2, keepdim=True)).sqrt()"]
        if self.program.after == "towards":
            start = self.parameter(f"{name}_start", self.weights[name])
            return [f"{w} = 0.9 * {w} + 0.1 * {start}"]
        return []

    def reading(self) -> str:
        """The output of a token."""
        q = self.rows("q", self.program.d)
        after, before = f"f(new, {q})", f"f(old, {q})"
        o = width_of(self.program)
        return {
            "after": lambda: after,
            "before": lambda: before,
            "both": lambda: f"({after}, {before})",
            "gated": lambda: f"{after} * torch.sigmoid({self.token('o', (o,))})",
            "error": lambda: (
                f'{{"z": {after}, "error": {self.rows("v", o)} - f(base, {self.key})}}'
            ),
            "extra": lambda: (
                f"({after}, {'new_' + next(iter(self.extras()), '') if self.extras() else after})"
            ),
            "residual": lambda: f"{q} + {after}" if o == self.program.d else after,
            "number": lambda: f"({after}).square().sum(-1{', keepdim=True' if self.grid else ''})",
            "value": lambda: f"({after}, value)",
        }[self.program.output]()


def indented(lines: list[str], by: int = 1) -> list[str]:
    return textwrap.indent("\n".join(lines), "    " * by).split("\n")


HEADER = ["import dataclasses", "from typing import Any, NamedTuple", "", "import torch", "from torch import nn",
          "from torch.nn import functional as F", "", "import tttc", ""]  # fmt: skip


def trees_of(w: Writer) -> dict[str, dict[str, tuple[int, ...]]]:
    """The parts of the state: weights, a second tree like them, and what else is carried."""
    trees = {"weights": dict(w.weights)}
    if w.program.update in HALVES:
        trees["half"] = dict(w.weights)
    if w.extras():
        trees["extra"] = w.extras()
    return trees


def write(program: Program) -> tuple[str, Writer]:
    """The source, and what it takes."""
    from generator import loops, scans

    writer = Writer(program)
    lines = loops.lines(writer) if program.loop is not None else scans.lines(writer)
    return "\n".join([*HEADER, *lines]) + "\n", writer


__all__ = [
    "ACTIVATIONS",
    "LOSSES",
    "NORMS",
    "PRODUCTS",
    "WEIGHTED",
    "Writer",
    "weights_of",
    "write",
]
