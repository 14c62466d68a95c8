"""The benchmark of whole models: its contenders compute what they are said to, and it runs on a CPU at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tttc.models import TTTConfig, TTTLanguageModel
from tttc.nn import TTTLinear

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import timing  # noqa: E402
from peers import hand_dual  # noqa: E402
from peers.transformer import Transformer  # noqa: E402

CONFIG = TTTConfig(64, 32, 64, 2, 2, mini_batch_size=4)


def test_the_dual_form_by_hand_is_ttt_linear():
    torch.manual_seed(0)
    model = TTTLanguageModel(CONFIG, dtype=torch.float64)
    for block in model.blocks:
        torch.nn.init.normal_(block.ttt.tau_offset, std=0.1)
        torch.nn.init.normal_(block.ttt.norm_bias, std=0.1)
        torch.nn.init.normal_(block.ttt.b1, std=0.1)
    ids = torch.randint(64, (2, 8 * hand_dual.GROUP))  # two groups of mini-batches

    def results():
        model.zero_grad()
        logits = model(ids)
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    exact = results()
    for block in model.blocks:
        block.ttt.__class__ = hand_dual.HandDual
    for x, y in zip(exact, results(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="expected T a multiple of 4, got 5"):
        model(ids[:, :5])


def test_a_group_by_graphs_is_the_group(monkeypatch):
    """What a CUDA graph does, by a call that writes its results over those of the first."""

    class Again:
        def __init__(self, run, made):
            self.run, self.made, self.mode = run, made, torch.is_grad_enabled()

        def replay(self):
            with torch.set_grad_enabled(self.mode):
                found = self.run()
            for x, y in zip(self.made, found, strict=True):
                x.copy_(y.detach())

    def captured(run):
        made = [x.detach().clone() for x in run()]
        return Again(run, made), made

    monkeypatch.setattr(timing, "captured", captured)
    torch.manual_seed(0)
    layer = TTTLinear(64, num_heads=2, mini_batch_size=4, dtype=torch.float64)
    layer.__class__ = hand_dual.HandDual
    x = torch.randn(2, 3 * 4 * hand_dual.GROUP, 64, dtype=torch.float64, requires_grad=True)

    def results():
        y = checkpoint(layer, x, use_reentrant=False)  # as blocks of large models are
        seen = torch.autograd.grad(y.square().mean(), [x, *layer.parameters()])
        with torch.no_grad():
            return [y.detach(), layer(x), *seen]

    exact = results()
    monkeypatch.setattr(hand_dual, "GRAPHS", True)
    monkeypatch.setattr(hand_dual.Graphs, "made", {})
    for _ in range(2):  # captured, then replayed alone
        for y, z in zip(results(), exact, strict=True):
            torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-12)
    assert len(hand_dual.Graphs.made) == 1


def test_head_and_loss_in_parts_give_the_gradients_of_the_whole():
    from model_steps import SIZES, Steps

    made = Steps("transformer", SIZES["tiny"])
    made.model.double()
    shape = (3, 64)  # three times as many tokens as head and loss take at a time
    seen = {}
    made.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in made.model.named_parameters()})  # fmt: skip
    loss = made.step(shape, "training")()
    inputs, targets = made.ids(shape)
    whole = torch.nn.functional.cross_entropy(made.model(inputs).flatten(0, 1), targets)
    whole.backward()
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-6)
    assert float(loss) == pytest.approx(made.first_loss(shape), rel=1e-6)
    for name, p in made.model.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, rtol=1e-5, atol=1e-8)


def test_the_transformer_is_causal_knows_places_and_has_the_size_of_the_others():
    torch.manual_seed(0)
    model = Transformer(CONFIG, dtype=torch.float64)
    ids = torch.randint(64, (1, 12))
    changed = ids.clone()
    changed[0, 8] += 1
    difference = (model(ids) - model(changed % 64)).abs().amax(-1)[0]
    assert difference[:8].max() < 1e-12 and difference[8:].min() > 0
    turned = model(ids[:, [1, 0, *range(2, 12)]])[0, -1]
    assert (turned - model(ids)[0, -1]).abs().max() > 1e-9

    def parameters(made):
        return sum(p.numel() for p in made.parameters())

    with torch.device("meta"):
        for size in ("125m", "1.3b"):
            config = TTTConfig.named(size)
            ours, theirs = parameters(TTTLanguageModel(config)), parameters(Transformer(config))
            assert abs(ours / theirs - 1) < 0.01


def test_a_tiny_size_is_measured_on_a_cpu(tmp_path):
    out = tmp_path / "models.json"
    row = {"size": "125m", "model": "mamba", "context": 8, "batch": 1, "direction": "forward", "us": 1.0}  # fmt: skip
    stay = [row, row | {"size": "tiny", "model": "transformer"}]
    said = {k: timing.record()[k] for k in ("device", "versions")}
    out.write_text(json.dumps(said | {"rows": [*stay, row | {"size": "tiny"}], "tokens": {"125m": 8}}))  # fmt: skip
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "models.py", out, "--quick", "--contexts", "32", "--sequences", "3",
         "--models", "ttt_linear", "mamba", "hand_dual"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    # What there was of another size or model stays, what there was of these does not.
    assert record["rows"][:2] == stay
    assert record["tokens"] == {"125m": 8, "tiny": 64}
    del record["rows"][:2]
    found = {(r["model"], r["direction"], r["batch"]): r for r in record["rows"]}
    assert len(found) == len(record["rows"])
    measured = {model for model, _, _ in found}
    assert {"ttt_linear", "hand_dual"} <= measured
    # What can't run loses its own rows alone.
    assert {f["model"] for f in record["failed"]} == {"mamba"} - measured
    for row in record["rows"]:
        assert row["finite"]
        assert row["q25"] <= row["us"] <= row["q75"]
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * 32 / row["us"] * 1e6)
    for model in measured:
        for batch in (2, 3):
            assert (model, "forward", batch) in found and (model, "training", batch) in found
    losses = {n: m["first_loss"] for n, m in record["models"]["tiny"].items()}
    assert losses["ttt_linear"] == pytest.approx(losses["hand_dual"], rel=1e-5)


def test_what_one_contender_fails_at_is_missing_alone(tmp_path):
    import models

    class Worker:
        size, alive = "tiny", True

        def __init__(self, name, seconds):
            self.name, self.seconds = name, seconds

        def asked(self, seconds, what, shape, direction, calls):
            if self.seconds is None:
                raise models.Refused("OutOfMemoryError: no more")
            took = self.seconds * shape[1] / 64
            return {"us": 1e6 * took, "peak_bytes": 1, "finite": True}

    made = models.Comparison(tmp_path / "models.json", ["tiny"], ["ttt_linear"])
    made.until += 100
    workers = [Worker("ttt_linear", 1e-3), Worker("mamba", None), Worker("hand_dual", 30.0)]
    for shape in ((2, 64), (2, 128)):
        made.timed(workers, shape, "forward", 0)
    rows = {(r["model"], r["context"]): r for r in made.made["rows"]}
    assert set(rows) == {("ttt_linear", 64), ("ttt_linear", 128), ("hand_dual", 64)}
    slow = rows["hand_dual", 64]
    assert (slow["us"], slow["q25"], slow["rounds"]) == (3e7, 3e7, 1)
    said = {(f["model"], f["what"]): f["why"] for f in made.made["failed"]}
    assert said["mamba", "forward of 2 x 64"] == "OutOfMemoryError: no more"
    assert said["hand_dual", "forward of 2 x 128"].startswith("a step takes 60 s")


def test_tables_and_plots_of_a_record(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot: pip install 'tttc[plot]'")
    import plots
    from page_tables import whole_models
    from page_tables.records import Record

    def tokens(context, rate):
        return {
            "tokens_per_second": rate,
            "us": 1e6 * context / rate,
            "graph_us": 5e5 * context / rate,
        }

    rates = {"ttt_linear": 3e6, "mamba": 2e6, "transformer": 4e6, "hand_dual_graphs": 1e6}
    rows = [
        {"size": "125m", "model": m, "context": c, "direction": d, "batch": batch, "peak_bytes": 3 << 30,
         **tokens(batch * c, rate / (c / 2048 if m == "transformer" else 1) * (1.5 if batch == 8 else 1))}
        for m, rate in rates.items() for batch, c in ((4, 2048), (1, 8192), (8, 8192)) for d in ("forward", "training")
    ]  # fmt: skip
    said = {"device": "NVIDIA X1 80GB HBM3", "date": "2030-01-01", "versions": {"torch": "3"}}
    failed = [{"size": "125m", "model": "hand_dual", "what": "training of 8 x 8192", "why": "a step takes 60 s; 9 s are left"},
              {"size": "125m", "model": "mamba", "what": "graph of training of 8 x 8192", "why": "no memory"}]  # fmt: skip
    path = tmp_path / "2030-01-01-x1-models.json"
    path.write_text(json.dumps(said | {"rows": rows, "tokens": {"125m": 8192}, "failed": failed}))
    record = Record(path)
    assert whole_models.tokens_a_second(record).splitlines()[:6] == [
        "| 125m | thousand tokens a second | 4 × 2048 | 1 × 8192 | 8 × 8192 |",
        "| --- | --- | --- | --- | --- |",
        "| forward | TTT-Linear, tttc | 3000 | **3000** | **4500** |",
        "| forward | Transformer | **4000** | 1000 | 1500 |",
        "| forward | Mamba, mamba-ssm | 2000 | 2000 | 3000 |",
        "| forward | TTT-Linear by hand, torch.compile, CUDA graphs | 1000 | 1000 | 1500 |",
    ]
    graphs = whole_models.tokens_a_second(record, "graph_us")
    assert "| forward | TTT-Linear, tttc | 6000 | **6000** | **9000** |" in graphs
    assert "| TTT-Linear, tttc | 3.0 | 3.0 | 3.0 |" in whole_models.memory(record)
    verdict = whole_models.verdict(record)
    assert "| forward | Transformer | 0.75 | 3.00 | 3.00 |" in verdict
    assert "| training | Mamba, mamba-ssm | 1.50 | 1.50 | 1.50 |" in verdict
    assert "| training | TTT-Linear by hand, torch.compile, CUDA graphs | 3.00 | 3.00 | 3.00 |" in verdict  # fmt: skip
    assert whole_models.missing(record) == (
        "Not measured: 125m TTT-Linear by hand, torch.compile, training of 8 × 8192: a step takes 60 s; 9 s are left."
    )
    scans = tmp_path / "2030-01-01-x1-scans.json"
    forward = [{"case": c, "shape": "B1 T2048", "us": 300.0, "floor_us": 8.0} for c in ("ttt_linear_b16", "ttt_mlp_chunk64")]  # fmt: skip
    scans.write_text(json.dumps(said | {"forward": forward, "matrix_flops": 8e14}))  # fmt: skip
    plots.main([str(path), str(scans)])
    for made in ("2030-01-01-x1-models.png", "2030-01-01-x1-scans-roofline.png"):
        assert (tmp_path / made).stat().st_size > 10_000


def test_operations_of_a_scan_are_counted_for_a_token():
    import plots

    # Products of q, k and the weights' gradient with 64 x 64 weights, two operations each; within a mini-batch little.
    flops, size = plots.work("ttt_linear_b16")
    assert 3 * 2 * 64 * 64 < flops < 5 * 2 * 64 * 64
    assert 4 * 64 * 2 <= size <= 4 * 64 * 2 + 8
    assert plots.work("ttt_mlp_chunk64")[0] > 4 * flops
