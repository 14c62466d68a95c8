"""The tables and sentences with measured numbers in README.md and docs/numbers.md, made from the records.

    python benchmarks/tables.py            # write them, from the newest record of each kind in benchmarks/results
    python benchmarks/tables.py --check    # exit 1, with the difference, where a page says something else

A page marks the place of what is made: ``<!-- made by benchmarks/tables.py: NAME -->``, up to ``<!-- end -->``. NAME is
one of BLOCKS below.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/numbers.md")
MARK = re.compile(
    r"(<!-- made by benchmarks/tables\.py: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)
NAMES = {
    "ttt_linear_b16": "TTT-Linear, mini-batch 16",
    "ttt_linear_b16 replayed": 'TTT-Linear, `mode="reduce-overhead"`',
    "ttt_mlp_b16": "TTT-MLP, causal mini-batch 16",
    "ttt_mlp_chunk64": "TTT-MLP, whole-chunk update of 64",
    "ttt_mlp_chunk64 replayed": 'TTT-MLP, update of 64, `mode="reduce-overhead"`',
    "fla chunk_ttt_linear": "flash-linear-attention, chunk",
    "fla chunk_ttt_linear replayed": "flash-linear-attention, chunk, replayed as a CUDA graph",
    "fla fused_chunk_ttt_linear": "flash-linear-attention, fused chunk",
}
MODELS = {
    "ttt_linear": "TTT-Linear, tttc",
    "ttt_mlp": "TTT-MLP, tttc",
    "transformer": "Transformer",
    "mamba": "Mamba, mamba-ssm",
    "hand_dual_graphs": "TTT-Linear by hand, torch.compile, CUDA graphs",
    "hand_dual": "TTT-Linear by hand, torch.compile",
}
RIVALS = {"ttt_linear_b16": ("fla chunk_ttt_linear", "fla fused_chunk_ttt_linear")}
DIRECTIONS = {"us": "forward", "training_us": "forward and backward"}


class Record:
    """A record of one kind: its file, as pages link to it, and what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    def link(self, page: str) -> str:
        """A link to it from a page."""
        up = "../" * page.count("/")
        return f"[{self.path.name}]({up}benchmarks/results/{self.path.name})"

    @property
    def device(self) -> str:
        """The card, as people call it."""
        return re.sub(r" (80|141)GB.*| PCIe.*", "", str(self.data["device"]))

    @property
    def times(self) -> dict[tuple[str, str, str], float]:
        """Microseconds by case, shape and direction ("us" or "training_us")."""
        rows = [r for k in ("forward", "peers", "training") for r in self.data.get(k, ())]
        plain = {
            (r["case"], r["shape"], direction): r[direction]
            for r in rows
            for direction in DIRECTIONS
            if direction in r
        }
        replayed = {
            (f"{r['case']} replayed", r["shape"], "training_us"): r["training_replayed_us"]
            for r in rows
            if "training_replayed_us" in r
        }
        return plain | replayed


def records(kind: str, folder: Path = RESULTS) -> list[Record]:
    """The records of a kind, the newest first."""
    found = [Record(p) for p in folder.glob(f"*-{kind}.json")]
    return sorted(found, key=lambda r: (str(r.data.get("date", "")), r.path.name), reverse=True)


def number(x: float) -> str:
    """A whole number, its thousands apart: ``22 424``."""
    return f"{x:,.0f}".replace(",", " ") if x >= 10_000 else f"{x:.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


# -- scans ------------------------------------------------------------------------------------------------


def shapes_of(times: dict[tuple[str, str, str], float]) -> list[str]:
    """The shapes of a record, in its order."""
    return list(dict.fromkeys(shape for _, shape, _ in times))


def by_shape(record: Record, direction: str) -> str:
    """A row a case, a column a shape; the fastest of those that compute the same is bold."""
    times = record.times
    cases = [c for c in NAMES if any((c, s, direction) in times for s in shapes_of(times))]
    # Rivals stand under what they rival.
    ordered = list(dict.fromkeys(c for x in cases for c in (x, *RIVALS.get(x, ())) if c in cases))
    rows = []
    for case in ordered:
        group = next(([c, *r] for c, r in RIVALS.items() if case in (c, *r)), [case])
        cells = [NAMES[case]]
        for shape in shapes_of(times):
            found = times.get((case, shape, direction))
            others = [times[c, shape, direction] for c in group if (c, shape, direction) in times]
            shown = "" if found is None else number(found)
            best = found is not None and len(others) > 1 and found == min(others)
            cells.append(f"**{shown}**" if best else shown)
        rows.append(cells)
    return table([f"{DIRECTIONS[direction]}, µs", *shapes_of(times)], rows)


