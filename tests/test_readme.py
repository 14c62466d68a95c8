"""The Python of the README runs, top to bottom."""

import re
from pathlib import Path

import torch


def test_the_python_of_the_readme_runs(monkeypatch):
    # Inductor takes long to compile and has tests of its own.
    monkeypatch.setattr("tttc.report.benchmark._has_compiler", lambda: False)
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    rule, *rest = blocks
    exec(compile(rule, "README.md", "exec"), names)
    inputs = (*torch.randn(3, 1, 2, 20, 8).unbind(), torch.rand(1, 2, 20))
    torch.testing.assert_close(
        names["fast"](*inputs), names["layer"](*inputs), atol=1e-5, rtol=1e-5
    )
    for block in rest:
        block = block.replace("randn(2, 128, 256)", "randn(1, 40, 256)")
        exec(compile(block, "README.md", "exec"), names)
    assert names["r"]["tttc"].error < 1e-4
