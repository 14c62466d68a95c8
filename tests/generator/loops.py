"""A described program as a module with a Python loop over tokens."""

from __future__ import annotations

from generator.source import Writer, indented, trees_of, width_of

AXIS = {"BHT": 2, "BTH": 1, "BT": 1, "T": 0}  # of the tokens
OUTPUTS = ("after", "before", "gated", "residual", "number", "both")


def at_token(w: Writer, name: str, t: str) -> str:
    """The leaf of one token."""
    return f"{name}[{', '.join([':'] * AXIS[w.program.loop.heads] + [t])}]"


def flat(w: Writer) -> list[tuple[str, str]]:
    return [(tree, name) for tree, leaves in trees_of(w).items() for name in leaves]


def start(w: Writer, tree: str, name: str) -> str:
    """The state before the first token."""
    grid = w.program.loop.heads
    rank = len(trees_of(w)[tree][name])
    if tree == "extra":
        first = at_token(w, "k", "0")
        return f"torch.zeros_like({first})" if rank else f"torch.zeros_like({first}[..., 0])"
    parameter = f"self.{name}"
    if grid == "T" and w.program.loop.state == "attribute":
        parameter = f"1.0 * {parameter}"  # modules take no tensor where they had a parameter
    if grid != "T":
        sizes = ", ".join(["-1"] * (rank + (grid != "BT")))
        parameter = (
            f"{parameter}.expand(k.shape[0], {sizes})"
            if sizes
            else f"{parameter}.expand(k.shape[0])"
        )
    return parameter if tree == "weights" else f"torch.zeros_like({parameter})"


def state_lines(w: Writer) -> tuple[list[str], list[str], str, str, list[str]]:
    """Before the loop, the state taken apart, the anchor renewed, the new state, classes."""
    kind, leaves = w.program.loop.state, flat(w)
    values = {"weights": 'new["{}"]', "half": 'half["{}"]', "extra": "new_{}"}
    new = {(t, n): values[t].format(n) for t, n in leaves}
    variable = {
        "locals": "{s}_{t}_{n}", "attribute": "self.{s}_{t}_{n}", "dict": '{s}["{t}_{n}"]',
        "dataclass": "{s}.{t}_{n}",
    }[kind]  # fmt: skip

    def named(s: str, t: str, n: str) -> str:
        return variable.format(s=s, t=t, n=n)

    def made(s: str, value) -> list[str]:
        if kind == "dict":
            return [f"{s} = {{" + ", ".join(f'"{t}_{n}": {value(t, n)}' for t, n in leaves) + "}"]
        if kind == "dataclass":
            return [f"{s} = State(" + ", ".join(value(t, n) for t, n in leaves) + ")"]
        return [f"{named(s, t, n)} = {value(t, n)}" for t, n in leaves]

    def taken(s: str, tree: str) -> str:
        inside = ", ".join(f'"{n}": {named(s, tree, n)}' for n in trees_of(w)[tree])
        return f"{{{inside}}}"

    before = made("state", lambda t, n: start(w, t, n))
    anchored = w.program.b > 1
    renew = (
        ["anchor = dict(state)"] if kind == "dict" else ["anchor = state"] if kind == "dataclass"
        else made("anchor", lambda t, n: named("state", t, n))
    )  # fmt: skip
    at = "anchor" if anchored else "state"
    apart = [f"base = {taken(at, 'weights')}", f"old = {taken('state', 'weights')}"]
    if "half" in trees_of(w):
        apart += [f"anchor_past = {taken(at, 'half')}", f"past = {taken('state', 'half')}"]
    apart += [f"old_{n} = {named('state', 'extra', n)}" for n in w.extras()]
    after = made("state", lambda t, n: new[t, n])
    if kind == "dict" and w.program.loop.anchor == "after":  # changed in place
        after = [f"{named('state', t, n)} = {new[t, n]}" for t, n in leaves]
    results = [named("state", t, n) for t, n in leaves]
    classes = []
    if kind == "dataclass":
        fields = [f"{t}_{n}: torch.Tensor" for t, n in leaves]
        classes = ["@dataclasses.dataclass", "class State:", *indented(fields), "", ""]
    return before, apart, renew, after, results, classes  # type: ignore[return-value]


