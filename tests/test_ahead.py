"""Kernels compiled before they are launched, and schedules measured for good: what takes a GPU is skipped without."""

from __future__ import annotations

import json

import torch
from marks import on_gpu
from test_stages import call_of

import tttc
from tttc.nn import TTTLinear
from tttc.pipeline import _programs
from tttc.runtime import ahead, launch
from tttc.runtime.triton_scan import run_kernels


def launches_of(program, groups, launcher):
    run_kernels(program, groups[0], [], *groups[1:], 3, torch.float32, launcher=launcher)


def test_new_kernels_are_compiled_together(monkeypatch, tmp_path):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    asked = []

    def compiler(requests, seconds, done):
        asked.append([r.name for r in requests])
        return []

    monkeypatch.setattr(ahead, "compiler_for", lambda device: compiler)
    monkeypatch.setattr(ahead, "workers", lambda: 4)
    call, program, _ = call_of(TTTLinear, T=38, d=16, b=8)
    anchor, tokens, shared = (
        [x.float().to("meta") for x in g] for g in (call.anchor, call.tokens, call.shared)
    )
    launches = []
    run_kernels(program, anchor, [], tokens, shared, 3, torch.float32, launcher=launches.append)
    ahead.compile_ahead(launches, torch.device("cuda"))
    names = {x.kernel.name for x in launches}
    assert len(asked) == 1 and set(asked[0]) == names
    # Those that were launched before are found by Triton.
    ahead.compile_ahead(launches, torch.device("cuda"))
    assert len(asked) == 1
    program.kernels.clear()


def test_what_is_asked_for_is_aligned_as_the_tensors_are():
    call, program, _ = call_of(TTTLinear, T=38, d=16, b=8)
    groups = [[x.float() for x in g] for g in (call.anchor, call.tokens, call.shared)]
    launches = []
    run_kernels(program, *groups[:1], [], *groups[1:], 3, torch.float32, launcher=launches.append)
    program.kernels.clear()
    found = set()
    for made in launches:
        aligned = made.request().aligned
        for name, _ in made.kernel.config["arguments"]:
            assert (name in aligned) == (made.tensors[name].data_ptr() % 16 == 0)
            found.add(name in aligned)
    assert found == {True, False}, "the learning rates of later tokens lie anywhere"


@on_gpu
def test_triton_finds_what_was_compiled_ahead(monkeypatch, tmp_path):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path / "tttc"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    call, program, _ = call_of(TTTLinear, T=48, d=32, b=16)
    groups = [[x.float().cuda() for x in g] for g in (call.anchor, call.tokens, call.shared)]
    program.kernels.clear()
    launches = []
    launches_of(program, groups, launches.append)
    results = ahead.compiler_for(torch.device("cuda"))(
        [x.request(fast=ahead.fast()) for x in launches], 300.0, lambda i: None
    )
    assert not [r for r in results if isinstance(r, Exception)]
    before = sorted((tmp_path / "triton").rglob("*.cubin"))
    assert before
    launches_of(program, groups, launch.launch)
    torch.cuda.synchronize()
    assert sorted((tmp_path / "triton").rglob("*.cubin")) == before
    program.kernels.clear()


@on_gpu
def test_schedules_are_measured_and_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("TTTC_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TTTC_TUNE_SECONDS", "60")  # on a slow host, whatever else it does
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = TTTLinear(256, 4, mini_batch_size=16).cuda().bfloat16()
    x = torch.randn(4, 512, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    for tune in (False, True):
        torch._dynamo.reset()
        y = tttc.compile(layer, tune=tune, strict=True)(x)
        grads = torch.autograd.grad(y.float().square().sum(), layer.parameters())
        results.append([y, *grads])
    for a, b in zip(*results, strict=True):
        assert float((a - b).detach().float().norm()) <= 3e-2 * float(b.float().norm())
    files = sorted((tmp_path / "schedules").glob("*.json"))
    assert len(files) == 2, "forward and backward"
    assert all(json.loads(f.read_text())["timed"] > 4 for f in files)
    when = [f.stat().st_mtime_ns for f in files]
    for program in _programs.values():
        program.plans.clear()
        program.searched.clear()
        program.kernels.clear()
    torch._dynamo.reset()
    tttc.compile(layer, tune=True, strict=True)(x).float().sum().backward()
    assert [f.stat().st_mtime_ns for f in files] == when
    used = [k.config["schedule"] for p in _programs.values() for s in p.kernels.values() for k in s.kernels]  # fmt: skip
    assert any(s.origin.startswith("measured: ") for s in used)
