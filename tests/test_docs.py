"""The documentation holds: its Python and its commands run, its links lead somewhere, its numbers are the record's.

In a page, ``python`` blocks run top to bottom under one set of names, from an empty folder; one that starts with
``# name.py`` is written to that file instead. ``bash`` blocks run too. ``console`` blocks are shown, not run: what they
ask of ``tttc``, ``make`` and ``pip`` must exist.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

from tttc import cli

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
import tables  # noqa: E402
from page_tables import rules, scans, schedules  # noqa: E402
from page_tables.records import heading, records  # noqa: E402

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
    monkeypatch.setattr("tttc.report.measurement.has_compiler", lambda: False)
    # As a reader without a GPU runs it, not kernels in the interpreter that other tests look at.
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    module = types.ModuleType(f"page_{page.stem}")  # PyTorch 2.11 imports it where a model is from
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
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


# -- numbers ------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_records(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    newest = records("scans")[0]
    for page in (ROOT / "README.md", ROOT / "docs" / "numbers.md"):
        assert newest.path.name in page.read_text()
    row = next(r for r in newest.data["forward"] if r["case"] == "ttt_linear_b16")
    assert f"**{row['us']:.0f}**" in (ROOT / "README.md").read_text()


def test_a_number_that_no_record_has_is_found(capsys, monkeypatch, tmp_path):
    (tmp_path / "docs").mkdir()
    for page in tables.PAGES:
        (tmp_path / page).write_text((ROOT / page).read_text())
    text = (tmp_path / "README.md").read_text()
    (number,) = re.findall(r"^\| TTT-Linear, mini-batch 16 \| \*\*(\d+)\*\*.*$", text, re.M)[:1]
    (tmp_path / "README.md").write_text(text.replace(f"**{number}**", "**1**"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    shown = capsys.readouterr().out
    assert "-| TTT-Linear, mini-batch 16 | **1** |" in shown and f"**{number}**" in shown
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0


def test_tables_are_made_from_the_newest_record(tmp_path):
    def save(name, date, us, rival):
        times = {"us": us, "training_us": 2 * us}
        record = {
            "date": date,
            "device": "NVIDIA X1 80GB HBM3",
            "versions": {"torch": "3.0+cu1"},
            "command": "python benchmarks/x.py benchmarks/results/y.json",
            "forward": [{"case": "ttt_linear_b16", "shape": "B16 T2048", **times, "floor_us": 10.0,
                         "errors": {"T2048 against x": 1e-3, "naive against dual": 1e-15}}],
            "peers": [{"case": "fla chunk_ttt_linear", "shape": "B16 T2048", "us": rival, "training_us": us}],
            "training": [{"case": "ttt_linear_b16", "shape": "B16 T2048", "training_us": 2 * us,
                          "gradient_errors": [2e-3]}],
        }  # fmt: skip
        (tmp_path / name).write_text(json.dumps(record))

    save("2030-01-01-x1-scans.json", "2030-01-01", 5.0, 4.0)
    save("2030-01-02-x1-scans.json", "2030-01-02", 12_345.0, 24_690.0)
    newest, older = records("scans", tmp_path)
    assert scans.by_shape(newest, "us").splitlines()[2:] == [
        "| TTT-Linear, mini-batch 16 | **12 345** |",
        "| flash-linear-attention, chunk | 24 690 |",
    ]
    assert "takes 2.0 times as long as ours." in scans.verdict(newest)
    assert "at B16 T2048 it is 2.0 times as fast as ours." in scans.verdict(newest)  # training
    assert "at B16 T2048 it is 1.2 times as fast as ours." in scans.verdict(older)
    assert scans.accuracy(newest).endswith("outputs 1.0e-03 at T2048; gradients 2.0e-03.")
    assert "2.0 times as fast" in scans.speed(newest) and "NVIDIA X1:" in scans.speed(newest)
    assert heading(newest).startswith("One NVIDIA X1, 2030-01-02, torch 3.0;")
    newest.data = {
        "times": {"delta_net": {"forward": {"tttc": {"us": 10}, "fla": {"us": 20}}}, "titans": {"error": "no"}},
        "errors": {"delta_net": {"form": "dual", "output": 1e-3, "gradient of q": 2e-3}, "lact": {"error": "no"}},
    }  # fmt: skip
    assert "| delta net | forward | 10 | fla 20 |" in rules.beside_peers(newest)
    assert "| delta net | dual | 1.0e-03 | 2.0e-03 |" in rules.beside_peers(newest)


def test_picked_schedules_are_counted(tmp_path):
    def row(shape, direction="forward", **ratios):
        picks = {k: {"us": x and 50 * x, "of best": x} for k, x in ratios.items()}
        return {"shape": shape, "direction": direction, "timed": 80, "best": {"us": 50.2}, **picks}

    rows = [
        row("ttt_linear_b16_d64_B1_T256", searched=1.0, rules=1.1, model=1.104),
        row("ttt_linear_b128_d32_B2_T65536", searched=1.02, rules=1.25, model=None),
        row("ttt_mlp_b16_d64_B1_T256", searched=1.0, rules=1.0, model=1.0) | {"partial": True},
        {"shape": "ttt_mlp_b16_d64_B8_T256", "direction": "forward", "error": "no"},
    ]
    path = tmp_path / "2030-01-01-x1-picked.json"
    path.write_text(json.dumps({"device": "NVIDIA X1", "rows": rows}))
    (record,) = records("picked", tmp_path)
    assert schedules.picked(record).splitlines()[2:] == [
        "| TTT-Linear, mini-batch 16 | d64 B1 T256 | forward | 80 | 50 | 1.00 | 1.10 | 1.10 |",
        "| ttt linear b128 | d32 B2 T65536 | forward | 80 | 50 | 1.02 | 1.25 |  |",
    ]
    assert schedules.verdict(record) == (
        "Of 2 shapes, forward, the schedule picked is within 10% of the fastest of all that were timed on: search 2 (at "
        "worst 1.02 times as long, ttt linear b128 d32 B2 T65536); rules 1 (at worst 1.25 times as long, ttt linear b128 "
        "d32 B2 T65536); cost model's first 0 (at worst not timed, ttt linear b128 d32 B2 T65536). Not timed to the end: "
        "ttt mlp b16 d64 B1 T256 forward, ttt mlp b16 d64 B8 T256 forward."
    )


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs: pip install 'tttc[docs]'")
    pytest.importorskip("myst_parser")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tutorial = (tmp_path / "tutorial.html").read_text()
    assert "From a naive rule to a trained model" in tutorial
    assert "tttc.explain" in (tmp_path / "interface.html").read_text()
