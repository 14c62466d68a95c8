"""Sweeps of benchmarks, their pictures, and the peers beside them."""

from __future__ import annotations

import builtins
import json
import re
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tttc
from tttc.models import TTTConfig, TTTLanguageModel
from tttc.report import peers
from tttc.report.results import BenchmarkResult, Row
from tttc.report.sweep import Point, SweepResult, resized


def step(anchor, W, token, shared):
    x, rate = token
    gradient = torch.func.grad(lambda w: 0.5 * (torch.tanh(x @ w) - x).square().sum())(anchor)
    W = W - rate * gradient
    return W, x @ W


def rule(x, rate):
    """``x [B, H, T, d]``, ``rate [B, H, T]``."""
    init = torch.zeros(x.shape[1], x.shape[-1], x.shape[-1], dtype=x.dtype)
    return tttc.scan(step, init, (x, rate), mini_batch_size=4)[1]


@pytest.fixture(scope="module")
def swept():
    torch.manual_seed(0)
    return tttc.benchmark(
        rule,
        torch.randn(2, 2, 6, 4, requires_grad=True),
        torch.rand(2, 2, 6),
        sweep={"T": [8, 4], "B": [1, 3]},
        axes={"B": 0, "T": 2},
        contenders=["eager", "tttc"],
        backward=True,
        repeats=1,
    )


def test_every_combination_is_measured(swept):
    assert [p.sizes for p in swept.points] == [
        {"T": 8, "B": 1},
        {"T": 8, "B": 3},
        {"T": 4, "B": 1},
        {"T": 4, "B": 3},
    ]
    for point in swept.points:
        b, t = point.sizes["B"], point.sizes["T"]
        assert point.result.inputs == [f"float32[{b}, 2, {t}, 4]", f"float32[{b}, 2, {t}]"]
        assert point.tokens == b * t
        assert point.per_token("tttc") == point.result["tttc"].median / (b * t)
        assert point.result["tttc"].error < 1e-5 > point.result["tttc"].gradient_error
    assert swept.sizes == {"T": [4, 8], "B": [1, 3]}
    assert swept.contenders == ["eager", "tttc"]


def test_the_table_and_the_json(swept, tmp_path):
    shown = str(swept)
    assert "forward and backward, time per token" in shown and "\x1b" not in shown
    assert len([x for x in shown.splitlines() if "µs" in x or "ms" in x]) == 4
    saved = json.loads(swept.to_json(tmp_path / "s.json"))
    assert saved == json.loads((tmp_path / "s.json").read_text())
    assert [p["tokens"] for p in saved["points"]] == [8, 24, 4, 12]
    assert saved["points"][0]["result"]["rows"][1]["name"] == "tttc"


def made_up(sizes, times, memory=None, error=1e-6):
    rows = [Row(n, [x] if x else [], peak_memory=memory, error=error) for n, x in times.items()]
    rest = {"torch": "2"}, "today"
    return Point(sizes, sizes["T"], BenchmarkResult(rows, [], False, "a GPU", "float64", 1, *rest))


