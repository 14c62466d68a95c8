"""What hypothesis draws: descriptions of programs, most of them scans, some loops."""

from __future__ import annotations

from hypothesis import strategies as st

from generator.description import WEIGHTED, Layer, Loop, Program
from generator.loops import OUTPUTS
from generator.scans import CONTAINERS
from generator.source import ACTIVATIONS, LOSSES, NORMS, PRODUCTS

WIDTHS = st.sampled_from([3, 1, 2, 4, 5, 6, 8])
RATES = (
    "constant",
    "token",
    "sigmoid",
    "shared",
    "product",
    "projection",
    "channels",
    "token channels",
    "rows",
)
DECAYS = (
    "none",
    "none",
    "none",
    "constant",
    "token",
    "shared",
    "product",
    "channels",
    "token channels",
    "rows",
)
UPDATES = ("descent", "descent", "since anchor", "momentum", "averaged", "nesterov", "several", "adaptive", "clipped",
           "squashed")  # fmt: skip
AFTER = ("none",) * 8 + ("norm", "columns", "towards")
EXTRAS = ("none", "none", "none", "previous", "centred", "count", "sum", "unused")
READINGS = (
    "after",
    "after",
    "before",
    "both",
    "gated",
    "error",
    "extra",
    "residual",
    "number",
    "value",
)
AROUND = ("none", "before", "after", "both")


@st.composite
def layers(draw, d: int, small: bool = False) -> tuple[Layer, ...]:
    """Up to four layers with fast weights, and what lies between them."""
    depth = draw(st.sampled_from([1, 1, 2] if small else [1, 1, 2, 2, 3, 4]))
    made: list[Layer] = []
    width = d
    for _ in range(depth):
        kind = draw(
            st.sampled_from(["matrix"] * 4 + ["transposed", "bias", "gain", "number", "swiglu"])
        )
        wide = draw(WIDTHS) if kind in ("matrix", "transposed", "swiglu") else 0
        name = draw(st.sampled_from(sorted(PRODUCTS))) if kind in ("matrix", "swiglu") else ""
        inner = draw(WIDTHS) if kind == "swiglu" else 0
        made.append(Layer(kind, name, wide, inner))
        width = wide or width
        for _ in range(draw(st.sampled_from([0, 1] if small else [0, 1, 1, 2]))):
            kind = draw(st.sampled_from(["activation"] * 3 + ["norm", "residual", "slow", "gated"]))
            names = ACTIVATIONS if kind == "activation" else NORMS if kind == "norm" else [""]
            made.append(Layer(kind, draw(st.sampled_from(sorted(names)))))
    # Slow matrices keep the width, so that what follows does not depend on what hypothesis leaves out.
    width = d
    for i, layer in enumerate(made):
        if layer.kind == "slow":
            made[i] = Layer("slow", "", width)
        width = layer.width or width
    return tuple(made)


@st.composite
def sizes(draw, largest: int = 16, small: bool = False) -> dict[str, int]:
    """Batch, heads, mini-batch, and at most three mini-batches of tokens."""
    b = draw(st.sampled_from([x for x in (4, 1, 2, 3, 7, 16) if x <= largest]))
    T = draw(st.integers(1, min(3 * b, b + 8)))
    return {
        "B": draw(st.integers(1, 2 if small else 3)),
        "H": draw(st.integers(1, 2 if small else 3)),
        "b": b,
        "T": T,
        "d": draw(WIDTHS),
    }


@st.composite
def rules(draw) -> dict[str, object]:
    """What scans and loops have in common."""
    of = lambda xs: draw(st.sampled_from(xs))  # noqa: E731
    return {
        "loss": of(sorted(LOSSES)), "update": of(UPDATES), "at": of(["anchor"] * 5 + ["carry"]),
        "rate": of(RATES), "decay": of(DECAYS), "beta": of(["constant", "token", "shared", "channels"]),
        "after": of(AFTER), "extra": of(EXTRAS), "mask": draw(st.integers(0, 5)) == 5,
        "used": of(["all"] * 3 + ["outputs", "states"]), "seed": draw(st.integers(0, 2**16)),
    }  # fmt: skip


@st.composite
def scans(
    draw,
    path: str = "direct",
    dtypes: tuple[str, ...] = ("float64",),
    largest: int = 16,
    small: bool = False,
) -> Program:
    """A step of ``tttc.scan``."""
    of = lambda xs: draw(st.sampled_from(xs))  # noqa: E731
    size, rule = draw(sizes(largest, small)), draw(rules())
    cut = (
        draw(st.integers(1, size["T"] - 1)) if size["T"] > 1 and draw(st.integers(0, 4)) == 4 else 0
    )
    output = of(READINGS)
    tile = of([0] * 6 + [2, 3])
    if output == "value":
        rule["update"] = of(("descent", "momentum"))
    if rule["extra"] in ("count",) and tile:
        rule["extra"] = "none"
    return Program(
        layers=draw(layers(size["d"], small)), **size, **rule, tile=tile, output=output, cut=cut,
        gradient="value" if output == "value" else "func", container=of(CONTAINERS), batched=of([True, False]),
        strided=of([False, True]), around=of(AROUND) if path == "dynamo" else "none",
        wanted=of(["all"] * 4 + ["none", "tokens", "parameters", "state"]), dtype=of(dtypes), path=path,
    )  # fmt: skip


@st.composite
def loops(draw) -> Program:
    """A module with a Python loop over tokens."""
    of = lambda xs: draw(st.sampled_from(xs))  # noqa: E731
    size, rule = draw(sizes(4, small=True)), draw(rules())
    size["T"] = max(size["T"], size["b"] + 2)
    made = draw(layers(size["d"], small=True))
    gradient = of(["func", "func", "autograd", "hand"])
    if gradient == "hand":
        made = (Layer("matrix", of(sorted(PRODUCTS)), draw(WIDTHS)),)
        rule["loss"] = "half square"
        if rule["update"] == "several":
            rule["update"] = "descent"
    loop = Loop(
        gradient, of(["list", "preallocated", "cat"]), of(["before", "after"]),
        of(["locals", "dict", "dataclass", "attribute"]), of(["range", "zip", "enumerate"]),
        of(["BHT", "BTH", "BT", "T"]),
    )  # fmt: skip
    return Program(
        layers=made, **size, **rule, output=of(OUTPUTS), around=of(AROUND), path="loop", loop=loop,
        wanted="all" if gradient == "autograd" else of(["all"] * 4 + ["none", "tokens", "parameters"]),
    )  # fmt: skip


__all__ = ["WEIGHTED", "loops", "scans"]
