"""Training as people do it: autocast, checkpointing, several processes, interruption, memory."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tttc
from tttc import lowering
from tttc.models import TTTConfig, TTTLanguageModel

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from language_model.evaluation import buckets, by_position
from language_model.place import Place
from language_model.settings import Settings
from language_model.text import Text, is_held_out, read_library
from language_model.training import Run, learning_rate

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("constant_floats")


@pytest.fixture(scope="module", autouse=True)
def nothing_compiled_is_left():
    """Dynamo counts compilations of a function over all models; tests elsewhere count on its limit."""
    yield
    torch._dynamo.reset()


def tiny(layer="linear", seed=0, dtype=F64, layers=1):
    torch.manual_seed(seed)
    config = TTTConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_layers=layers,
        num_heads=2,
        mini_batch_size=4,
        layer=layer,
    )
    return TTTLanguageModel(config, dtype=dtype)


def some_ids(B=4, T=9):
    return torch.randint(11, (B, T + 1), generator=torch.Generator().manual_seed(3))


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).double().flatten(0, 1), ids[:, 1:].flatten())


def gradients(model, ids, run=None):
    """The gradients of all parameters of ``model``, by name."""
    model.zero_grad(set_to_none=True)
    loss_of(model if run is None else run, ids).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def assert_same(expected, got, tolerance=1e-9):
    assert expected.keys() == got.keys()
    for name, x in expected.items():
        y = got[name]
        assert x.shape == y.shape and x.dtype == y.dtype, name
        error, scale = float((x - y).abs().max()), max(1.0, float(x.abs().max()))
        assert error <= tolerance * scale, f"{name}: {error:.3g}, values up to {scale:.3g}"


# --- autograd's doors ------------------------------------------------------------------------------


def test_torch_compile_trains():
    model, ids = tiny(), some_ids()
    compiled = torch.compile(model, backend="tttc", options={"strict": True})
    assert_same(gradients(model, ids), gradients(model, ids, compiled))


def test_autograd_grad_again_and_of_some_parameters():
    model, ids = tiny(), some_ids()
    compiled = tttc.compile(model, backend="torch", strict=True)
    chosen = {k: p for k, p in model.named_parameters() if "W1" in k or "v_proj" in k}
    expected = torch.autograd.grad(loss_of(model, ids), list(chosen.values()))
    loss = loss_of(compiled, ids)
    first = torch.autograd.grad(loss, list(chosen.values()), retain_graph=True)
    again = torch.autograd.grad(loss, list(chosen.values()))
    for a, b, c in zip(expected, first, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)
        assert torch.equal(b, c)
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    got = gradients(model, ids, compiled)
    assert_same(dict(zip(chosen, expected, strict=True)), got)


def test_second_order_of_a_model_says_that_it_is_not_there():
    model, ids = tiny(), some_ids()
    loss = loss_of(tttc.compile(model, backend="torch", strict=True), ids)
    (g,) = torch.autograd.grad(loss, [model.embedding.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.sum().backward()


@pytest.mark.parametrize("where", ["around the compiled block", "inside the compiled model"])
def test_checkpointing(where, monkeypatch):
    """At the first call, so that what is compiled is compiled under the hooks of the checkpoint."""
    lowered = []
    replace = lowering._replace_scan
    monkeypatch.setattr(lowering, "_replace_scan", lambda *a: (lowered.append(1), replace(*a)))
    model, ids = tiny(), some_ids()
    expected = gradients(model, ids)
    block = model.blocks[0]
    if where.startswith("around"):
        compiled = tttc.compile(block, backend="torch", strict=True)
        run = copy.copy(model)
        run._modules = {**model._modules, "blocks": [_Checkpointed(compiled)]}
    else:
        run = copy.copy(model)
        run._modules = {**model._modules, "blocks": nn.ModuleList([_Checkpointed(block)])}
        run = tttc.compile(run, backend="torch", strict=True)
    assert_same(expected, gradients(model, ids, run))
    assert lowered


class _Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, state=None, return_state=False):
        return checkpoint(self.block, x, use_reentrant=False)


def test_checkpointing_what_runs_eagerly_under_a_compiled_model():
    """The naive loop as an operator: ``torch.func.grad`` does not run under a checkpoint's hooks by itself."""
    layer = tttc.nn.TTTLinear(8, 2, mini_batch_size=4, dtype=F64)
    x = torch.randn(2, 6, 8, dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    captured = torch.compile(layer, backend="aot_eager", dynamic=True)
    y = checkpoint(captured, x, use_reentrant=False)
    (got,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "low"),
    [("linear", torch.float16), ("linear", torch.bfloat16), ("mlp", torch.bfloat16)],
)
def test_autocast_is_as_exact_as_eager(layer, low):
    model, ids = tiny(layer, dtype=torch.float32), some_ids()
    exact = gradients(copy.deepcopy(model).double(), ids)
    compiled = tttc.compile(model, backend="torch", strict=True)
    found = []
    for run in (model, compiled):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", low):
            loss = loss_of(run, ids)
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        found.append(
            {k: float((p.grad - exact[k]).norm() / exact[k].norm()) for k, p in model.named_parameters()}
        )  # fmt: skip
    eager, fast = found
    assert max(eager.values()) > 1e-5  # it is low precision that was compared
    for name in exact:
        assert fast[name] <= 1.5 * eager[name] + 1e-3, (name, fast[name], eager[name])


