"""The tables and sentences with measured numbers in README.md and docs/numbers.md, made from the records.

    python benchmarks/tables.py            # write them, from the newest record of each kind in benchmarks/results
    python benchmarks/tables.py --check    # exit 1, with the difference, where a page says something else

A page marks the place of what is made: ``<!-- made by benchmarks/tables.py: NAME -->``, up to ``<!-- end -->``. NAME is
one of BLOCKS below.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence

from page_tables import memory, rules, scans, schedules, whole_models
from page_tables.markdown import wrapped
from page_tables.records import ROOT, Record, heading, records

PAGES = ("README.md", "docs/numbers.md")
MARK = re.compile(
    r"(<!-- made by benchmarks/tables\.py: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL
)


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


def earlier(page: str) -> str:
    """Links to the records that no table shows."""
    kinds = ("scans", "rules", "memory", "models", "picked", "schedules")
    old = [r for kind in kinds for r in records(kind)[0 if kind == "schedules" else 1 :]]
    return "".join(f"- {r.link(page)}: {r.device}\n" for r in old).rstrip("\n")


BLOCKS: dict[str, Callable[[str], str]] = {
    "speed": of_newest("scans", scans.speed),
    "scans": with_link("scans", heading),
    "forward": of_newest("scans", lambda r: scans.by_shape(r, "us")),
    "training": of_newest("scans", lambda r: scans.by_shape(r, "training_us")),
    "verdict": of_newest("scans", scans.verdict),
    "accuracy": of_newest("scans", scans.accuracy),
    "every-case": of_newest("scans", scans.every_case),
    "rules": with_link(
        "rules", lambda r: f"Other rules, {r.data['shape']}, microseconds: {heading(r)}"
    ),
    "rules-tables": of_newest("rules", rules.beside_peers),
    "memory": with_link("memory", memory.in_words),
    "memory-table": of_newest("memory", memory.by_length),
    "models": with_link("models", lambda r: f"Whole models: {heading(r)}"),
    "models-table": of_newest("models", whole_models.tokens_a_second),
    "models-graphs": of_newest("models", lambda r: whole_models.tokens_a_second(r, "graph_us")),
    "models-verdict": of_newest("models", whole_models.verdict),
    "models-memory": of_newest("models", whole_models.memory),
    "models-missing": of_newest("models", whole_models.missing),
    "picked": with_link("picked", lambda r: f"Schedules: {heading(r)}"),
    "picked-verdict": of_newest("picked", schedules.verdict),
    "picked-table": of_newest("picked", schedules.picked),
    "models-plot": picture("models", ".png", "Time per token against context"),
    "roofline": picture("scans", "-roofline.png", "Roofline of scans"),
    "earlier": earlier,
}


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