def every_case(record: Record) -> str:
    """All of a record of scans."""
    times = record.times
    floors = {(r["case"], r["shape"]): r.get("floor_us") for r in record.data["forward"]}
    rows = []
    for case, shape in dict.fromkeys((c, s) for c, s, _ in times):
        floor = floors.get((case, shape))
        cells = [times.get((case, shape, d)) for d in DIRECTIONS]
        forward, training = ("" if x is None else number(x) for x in cells)
        rows.append([case, shape, forward, "" if floor is None else number(floor), training])
    return table(["case", "shape", "forward", "floor", "forward and backward"], rows)


def compared(record: Record) -> Iterator[tuple[str, str, str, float]]:
    """For each case with rivals: case, shape, direction, and how many times as long the best rival takes."""
    times = record.times
    for case, shape, direction in times:
        rivals = [times.get((r, shape, direction)) for r in RIVALS.get(case, ())]
        known = [x for x in rivals if x is not None]
        if known:
            yield case, shape, direction, min(known) / times[case, shape, direction]


def verdict(record: Record) -> str:
    """By how much the rivals are slower, and where they are faster."""
    parts = []
    for direction, said in DIRECTIONS.items():
        found = [(shape, x) for _, shape, d, x in compared(record) if d == direction]
        ahead = [x for _, x in found if x >= 1]
        behind = [
            f"at {shape} it is {1 / x:.1f} times as fast as ours" for shape, x in found if x < 1
        ]
        if ahead:
            low, high = (f"{x:.1f}" for x in (min(ahead), max(ahead)))
            span = low if low == high else f"{low} to {high}"
            behind.insert(0, f"takes {span} times as long{'' if behind else ' as ours'}")
        if behind:
            text = f"For the {said} of TTT-Linear flash-linear-attention's best kernel {'; '.join(behind)}."
            parts.append(text)
    return " ".join(parts)


def accuracy(record: Record) -> str:
    """The largest errors of a record of scans."""
    outputs: dict[str, list[float]] = {}
    for row in record.data["forward"]:
        for what, x in row.get("errors", {}).items():
            if (length := re.match(r"T\d+", what)) is not None:
                outputs.setdefault(length[0], []).append(x)
    gradients = [x for r in record.data.get("training", ()) for x in r.get("gradient_errors", ())]
    said = ", ".join(f"{max(x):.1e} at {length}" for length, x in outputs.items())
    text = f"Largest relative error against float64: outputs {said}"
    return text + (f"; gradients {max(gradients):.1e}." if gradients else ".")


def speed(record: Record) -> str:
    """The sentence under the rule of the README."""
    times = record.times
    shape = "B16 T2048"
    ours = times["ttt_linear_b16", shape, "us"]
    best = next(x for c, s, d, x in compared(record) if (s, d) == (shape, "us"))
    return (
        f"With 32 heads of 64 and mini-batches of 16, a forward of TTT-Linear, which is this with a layer norm, takes "
        f"{number(ours)} µs for 16 sequences of 2048 tokens on an {record.device}: {best:.1f} times as fast as "
        f"flash-linear-attention's fastest kernel, written by hand."
    )


# -- rules, memory ----------------------------------------------------------------------------------------


def rules(record: Record) -> str:
    """Times of other rules beside their peers, and errors of all."""
    data = record.data
    parts = []
    rows = []
    for name, directions in data.get("times", {}).items():
        for direction, contenders in directions.items():
            if not isinstance(contenders, dict) or "us" not in contenders.get("tttc", {}):
                continue
            others = [
                f"{n} {number(r['us'])}"
                + (f" (by {r['length']} tokens)" if r.get("length") else "")
                for n, r in contenders.items()
                if n != "tttc" and "us" in r
            ]
            ours = number(contenders["tttc"]["us"])
            rows.append([name.replace("_", " "), direction, ours, ", ".join(others)])
    if rows:
        parts.append(table(["rule", "direction", "tttc", "peers"], rows))
    rows = [
        [name.replace("_", " "), str(found["form"]), f"{found['output']:.1e}", worst]
        for name, found in data.get("errors", {}).items()
        if "output" in found
        for gradients in [[x for k, x in found.items() if k.startswith("gradient")]]
        for worst in [f"{max(gradients):.1e}" if gradients else "not measured"]
    ]
    if rows:
        head = ["rule", "form", "error of outputs", "largest error of a gradient"]
        parts.append(table(head, rows))
    return "\n".join(parts)


