"""What the documentation says about which programs compile, and how."""

from __future__ import annotations

from generator.description import Program

# Of docs/limits.md, "A loop may be left as it is": nothing else runs eagerly.
DOCUMENTED = ("can't be re-rolled",)


def documented(reason: str) -> bool:
    """Whether the documentation says that programs with this reason run eagerly."""
    return any(text in reason for text in DOCUMENTED)


def has_closed_form(program: Program) -> bool:
    """Whether a program is one of those whose mini-batches must become matrix products.

    Gradients at the anchor, updates affine in the state with scalar coefficients, nothing nonlinear done to weights.
    """
    matrices = all(
        x.kind in ("matrix", "bias", "activation", "norm", "residual") for x in program.layers
    )
    return (
        program.at == "anchor"
        and program.b > 1
        and not program.tile
        and matrices
        and program.update in ("descent", "since anchor", "momentum", "averaged", "nesterov")
        and program.after == "none"
        and program.extra == "none"
        and program.decay in ("none", "constant", "token", "shared", "product")
        and program.rate in ("constant", "token", "sigmoid", "shared", "product", "projection")
        and program.beta in ("constant", "token", "shared")
    )
