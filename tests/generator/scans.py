"""A described program as a step of ``tttc.scan`` and a function that calls it."""

from __future__ import annotations

from generator.source import Writer, indented, trees_of

CONTAINERS = ("dict", "nested", "tuple", "list", "namedtuple", "tensor")


def flat(w: Writer) -> list[tuple[str, str]]:
    """The leaves of the state: the tree each is in, and its name there."""
    return [(tree, name) for tree, leaves in trees_of(w).items() for name in leaves]


def packed(w: Writer, value) -> str:
    """The state in its container; ``value(tree, name)`` is the expression of a leaf."""
    leaves, kind = flat(w), w.program.container
    if kind == "tensor" and len(leaves) == 1:
        return value(*leaves[0])
    if kind in ("dict", "tensor"):
        return "{" + ", ".join(f'"{t}_{n}": {value(t, n)}' for t, n in leaves) + "}"
    if kind == "nested":
        trees = trees_of(w)
        inner = {t: ", ".join(f'"{n}": {value(t, n)}' for n in trees[t]) for t in trees}
        return "(" + ", ".join(f"{{{x}}}" for x in inner.values()) + ",)"
    if kind == "tuple":
        return "(" + ", ".join(value(t, n) for t, n in leaves) + ",)"
    if kind == "list":
        return "[" + ", ".join(value(t, n) for t, n in leaves) + "]"
    return "State(" + ", ".join(f"{t}_{n}={value(t, n)}" for t, n in leaves) + ")"


def leaf(w: Writer, state: str, tree: str, name: str) -> str:
    """A leaf of a state that is in its container."""
    leaves, kind = flat(w), w.program.container
    if kind == "tensor" and len(leaves) == 1:
        return state
    if kind in ("dict", "tensor"):
        return f'{state}["{tree}_{name}"]'
    if kind == "nested":
        return f'{state}[{list(trees_of(w)).index(tree)}]["{name}"]'
    if kind in ("tuple", "list"):
        return f"{state}[{leaves.index((tree, name))}]"
    return f"{state}.{tree}_{name}"


def tree(w: Writer, state: str, name: str) -> str:
    inside = ", ".join(f'"{n}": {leaf(w, state, name, n)}' for n in trees_of(w)[name])
    return f"{{{inside}}}"


def step(w: Writer) -> list[str]:
    """The step's lines."""
    model, updating, reading = w.model(), w.updating(), w.reading()
    q = [f'{n}_t = token["{n}"]' for n in w.tokens]
    body = ["def f(w, x):", *indented(model)]
    body += [f"base, old = {tree(w, 'anchor', 'weights')}, {tree(w, 'carry', 'weights')}"]
    if "half" in trees_of(w):
        body += [f"anchor_past, past = {tree(w, 'anchor', 'half')}, {tree(w, 'carry', 'half')}"]
    body += [f"old_{n} = {leaf(w, 'carry', 'extra', n)}" for n in w.extras()]
    values = {"weights": 'new["{}"]', "half": 'half["{}"]', "extra": "new_{}"}
    new = packed(w, lambda t, n: values[t].format(n))
    body = [*q, *body, *updating, f"return {new}, {reading}"]
    lines = ["def step(anchor, carry, token, shared):", *indented(body), ""]
    if w.program.container == "namedtuple":
        fields = [f"{t}_{n}: Any" for t, n in flat(w)]
        lines = ["class State(NamedTuple):", *indented(fields), "", *lines]
    return lines


def lines(w: Writer) -> list[str]:
    """The step, and ``program(init, tokens, shared)``."""
    p = w.program
    written = step(w)
    body = []
    if p.around in ("before", "both"):
        body += [
            'tokens = {**tokens, "k": torch.tanh(tokens["k"]), "v": F.silu(tokens["v"] * 2.0)}'
        ]
    if p.cut:
        body += [
            f"head = {{n: x[:, :, :{p.cut}] for n, x in tokens.items()}}",
            f"rest = {{n: x[:, :, {p.cut}:] for n, x in tokens.items()}}",
            f"state, first = tttc.scan(step, init, head, {p.b}, shared=shared)",
            f"state, second = tttc.scan(step, state, rest, {p.b}, shared=shared)",
            "z = (first, second)",
        ]
    else:
        body += [f"state, z = tttc.scan(step, init, tokens, {p.b}, shared=shared)"]
    if p.around in ("after", "both"):
        body += ["z = torch.utils._pytree.tree_map(lambda x: torch.tanh(x) * 0.5 + x, z)"]
    state = "(state.anchor, state.carry)" if p.used != "outputs" else "()"
    z = "z" if p.used != "states" else "()"
    body += [f"return {state}, {z}"]
    return [*written, "", "def program(init, tokens, shared):", *indented(body)]
