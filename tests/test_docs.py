"""The documentation holds: its Python and its commands run, its links lead somewhere, its numbers are the record's.

In a page, ``python`` blocks run top to bottom under one set of names, from an empty folder; one that starts with
``# name.py`` is written to that file instead. ``bash`` blocks run too. ``console`` blocks are shown, not run: what they
ask of ``tttc``, ``make`` and ``pip`` must exist.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from tttc import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CHANGES = {  # smaller, for the test
    "README.md": [
        ("(256, num_heads=4)", "(32, num_heads=2)"),
        ("randn(2, 128, 256)", "randn(1, 40, 32)"),
    ]
}
named = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(kind in ("python", "bash") for kind, _ in blocks(p))],
    ids=lambda p: p.name,
)
def test_python_and_commands_run(page, tmp_path, monkeypatch):
    # Inductor takes long to compile and has tests of its own.
    monkeypatch.setattr("tttc.report.benchmark._has_compiler", lambda: False)
    # As a reader without a GPU runs it, not kernels in the interpreter that other tests look at.
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    names: dict = {"__name__": f"page_{page.stem}"}
    try:
        for kind, text in blocks(page):
            for old, new in CHANGES.get(page.name, []):
                text = text.replace(old, new)
            first = re.match(r"# (\w+\.py)\n", text)
            if kind == "python" and first:
                (tmp_path / first[1]).write_text(text)
            elif kind == "python":
                exec(compile(text, page.name, "exec"), names)
            elif kind == "bash":
                for line in text.splitlines():
                    program, *arguments = shlex.split(line)
                    assert program == "tttc" and cli.main(arguments) == 0, line
    finally:
        for name in set(sys.modules) - before:
            if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(
                sys.modules[name].__file__
            ):
                del sys.modules[name]
    if page.name == "README.md":
        assert names["r"]["tttc"].error < 1e-4
    if page.name == "tutorial.md":
        assert (tmp_path / "length.png").read_bytes().startswith(b"\x89PNG")
        assert "dualise" in (tmp_path / "report.html").read_text()


def test_the_rule_of_the_readme_is_its_naive_loop():
    rule = next(text for kind, text in blocks(PAGES[0]) if kind == "python")
    names: dict = {"__name__": "readme_rule"}
    exec(compile(rule, "README.md", "exec"), names)
    assert len([x for x in rule.split("import torch, tttc")[1].splitlines() if x.strip()]) <= 15
    inputs = (*torch.randn(3, 1, 2, 20, 8).unbind(), torch.rand(1, 2, 20))
    torch.testing.assert_close(
        names["fast"](*inputs), names["layer"](*inputs), atol=1e-5, rtol=1e-5
    )


@named
def test_what_is_shown_to_type_exists(page, monkeypatch):
    """Commands parse, targets are in the Makefile, extras in pyproject.toml."""
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for kind, text in blocks(page):
        if kind not in ("console", "bash"):
            continue
        for line in text.splitlines():
            words = shlex.split(line.removeprefix("$ ").partition(" > ")[0], comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words[0] == "tttc":
                cli._parser().parse_args(words[1:])
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
            elif words[0] == "pip":
                for extra in re.findall(r"\[(\w+)\]", line):
                    assert extra in extras, line


@named
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {h.lower().replace(" ", "-") for h in headings}, link


def test_every_page_is_in_the_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    contents = index.split("```{toctree}")[1]
    assert {p.stem for p in PAGES[1:]} - {"index"} == set(re.findall(r"^(\w+)$", contents, re.M))


def test_the_numbers_are_those_of_the_record():
    text = (ROOT / "docs" / "numbers.md").read_text()
    record = json.loads(
        (ROOT / re.search(r"`(benchmarks/results/\S+-scans.json)`", text)[1]).read_text()
    )
    rows = {(r["case"], r["shape"]): r for r in (*record["forward"], *record["peers"])}
    training = {(r["case"], r["shape"]): r["training_us"] for r in record["training"]}
    training |= {k: r["training_us"] for k, r in rows.items() if "training_us" in r}
    table = re.findall(r"^\| (\S.*?) \| (B\d+ T\d+) \| (\d+) \| (\d*) ?\| (\d*) ?\|$", text, re.M)
    assert len(table) > 10
    for case, shape, forward, floor, both in table:
        row = rows[case, shape]
        assert round(row["us"]) == int(forward), (case, shape)
        assert not floor or round(row["floor_us"]) == int(floor), (case, shape)
        assert not both or round(training[case, shape]) == int(both), (case, shape)
