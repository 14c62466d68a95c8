"""The benchmark of whole models: its contenders compute what they are said to, and it runs on a CPU at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tttc.models import TTTConfig, TTTLanguageModel

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
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
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "models.py", out, "--quick", "--contexts", "32",
         "--models", "ttt_linear", "mamba", "hand_dual"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    found = {(r["model"], r["direction"]): r for r in record["rows"]}
    measured = {model for model, _ in found}
    assert {"ttt_linear", "hand_dual"} <= measured
    # What can't run loses its own rows alone.
    assert {f["model"] for f in record["failed"]} == {"mamba"} - measured
    for row in record["rows"]:
        assert row["finite"] and row["batch"] == 2
        assert row["q25"] <= row["us"] <= row["q75"]
        assert row["tokens_per_second"] == pytest.approx(64 / row["us"] * 1e6)
    for model in measured:
        assert (model, "forward") in found and (model, "training") in found
    losses = {n: m["first_loss"] for n, m in record["models"]["tiny"].items()}
    assert losses["ttt_linear"] == pytest.approx(losses["hand_dual"], rel=1e-5)


def test_tables_and_plots_of_a_record(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot: pip install 'tttc[plot]'")
    import plots
    import tables

    def tokens(context, rate):
        return {
            "tokens_per_second": rate,
            "us": 1e6 * context / rate,
            "graph_us": 5e5 * context / rate,
        }

    rates = {"ttt_linear": 3e6, "mamba": 2e6, "transformer": 4e6}
    rows = [
        {"size": "125m", "model": m, "context": c, "direction": d, "batch": 1, "peak_bytes": 3 << 30,
         **tokens(c, rate / (c / 2048 if m == "transformer" else 1))}
        for m, rate in rates.items() for c in (2048, 8192) for d in ("forward", "training")
    ]  # fmt: skip
    said = {"device": "NVIDIA X1 80GB HBM3", "date": "2030-01-01", "versions": {"torch": "3"}}
    path = tmp_path / "2030-01-01-x1-models.json"
    path.write_text(json.dumps(said | {"rows": rows, "tokens": {"125m": 32768}}))
    record = tables.Record(path)
    assert tables.tokens_a_second(record).splitlines()[2:5] == [
        "| 125m | forward | TTT-Linear, tttc | 3000 | **3000** |",
        "| 125m | forward | Transformer | **4000** | 1000 |",
        "| 125m | forward | Mamba, mamba-ssm | 2000 | 2000 |",
    ]
    graphs = tables.tokens_a_second(record, "graph_us")
    assert "| 125m | forward | TTT-Linear, tttc | 6000 | **6000** |" in graphs
    assert "| 125m | TTT-Linear, tttc | 3.0 | 3.0 |" in tables.models_memory(record)
    verdict = tables.models_verdict(record)
    assert "| 125m forward | Transformer | 0.75 | 3.00 |" in verdict
    assert "| 125m training | Mamba, mamba-ssm | 1.50 | 1.50 |" in verdict
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