def test_pictures_show_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib")
    points = [
        made_up({"T": t, "B": b}, {"eager": t * 2e-3, "tttc": t * 1e-6, "attention": None}, t << 20)
        for t in (16, 8)
        for b in (1, 2)
    ]
    SweepResult(points).to_png(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    SweepResult(points).to_png(tmp_path / "s.svg")
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        SweepResult(points).to_png(tmp_path / "s.svg")
    text = (tmp_path / "s.svg").read_text()
    for part in ("time per token", "peak memory", "error against", "context length T", "tttc, B 2"):
        assert part in text


def test_an_axis_within_one_power_of_ten_has_numbers(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    points = [made_up({"T": t}, {"tttc": t * 1e-6}, error=e) for t, e in ((8, 4e-7), (16, 6e-7))]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        SweepResult(points).to_png(tmp_path / "s.svg")
    numbers = re.findall(r">(\d(?:\.\d+)?e-07)<", (tmp_path / "s.svg").read_text())
    assert len(numbers) >= 2 and all(3e-7 < float(x) < 7e-7 for x in numbers)


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    found = builtins.__import__

    def missing(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        SweepResult([made_up({"T": 8}, {"tttc": 1.0})]).to_png(tmp_path / "s.png")
    assert not list(tmp_path.iterdir())


def test_inputs_are_cut_and_repeated():
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    made, ids, scalar = resized((x, torch.arange(2), 3), {"B": 0, "T": 1}, {"B": 1, "T": 7})
    assert made.tolist() == [[0, 1, 2, 0, 1, 2, 0]] and made.requires_grad and made.is_leaf
    assert ids.tolist() == [0] and scalar == 3


@pytest.mark.parametrize(
    "sweep, error, message",
    [
        ({}, ValueError, "sweep: expected some of B, T, mini_batch_size, got none"),
        ({"H": [1]}, ValueError, "sweep: expected some of B, T, mini_batch_size .*got 'H'"),
        ({"T": 4}, ValueError, "sweep: expected sizes for T, got 4"),
        ({"T": []}, ValueError, "sweep: expected sizes for T"),
        ({"T": [0]}, ValueError, "at least 1"),
        ({"T": ["4"]}, TypeError, "at least 1, got '4'"),
    ],
)
def test_a_wrong_sweep_is_named(sweep, error, message):
    with pytest.raises(error, match=message):
        tttc.benchmark(nn.Linear(2, 2), torch.randn(2, 2), sweep=sweep)


# -- peers --------------------------------------------------------------------------------------------------


def test_attention_stands_where_ttt_layers_are():
    torch.manual_seed(0)
    layer = tttc.nn.TTTMLP(16, 2, gate=True, share_qk=True)
    x = torch.randn(2, 9, 16)
    peer = peers.make(peers.ATTENTION, layer)
    q, k, _ = layer._queries_and_keys(x, None)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (q, k, layer.v_proj(x)))
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    z = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = layer.o_proj(F.gelu(layer.g_proj(x), approximate="tanh") * layer.post_norm(z))
    torch.testing.assert_close(peer(x), expected)


def test_peers_replace_the_layers_of_a_model_and_leave_it_alone():
    config = TTTConfig(vocab_size=7, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
    model = TTTLanguageModel(config)
    ids = torch.randint(7, (1, 5))
    assert peers.applicable(model, ids.device) == [peers.ATTENTION]
    before = model(ids)
    peer = peers.make(peers.ATTENTION, model)
    assert peer(ids).shape == before.shape and not torch.allclose(peer(ids), before)
    torch.testing.assert_close(model(ids), before)
    assert not [m for m in model.modules() if isinstance(m, peers.InPlaceOf)]
    assert peers.applicable(rule, ids.device) == []
    assert peers.applicable(nn.Linear(2, 2), ids.device) == []


def test_flash_linear_attention_joins_where_it_is_installed(monkeypatch):
    """Its kernel needs a GPU: a stand-in takes its arguments, and they must be those it documents."""
    seen = {}

    def chunk_ttt_linear(q, k, v, w, b, eta, chunk_size, initial_state, initial_state_bias):
        seen.update({n: tuple(x.shape) for n, x in locals().items() if isinstance(x, torch.Tensor)})
        seen["chunk_size"] = chunk_size
        return v, None

    module = types.ModuleType("fla.ops.ttt")
    module.chunk_ttt_linear = chunk_ttt_linear
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.ttt", module)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name == "fla")
    layer, gpu = tttc.nn.TTTLinear(16, 2, mini_batch_size=4), torch.device("cuda")
    assert peers.applicable(layer, gpu) == [peers.ATTENTION, peers.FLA]
    assert peers.applicable(layer, torch.device("cpu")) == [peers.ATTENTION]
    assert peers.applicable(tttc.nn.TTTMLP(16, 2), gpu) == [peers.ATTENTION]
    x = torch.randn(3, 8, 16)
    expected = layer.o_proj(layer.post_norm(layer.v_proj(x)))
    torch.testing.assert_close(peers.make(peers.FLA, layer)(x), expected)
    heads = (3, 8, 2, 8)
    assert seen == {
        "q": heads,
        "k": heads,
        "v": heads,
        "w": (2, 8),
        "b": (2, 8),
        "eta": (3, 8, 2, 1),
        "chunk_size": 4,
        "initial_state": (3, 2, 8, 8),
        "initial_state_bias": (3, 2, 1, 8),
    }


def test_a_peer_that_cannot_stand_there_says_so():
    result = tttc.benchmark(nn.Linear(2, 2), torch.randn(2, 2), contenders="attention", repeats=1)
    assert "the model has no layer it can stand for" in result["attention"].note