def memory(record: Record) -> str:
    """Peak memory against length."""
    cases = record.data["cases"]
    lengths = [r["length"] for r in next(iter(cases.values()))["rows"]]
    rows = [
        [NAMES.get(case, case), *(f"{r['peak_bytes'] / 2**20:.0f}" for r in found["rows"])]
        for case, found in cases.items()
    ]
    return table(["peak, MiB", *(f"T{n}" for n in lengths)], rows)


def memory_words(record: Record) -> str:
    """The same in a sentence."""
    rows = record.data["cases"]["ttt_linear_b16"]["rows"]
    slopes = [
        (b["peak_bytes"] - a["peak_bytes"]) / (b["length"] - a["length"])
        for a, b in itertools.pairwise(rows)
    ]
    straight = next(i for i in range(len(slopes)) if max(slopes[i:]) <= 1.02 * min(slopes[i:]))
    (at,) = [r["ratio"] for r in rows if r["length"] == 32768]
    return (
        f"Peak memory of forward and backward of TTT-Linear is {at:.2f} times the bytes of q, k, v, the output and their "
        f"gradients at 32768 tokens, {rows[-1]['ratio']:.2f} times at {rows[-1]['length']}; from "
        f"{rows[straight]['length']} tokens on every token adds {slopes[-1] / 1e3:.0f} kB, a straight line"
    )


# -- whole models -----------------------------------------------------------------------------------------


PEERS = ("transformer", "mamba", "hand_dual_graphs", "hand_dual")
Shape = tuple[int, int]  # sequences, and tokens of each


def by_model(record: Record, time: str = "us") -> dict[str, dict[tuple[str, str], dict[Shape, dict[str, Any]]]]:  # fmt: skip
    """Rows by size, model and direction (in the order of MODELS), and shape; those that have that time."""
    found: dict[str, dict[tuple[str, str], dict[Shape, dict[str, Any]]]] = {}
    order = list(MODELS)
    directions = list(dict.fromkeys(r["direction"] for r in record.data["rows"]))
    for r in sorted(record.data["rows"], key=lambda r: (directions.index(r["direction"]), order.index(r["model"]))):  # fmt: skip
        if r.get(time):
            rows = found.setdefault(r["size"], {}).setdefault((r["direction"], r["model"]), {})
            rows[r["batch"], r["context"]] = r
    return found


def shapes_in(rows: dict[Any, dict[Shape, Any]]) -> list[Shape]:
    """Those of the fewest tokens first, contexts in order."""
    return sorted({s for each in rows.values() for s in each}, key=lambda s: (s[0] * s[1], s[1]))


def of_shapes(shapes: Sequence[Shape]) -> list[str]:
    """The head of their columns."""
    return [f"{batch} × {context}" for batch, context in shapes]


def tokens_a_second(record: Record, time: str = "us") -> str:
    """A table a size: a row a model and direction, a column a shape; the fastest of each is bold."""
    parts = []
    for size, rows in by_model(record, time).items():
        shapes, cells = shapes_in(rows), []
        rates = {k: {s: 1e3 * s[0] * s[1] / r[time] for s, r in each.items()} for k, each in rows.items()}  # fmt: skip
        for (direction, model), each in rates.items():
            best = {s: max(x.get(s, 0.0) for (d, _), x in rates.items() if d == direction) for s in shapes}  # fmt: skip
            shown = {s: f"{x:.{1 if x < 100 else 0}f}" for s, x in each.items()}
            of = [f"**{shown[s]}**" if each.get(s) == best[s] else shown.get(s, "") for s in shapes]
            cells.append([direction, MODELS[model], *of])
        parts.append(table([size, "thousand tokens a second", *of_shapes(shapes)], cells))
    return "\n".join(parts)


