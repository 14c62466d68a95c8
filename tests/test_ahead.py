"""Kernels compiled before they are launched, and schedules measured for good: what takes a GPU is skipped without."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from marks import interpreted, on_gpu
from test_stages import call_of
from tttc.codegen import executable, rowwise_launch
from tttc.codegen.kernel import Kernel
from tttc.codegen.torch_scan_backward import saved_leaves

import tttc
from tttc.ir.errors import NotLowerable
from tttc.models import TTTConfig, TTTLanguageModel
from tttc.nn import TTTLinear
from tttc.pipeline import _programs
from tttc.runtime import fused_scan_backward, launch, rehearsal, staged
from tttc.runtime.fused_scan import floating_leaves
from tttc.runtime.triton_scan import run_kernels
from tttc.tuning import compiling


def launches_of(program, groups, launcher):
    run_kernels(program, groups[0], [], *groups[1:], 3, torch.float32, launcher=launcher)


def test_kernels_of_a_call_are_compiled_before_the_first_is_launched(monkeypatch):
    """Those of several stages; a single one is compiled by its launch."""
    order = []
    monkeypatch.setattr(
        staged, "compile_ahead", lambda call, device: order.append(("begun", call.kernel.name))
    )
    call = SimpleNamespace(device=torch.device("cuda"), kernel=Kernel("a", ""))
    launches = [call, SimpleNamespace(device=call.device, kernel=Kernel("b", ""))]
    made = staged.Staged(tuple(x.kernel for x in launches), frozenset(), {})
    staged.compiled_ahead(made, launches, launch.launch)
    assert order == [("begun", "a"), ("begun", "b")]
    staged.compiled_ahead(made, launches, order.append)  # who only looks on compiles nothing
    launches[1].kernel.compiled["known"] = object()
    staged.compiled_ahead(made, launches, launch.launch)
    assert len(order) == 2


def specialised(call):
    return launch._specialised(call, False).digest()


@interpreted
@pytest.mark.parametrize(
    "sizes", [{}, {"layer": "mlp", "backbone": "mamba"}, {"mini_batch_size": 1}], ids=str
)
def test_a_graph_says_which_kernels_it_will_launch(sizes, monkeypatch):
    """All of them, forward and backward, with what of their arguments is compiled in, and no others."""
    monkeypatch.setenv("TTTC_WARM", "0")
    torch._dynamo.reset()
    planned, made = set(), set()
    monkeypatch.setattr(rehearsal, "_is_compiled_for", lambda device: True)
    monkeypatch.setattr(rehearsal, "compile_ahead", lambda call, _: planned.add(specialised(call)))
    monkeypatch.setattr(rowwise_launch, "begin", lambda wanted, _: planned.add(wanted.digest()))
    first, start = launch._first_launch, rowwise_launch.Start._start

    def launched(call, *rest):
        made.add(specialised(call))
        return first(call, *rest)

    def started(self, grid, *arguments, **constants):
        made.add(self.specialised(arguments, constants).digest())
        return start(self, grid, *arguments, **constants)

    monkeypatch.setattr(launch, "_first_launch", launched)
    monkeypatch.setattr(rowwise_launch.Start, "_start", started)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mini_batch_size": 16} | sizes
    model = TTTLanguageModel(TTTConfig(**sizes, vocab_size=32))
    compiled = tttc.compile(model, strict=True, backend="triton")
    ids = torch.arange(2 * 32).view(2, 32) % 32
    compiled(ids).square().mean().backward()
    with torch.no_grad():
        compiled(ids)
    assert len(made) > 10
    assert planned == made


def test_what_a_graph_can_not_say_is_compiled_when_it_is_launched(monkeypatch):
    monkeypatch.setattr(rehearsal, "_is_compiled_for", lambda device: True)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")  # of which nothing is known
    graph.call_function(torch.ops.tttc.fused_scan.default, ([x],))
    graph.output(x)
    rehearsal.rehearse(torch.fx.GraphModule({}, graph))


def test_who_asks_what_a_backward_launches_computes_nothing(monkeypatch):
    call, program, b = call_of(TTTLinear, T=32, d=16, b=8)
    groups = [[x.float().to("meta") for x in g] for g in (call.anchor, call.tokens, call.shared)]
    anchor, tokens, shared = groups
    grads = [torch.empty_like(tokens[0])]
    wanted = [True] * sum(map(len, groups))
    monkeypatch.setattr(fused_scan_backward, "runs_by_kernels", lambda *given: True)
    program.kernels.clear()

    def launches():
        live = saved_leaves(program, floating_leaves(tokens, shared))
        starts = [anchor[i] for i in live]
        saved = [x.new_empty(*x.shape[:2], 4, *x.shape[2:]) for x in starts]
        rest = (wanted, call.key, b, 0, "auto", False, 1)
        return fused_scan_backward.fused_scan_backward_launches(
            grads, anchor, [], tokens, shared, saved, *rest, device=torch.device("cpu")
        )

    assert launches()

    def refuses(*given, **more):
        raise NotLowerable("no form")

    monkeypatch.setattr(fused_scan_backward, "run_backward_kernels", refuses)
    monkeypatch.setattr(fused_scan_backward, "run_backward", None)
    assert launches() == []
    program.no_backward_kernels = None
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
    monkeypatch.setattr(executable, "_made", {})
    call, program, _ = call_of(TTTLinear, T=48, d=32, b=16)
    groups = [[x.float().cuda() for x in g] for g in (call.anchor, call.tokens, call.shared)]
    program.kernels.clear()
    launches = []
    launches_of(program, groups, launches.append)
    results = compiling.compiler_for(torch.device("cuda"))(
        [x.request(fast=launch.fast()) for x in launches], 300.0, lambda i: None
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


@on_gpu
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_left_to_compile_for_the_first_launches(training, monkeypatch, tmp_path):
    for name in ("TTTC_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(executable, "_made", {})
    torch._dynamo.reset()
    for program in _programs.values():
        program.kernels.clear()
    model = TTTLanguageModel(TTTConfig(hidden_size=256, num_layers=2, num_heads=4, vocab_size=64))
    model = model.to("cuda", torch.bfloat16)
    ids = torch.randint(64, (4, 512), device="cuda")
    late, new = [], executable._new

    def made(wanted, device):
        if not threading.current_thread().name.startswith("tttc: kernels"):
            late.append((wanted.kernel.name, wanted.arguments))
        return new(wanted, device)

    monkeypatch.setattr(executable, "_new", made)
    with torch.set_grad_enabled(training):
        y = tttc.compile(model, strict=True)(ids)
        if training:
            y.float().square().mean().backward()
    torch.cuda.synchronize()
    assert not late and len(executable._made) > 5