def test_accumulation_and_copies():
    model, ids = tiny(), some_ids()
    compiled = tttc.compile(model, backend="torch", strict=True)
    whole = gradients(model, ids)
    model.zero_grad(set_to_none=True)
    for part in ids.chunk(2):
        (loss_of(compiled, part) / 2).backward()
    summed = {k: p.grad.clone() for k, p in compiled.named_parameters()}
    assert_same(whole, summed)
    model.zero_grad(set_to_none=True)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert_same(whole, gradients(other, ids))
        assert all(p.grad is None for p in model.parameters())  # theirs are their own


# --- several processes -----------------------------------------------------------------------------

WAYS = {  # and how many blocks the model has
    "ddp of compiled": 1,
    "compiled of ddp": 1,
    "fsdp of compiled blocks": 2,
    "fsdp accumulating": 2,
}


def _spread(way):
    """A model whose gradients are the mean over processes, and a context for parts that are not the last."""
    model = tiny(layers=WAYS[way])
    if way == "ddp of compiled":
        run = nn.parallel.DistributedDataParallel(tttc.compile(model, backend="torch", strict=True))
        return model, run, run.no_sync
    if way == "compiled of ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return model, tttc.compile(wrapped, backend="torch", strict=True), wrapped.no_sync
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for i, block in enumerate(model.blocks):
        model.blocks[i] = fully_shard(tttc.compile(block, backend="torch", strict=True), mesh=mesh)
    run = fully_shard(model, mesh=mesh)

    @contextlib.contextmanager
    def no_sync():
        run.set_requires_gradient_sync(False)
        yield
        run.set_requires_gradient_sync(True)

    return model, run, no_sync