def lines(w: Writer) -> list[str]:
    """The module: its arguments are the tokens' leaves in order."""
    p, loop = w.program, w.program.loop
    model, updating, reading = w.model(), w.updating(), w.reading()
    before, apart, renew, after, results, classes = state_lines(w)
    names, axis = list(w.tokens), AXIS[loop.heads]
    body: list[str] = []
    if p.around in ("before", "both"):
        body += ["k, v = torch.tanh(k), F.silu(v * 2.0)"]
    body += before
    anchored = p.b > 1
    if anchored and loop.anchor == "after":
        body += renew
    parts = [x.strip() for x in ([reading] if p.output != "both" else reading[1:-1].split(", f("))]
    parts = [parts[0], *(f"f({x}" for x in parts[1:])]
    outs = [f"outs_{i}" for i in range(len(parts))]
    counted = loop.output == "preallocated" or anchored
    if loop.output == "preallocated":
        like = "v[..., :1]" if p.output == "number" else "v"
        body += [f"{o} = torch.empty_like({like})" for o in outs]
    else:
        body += [f"{o} = []" for o in outs]
    inside = []
    if loop.tokens == "range":
        header = f"for t in range(k.shape[{axis}]):"
        inside += [f"{n}_t = {at_token(w, n, 't')}" for n in names]
    else:
        variables = ", ".join(f"{n}_t" for n in names) + ("," if len(names) == 1 else "")
        zipped = f"zip({', '.join(f'{n}.unbind({axis})' for n in names)}, strict=True)"
        counting = counted or loop.tokens == "enumerate"
        header = (
            f"for t, ({variables}) in enumerate({zipped}):" if counting
            else f"for {variables} in {zipped}:"
        )  # fmt: skip
    if anchored and loop.anchor == "before":
        inside += [f"if t % {p.b} == 0:", *indented(renew)]
    inside += ["def f(w, x):", *indented(model), *apart, *updating, *after]
    for o, z in zip(outs, parts, strict=True):
        if loop.output == "preallocated":
            inside += [f"{at_token(w, o, 't')} = {z}"]
        elif loop.output == "list":
            inside += [f"{o}.append({z})"]
        else:
            inside += [f"{o}.append(({z}).unsqueeze({axis}))"]
    if anchored and loop.anchor == "after":
        inside += [f"if (t + 1) % {p.b} == 0:", *indented(renew)]
    body += [header, *indented(inside)]
    joined = {"list": f"torch.stack({{}}, {axis})", "cat": f"torch.cat({{}}, dim={axis})",
              "preallocated": "{}"}[loop.output]  # fmt: skip
    z = ", ".join(joined.format(o) for o in outs)
    if p.around in ("after", "both"):
        body += [f"z = ({z},)", "z = tuple(torch.tanh(x) * 0.5 + x for x in z)"]
    else:
        body += [f"z = ({z},)"]
    state = f"({', '.join(results)},)" if p.used != "outputs" else "()"
    body += [f"return {state}, {'z' if p.used != 'states' else '()'}"]
    parameters = {n: s for n, s in w.weights.items()} | w.shared
    made = [f'self.{n} = nn.Parameter(values["{n}"])' for n in parameters]
    return [
        *classes, "class Program(nn.Module):",
        *indented(["def __init__(self, values):", *indented(["super().__init__()", *made]), "",
                   f"def forward(self, {', '.join(names)}):", *indented(body)]),
    ]  # fmt: skip


__all__ = ["AXIS", "OUTPUTS", "lines", "width_of"]