def models_verdict(record: Record) -> str:
    """A table a size: how many times as fast TTT-Linear is as each peer."""
    parts = []
    for size, rows in by_model(record).items():
        shapes, cells = shapes_in(rows), []
        for (direction, model), each in rows.items():
            ours = rows.get((direction, "ttt_linear"), {})
            ratios = [f"{each[s]['us'] / ours[s]['us']:.2f}" if s in each and s in ours else "" for s in shapes]  # fmt: skip
            if model in PEERS and any(ratios):
                cells.append([direction, MODELS[model], *ratios])
        parts.append(table([size, "TTT-Linear is times as fast as", *of_shapes(shapes)], cells))
    return "\n".join(parts)


def models_memory(record: Record) -> str:
    """A table a size: peak memory of training steps."""
    parts = []
    for size, all_rows in by_model(record, "peak_bytes").items():
        rows = {model: each for (direction, model), each in all_rows.items() if direction == "training"}  # fmt: skip
        shapes = shapes_in(rows)
        cells = [
            [MODELS[m], *(f"{each[s]['peak_bytes'] / 2**30:.1f}" if s in each else "" for s in shapes)]
            for m, each in rows.items()
        ]  # fmt: skip
        parts.append(table([f"{size}: peak of a training step, GiB", *of_shapes(shapes)], cells))
    return "\n".join(parts)


def models_missing(record: Record) -> str:
    """What there is no row of, and why."""
    said = [
        f"{f['size']} {MODELS[f['model']]}, {f['what'].replace(' x ', ' × ')}: {first_line(f['why'])}"
        for f in record.data.get("failed", ())
        if not f["what"].startswith(("graph", "profile"))
    ]
    return f"Not measured: {'; '.join(said)}." if said else ""


def first_line(text: str) -> str:
    """Of what a process said when it failed."""
    return text.strip().partition("\n")[0][:120].rstrip(".")


# -- schedules --------------------------------------------------------------------------------------------

PICKS = {"searched": "search", "rules": "rules", "model": "cost model's first"}
NEAR = 1.1  # times as long as the fastest


def studied(record: Record) -> list[dict[str, Any]]:
    """The rows that were timed to their end."""
    return [r for r in record.data["rows"] if not {"error", "partial"} & set(r)]


def picked(record: Record) -> str:
    """A row a shape: the fastest schedule, and how many times as long the picked ones take."""
    rows = []
    for r in studied(record):
        case, *sizes = r["shape"].rsplit("_", 3)
        ratios = [r[name]["of best"] for name in PICKS]
        cells = ["" if x is None else f"{x:.2f}" for x in ratios]
        name = NAMES.get(case, case.replace("_", " "))
        rows.append([name, " ".join(sizes), r["direction"], str(r["timed"]), number(r["best"]["us"]), *cells])  # fmt: skip
    return table(["rule", "shape", "", "timed", "fastest, µs", *PICKS.values()], rows)


def picked_verdict(record: Record) -> str:
    """On how many shapes what is picked is near the fastest."""
    rows = studied(record)
    parts = []
    for direction in dict.fromkeys(r["direction"] for r in rows):
        its = [r for r in rows if r["direction"] == direction]
        said = []
        for name, words in PICKS.items():
            ratios = {r["shape"]: r[name]["of best"] or float("inf") for r in its}
            near = sum(x <= NEAR for x in ratios.values())
            worst = max(ratios, key=ratios.__getitem__)
            far = f"{ratios[worst]:.2f} times as long" if ratios[worst] < float("inf") else "not timed"  # fmt: skip
            said.append(f"{words} {near} (at worst {far}, {worst.replace('_', ' ')})")
        parts.append(
            f"Of {len(its)} shapes, {direction}, the schedule picked is within {NEAR - 1:.0%} of the fastest of all that "
            f"were timed on: {'; '.join(said)}."
        )
    failed = [f"{r['shape'].replace('_', ' ')} {r['direction']}" for r in record.data["rows"] if r not in rows]  # fmt: skip
    if failed:
        parts.append(f"Not timed to the end: {', '.join(failed)}.")
    return " ".join(parts)


def picture(kind: str, suffix: str, words: str) -> Callable[[str], str]:
    """The plot beside the newest record of a kind, where there is one."""

    def block(page: str) -> str:
        found = records(kind)
        path = found[0].path.with_name(found[0].path.stem + suffix) if found else None
        if path is None or not path.exists():
            return ""
        up = "../" * page.count("/")
        return f"![{words}]({up}benchmarks/results/{path.name})"

    return block