def _process(rank, folder):
    torch.set_num_threads(1)
    torch._dynamo.config.specialize_float = True
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = some_ids(8).chunk(2)[rank]
    for way in WAYS:
        model, run, no_sync = _spread(way)
        if "accumulating" in way:
            with no_sync():
                (loss_of(run, mine[:2]) / 2).backward()
            (loss_of(run, mine[2:]) / 2).backward()
        else:
            loss_of(run, mine).backward()
        full = {
            k: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for k, p in model.named_parameters()
        }
        if rank == 0:
            torch.save(full, f"{folder}/{way}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """Gradients of two processes with half of the batch each, for each of ``WAYS``."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(_process, (str(folder),), nprocs=2)
    return {way: torch.load(folder / f"{way}.pt") for way in WAYS}


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch was built without gloo")
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_gradients_of_one(way, spread):
    assert_same(gradients(tiny(layers=WAYS[way]), some_ids(8)), spread[way])


# --- memory ----------------------------------------------------------------------------------------


def saved_by(scan, *leaves):
    """The tensors that autograd keeps for the backward of a call: one of each storage."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = scan(*leaves)
    assert out.requires_grad
    return list(kept.values())


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_saved_tensors_grow_with_the_tokens_and_hold_few_states(kind):
    d, heads, b, interval = 16, 2, 4, 8
    layer = {"linear": tttc.nn.TTTLinear, "mlp": tttc.nn.TTTMLP}[kind](2 * d, heads, b)
    step, weights = type(layer).step, layer.initial_weights()
    norm = tttc.nn.inner.Norm(layer.norm_weight, layer.norm_bias)

    def run(q, k, v, eta, tau):
        init = tttc.nn.inner.Carry(weights, type(weights)(*map(torch.zeros_like, weights)))
        token = tttc.nn.inner.Token(q, k, v, eta, tau)
        return tttc.scan(step, init, token, b, shared=norm)[1]

    compiled = tttc.compile(run, backend="torch", strict=True)
    state = sum(w[0].numel() for w in weights)  # of the fast weights of one head
    sizes = []
    for T in (128, 256, 512):
        rows = [torch.randn(1, heads, T, d, requires_grad=True) for _ in range(3)]
        rates = [torch.rand(1, heads, T, requires_grad=True) for _ in range(2)]
        saved = saved_by(compiled, *rows, *rates)
        own = {x.untyped_storage().data_ptr() for x in (*rows, *rates, *layer.parameters())}
        more = [x for x in saved if x.untyped_storage().data_ptr() not in own]
        states = sum(x.numel() for x in more if x.ndim > 4 or x.shape[2:3] != (T,))
        every = max(interval * b, state // (3 * d + 2))  # tokens, as the design has it
        assert states <= heads * state * (T / every + 4)
        assert sum(x.numel() for x in saved) < heads * T * d * d  # no T x d x d in any disguise
        sizes.append(sum(x.numel() for x in saved))
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.02)


# --- the example -----------------------------------------------------------------------------------

TEXT = b"".join(b"def f%d(x):\n    return x + %d\n" % (i, i) for i in range(200))
SETTINGS = Settings(
    hidden=16, layers=1, heads=2, mini_batch=4, context=24, batch=4, accumulate=2, steps=6, warmup=2,
    lr=1e-2, checkpoint_every=3, log_every=2, windows=4,
)  # fmt: skip
HERE = Place(torch.device("cpu"))


def nothing(run):
    pass


def _killed(folder):
    torch.set_num_threads(1)

    def stepped(run):
        if run.step_at == 4:  # past the checkpoint of step 3
            os.kill(os.getpid(), signal.SIGKILL)

    with torch._dynamo.config.patch(specialize_float=True):
        Run(SETTINGS, HERE, TEXT, Path(folder)).train(nothing, stepped)


def test_a_killed_run_comes_to_the_same_losses(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(str(tmp_path),))
    process.start()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        (tmp_path / "whole").mkdir()
        whole = Run(SETTINGS, HERE, TEXT, tmp_path / "whole")
        losses = whole.train(nothing, nothing).losses
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (tmp_path / "checkpoint.pt.part").write_bytes(
            b"torn"
        )  # a write that was cut off is no matter
        resumed = Run(SETTINGS, HERE, TEXT, tmp_path)
        assert len(resumed.progress.losses) == 3
        assert resumed.train(nothing, nothing).losses == losses and len(losses) == 6
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert losses[-1] < losses[0]
    held_out = by_position(resumed, TEXT[:400])
    assert held_out == by_position(whole, TEXT[:400])
    assert [(r["from"], r["to"]) for r in held_out["by_position"]] == buckets(24)
    nats = sum(r["nats"] * (r["to"] - r["from"]) for r in held_out["by_position"]) / 24
    assert nats == pytest.approx(held_out["nats"])
    other = Settings(**{**vars(SETTINGS), "lr": 1e-3})
    with pytest.raises(
        ValueError, match=r"another run \(lr was 0.01, now 0.001\): expected the same"
    ):
        Run(other, HERE, TEXT, tmp_path)


def test_the_clock_ends_a_run(tmp_path, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(Run, "step", lambda run, step: torch.tensor(1.0))
    changes = {"steps": None, "minutes": 0.25, "warmup": 4, "checkpoint_every": 50}
    run = Run(Settings(**{**vars(SETTINGS), **changes}), HERE, TEXT, tmp_path)
    progress = run.train(nothing, nothing)
    assert 4 < len(progress.losses) <= 30  # half a second a step, fifteen seconds
    assert progress.steps is not None and len(progress.losses) <= progress.steps
    assert run.path.exists()


def test_buckets_and_schedule():
    assert buckets(1) == [(0, 1)] and buckets(12) == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 12)]
    rates = [learning_rate(SETTINGS, i, 6) for i in range(7)]
    assert rates[:2] == [5e-3, 1e-2] and rates[2] == 1e-2 and rates[-1] == pytest.approx(1e-3)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_text(tmp_path):
    names = [f"pack/file{i}.py" for i in range(40)]
    (tmp_path / "pack").mkdir()
    for name in [*names, "pack/site-packages.txt"]:
        (tmp_path / name).write_bytes(name.encode())
    held = [n for n in names if is_held_out(n)]
    train, held_out = read_library(tmp_path)
    assert 0 < len(held) < 10
    assert held_out == b"".join(n.encode() + b"\0" for n in sorted(held))
    assert len(train) + len(held_out) == sum(len(n) + 1 for n in names)
    with pytest.raises(FileNotFoundError, match="files"):
        read_library(tmp_path / "pack" / "nowhere")
    text = Text(b"abcdefgh", 3, torch.device("cpu"))
    ids, targets = text.windows(torch.tensor([0, 4]))
    assert (
        bytes(ids.flatten().tolist()) == b"abcefg"
        and bytes(targets.flatten().tolist()) == b"bcdfgh"
    )
    starts = [text.random_starts(50, 1, step) for step in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert set(starts[0].tolist()) == set(range(5)) and text.even_starts(3).tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="context: expected fewer than the 8 bytes"):
        Text(b"abcdefgh", 8, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"steps": None}, "steps: expected a number of steps, or minutes"),
        ({"minutes": 1.0, "warmup": 3}, "warmup: expected at least 4 with --minutes"),
        ({"backend": "eager", "checkpoint_layers": True}, "checkpoint_layers: expected a compiled"),
    ],
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{**vars(SETTINGS), **change})


def test_a_batch_that_does_not_divide(tmp_path):
    settings = Settings(**{**vars(SETTINGS), "batch": 5})
    with pytest.raises(
        ValueError, match="batch: expected a multiple of processes x accumulate = 2"
    ):
        Run(settings, HERE, TEXT, tmp_path)