# -- pages ------------------------------------------------------------------------------------------------


def of_newest(kind: str, made: Callable[[Record], str]) -> Callable[[str], str]:
    """A block made from the newest record of a kind; empty where there is none."""

    def block(page: str) -> str:
        found = records(kind)
        return made(found[0]).rstrip("\n") if found else ""

    return block


def with_link(kind: str, made: Callable[[Record], str]) -> Callable[[str], str]:
    """The same, with a link to the record."""

    def block(page: str) -> str:
        found = records(kind)
        return f"{made(found[0])} ({found[0].link(page)})." if found else ""

    return block


def heading(record: Record) -> str:
    """What was measured, on what, by what."""
    versions = record.data["versions"]
    said = ", ".join(
        f"{n} {str(versions[n]).partition('+')[0]}"
        for n in ("torch", "triton", "flash-linear-attention", "mamba-ssm")
        if n in versions
    )
    command = str(record.data.get("command", "")).split(" benchmarks/results")[0]
    return f"One {record.device}, {record.data['date']}, {said}; `{command} OUT.json`"


def earlier(page: str) -> str:
    """Links to the records that no table shows."""
    kinds = ("scans", "rules", "memory", "models", "picked", "schedules")
    old = [r for kind in kinds for r in records(kind)[0 if kind == "schedules" else 1 :]]
    return "".join(f"- {r.link(page)}: {r.device}\n" for r in old).rstrip("\n")


BLOCKS: dict[str, Callable[[str], str]] = {
    "speed": of_newest("scans", speed),
    "scans": with_link("scans", heading),
    "forward": of_newest("scans", lambda r: by_shape(r, "us")),
    "training": of_newest("scans", lambda r: by_shape(r, "training_us")),
    "verdict": of_newest("scans", verdict),
    "accuracy": of_newest("scans", accuracy),
    "every-case": of_newest("scans", every_case),
    "rules": with_link(
        "rules", lambda r: f"Other rules, {r.data['shape']}, microseconds: {heading(r)}"
    ),
    "rules-tables": of_newest("rules", rules),
    "memory": with_link("memory", memory_words),
    "memory-table": of_newest("memory", memory),
    "models": with_link("models", lambda r: f"Whole models: {heading(r)}"),
    "models-table": of_newest("models", tokens_a_second),
    "models-graphs": of_newest("models", lambda r: tokens_a_second(r, "graph_us")),
    "models-verdict": of_newest("models", models_verdict),
    "models-memory": of_newest("models", models_memory),
    "models-missing": of_newest("models", models_missing),
    "picked": with_link("picked", lambda r: f"Schedules: {heading(r)}"),
    "picked-verdict": of_newest("picked", picked_verdict),
    "picked-table": of_newest("picked", picked),
    "models-plot": picture("models", ".png", "Time per token against context"),
    "roofline": picture("scans", "-roofline.png", "Roofline of scans"),
    "earlier": earlier,
}


def wrapped(text: str, width: int = 120) -> str:
    """A sentence in lines as pages have them; tables and lists stay as they are."""
    if text.startswith(("|", "- ", "!")):
        return text
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".lstrip()
    return "\n".join([*lines, line])


def made(page: str, text: str) -> str:
    """A page with its blocks as the records say."""

    def block(found: re.Match[str]) -> str:
        if found[2] not in BLOCKS:
            raise ValueError(f"{page}: expected one of {', '.join(BLOCKS)}, got {found[2]!r}")
        content = wrapped(BLOCKS[found[2]](page))
        return f"{found[1]}{content}\n{found[3]}" if content else f"{found[1]}{found[3]}"

    return MARK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or check them; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 where a page differs"
    )
    check = parser.parse_args(arguments).check
    differs = False
    for page in PAGES:
        path = ROOT / page
        before = path.read_text(encoding="utf-8")
        after = made(page, before)
        differs |= before != after
        if before != after and check:
            lines = (x.splitlines(keepends=True) for x in (before, after))
            sys.stdout.writelines(difflib.unified_diff(*lines, page, f"{page} as the records say"))
        elif before != after:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {page}")
    return int(differs and check)


if __name__ == "__main__":
    sys.exit(main())
