"""Explanations, benchmarks and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import fx, nn

import tttc
from tttc.report import text
from tttc.report.demo import library_text
from tttc.report.results import Row

SCHEMA = Path(tttc.__file__).parent / "report" / "schema.json"


class Two(nn.Module):
    """Two equal layers and one of another size."""

    def __init__(self):
        super().__init__()
        self.first = tttc.nn.TTTLinear(16, 2, mini_batch_size=4)
        self.second = tttc.nn.TTTLinear(16, 2, mini_batch_size=4)
        self.other = tttc.nn.TTTMLP(16, 2, mini_batch_size=4)

    def forward(self, x):
        return self.other(self.second(self.first(x)))


def step_online(anchor, W, token, shared):
    W = W + torch.outer(token, torch.tanh(token @ W))
    return W, token @ W


def online(x):
    return tttc.scan(step_online, torch.zeros(2, 4, 4), x, mini_batch_size=4)[1]


@pytest.fixture(scope="module")
def explained():
    torch.manual_seed(0)
    return tttc.explain(Two(), torch.randn(2, 10, 16), backend="torch", target="")


def test_stages_run_on_their_example_inputs(explained):
    assert list(explained.stages)[:2] == ["model.captured", "model.aten"]
    outputs = {}
    for name, stage in explained.stages.items():
        assert isinstance(stage, fx.GraphModule)
        outputs[name] = stage(*explained.example_inputs(name))
    naive, lowered = outputs["model.captured"], outputs["model.aten"]
    torch.testing.assert_close(naive[0], lowered[0], atol=1e-5, rtol=1e-5)
    for x, y in zip(outputs["scan0.batch"], outputs["scan0.simplify"], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_equal_layers_share_a_scan(explained):
    assert explained.layers == {"first": "scan0", "second": "scan0", "other": "scan1"}
    linear, mlp = explained.scans
    assert linear.step == "tttc.nn.inner.linear_step"
    assert linear.where.rpartition(":")[0].endswith("inner.py")
    assert (linear.form, linear.mini_batch_size, linear.tokens) == ("dual", 4, 10)
    assert mlp.layers == ["other"]
    assert "scan1.dualise" in explained.stages and "dualise" not in explained.stages


def test_costs_errors_and_kernels(explained):
    for scan in explained.scans:
        assert scan.after.number("fused") < scan.before.number("op_by_op") / 10
        by_name = {s.name: s for s in scan.stages}
        # The primal form makes every token's fast weights, the dual form does not.
        primal, dual = (by_name[n].cost.number("largest") for n in ("batch", "simplify"))
        assert primal == 4 * dual
        assert all(s.error < 1e-5 for s in scan.stages)
        assert max(scan.errors.values()) < 1e-5 and scan.checked == 10
        assert scan.orders
    assert explained.kernels
    for kernel in explained.kernels:
        assert kernel.path.read_text() == kernel.source
        # At least q, k, v and the output of 2 sequences of 10 tokens of 16 numbers.
        assert 4 * 2 * 10 * 16 * 4 <= kernel.cost["bytes"] < 200_000


def test_text_fits_eighty_columns(explained, monkeypatch):
    from tttc.report.render import explanation

    shown = text.plain(*explanation(explained), width=80).splitlines()
    assert max(map(len, shown)) <= 80
    for stage in ("dualise", "simplify_backward"):
        # A row of a table on one line, its error at the end.
        (row,) = [x for x in shown if x.strip().startswith(f"scan1.{stage} ")]
        assert "e-0" in row.split()[-1]
    monkeypatch.setenv("COLUMNS", "160")
    wide = str(explained).splitlines()
    assert max(map(len, wide)) <= text.WIDE and any("dual form  " in x for x in wide)


def test_text_is_plain_and_says_what_matters(explained):
    shown = str(explained)
    assert "\x1b" not in shown
    for part in (
        "scan1: tttc.nn.inner.mlp_step",
        "dualise",
        "dual form",
        "first, second",
        "sources, in that order, in ",
    ):
        assert part in shown
    assert "2 distinct scans in 3 layers" in repr(explained)


def test_one_distinct_scan_has_plain_names_and_resources():
    layer = tttc.nn.TTTLinear(32, 2, mini_batch_size=8)
    compiled = tttc.compile(layer, backend="torch")
    found = tttc.explain(compiled, torch.randn(1, 8, 32), target="sm_80")
    assert "dualise" in found.stages
    for kernel in found.kernels:
        assert kernel.resources["registers"] > 0
        assert kernel.resources["target"] == "sm_80"
    assert "figures for sm_80" in str(found)
    with pytest.raises(KeyError, match="expected one of model"):
        found.example_inputs("dualize")


def test_a_scan_without_dual_form_says_why():
    found = tttc.explain(online, torch.randn(1, 2, 6, 4), backend="torch", target="")
    (scan,) = found.scans
    assert scan.form == "sequential" and scan.reason
    assert scan.reason in " ".join(str(found).split())
    assert max(scan.errors.values()) < 1e-5


def test_an_eager_scan_says_why():
    factor = torch.tensor(2.0)

    def closes_over(x):
        def step(anchor, W, token, shared):
            return W + token * factor, W

        return tttc.scan(step, torch.zeros(2, 4), x)[1]

    with pytest.warns(tttc.TTTCWarning):
        found = tttc.explain(closes_over, torch.randn(1, 2, 3, 4), backend="torch", target="")
    (scan,) = found.scans
    assert scan.form == "eager" and "closes over" in scan.reason
    assert not found.kernels


def test_the_backward_is_explained(explained):
    for scan in explained.scans:
        back = scan.backward
        assert back.of == "simplify" and back.reason is None and "token.k" in back.wanted
        assert [s.name for s in back.stages] == ["backward", "simplify_backward"]
        assert all(s.error < 1e-3 for s in back.stages)
        derived, simplified = (s.graph for s in back.stages)
        # Of the forward what is read again is kept; cotangents are new.
        assert derived.compared == "simplify" and derived.count("new") > derived.count("") > 10
        assert simplified.compared == "backward"
        assert {n.operation for n in simplified.nodes if n.kind == "result"} == {
            f"∂ {name}" for name in back.wanted
        }
        assert set(back.wanted) <= set(back.errors) and back.error < 1e-3 and back.checked == 9
        assert back.recurrence.reverse and back.recurrence.part("recurrence").nodes
        assert back.kernels and all("backward" in k.name for k in back.kernels)
        assert back.cost.number("flops") > scan.after.number("flops")
        assert all(k in explained.kernels for k in back.kernels)
    shown = " ".join(str(explained).split())
    assert "the vector-Jacobian product of simplify" in shown and "gradients largest error" in shown
    assert "sources, in that order, in" in shown


def test_the_gradients_of_a_stage_are_those_of_torch(explained):
    for name in ("scan0.simplify_backward", "scan1.simplify_backward"):
        stage = explained.stages[name]
        given = dict(
            zip(
                [n.name for n in stage.graph.nodes if n.op == "placeholder"],
                explained.example_inputs(name),
                strict=True,
            )
        )
        forward = explained.stages[name.replace("simplify_backward", "simplify")]
        leaves = [
            x.double().requires_grad_()
            for x in explained.example_inputs(name.replace("simplify_backward", "simplify"))
        ]
        outputs = forward(*leaves)[-1:]
        wanted = dict(
            zip([n.name for n in forward.graph.nodes if n.op == "placeholder"], leaves, strict=True)
        )
        expected = torch.autograd.grad(outputs, wanted["token_0"], given["goutput_0"].double())[0]
        index = explained.scans[int(name[4])].backward.wanted.index("token.q")
        torch.testing.assert_close(
            stage(*given.values())[index], expected.float(), atol=1e-4, rtol=1e-4
        )


def test_a_backward_without_kernels_says_why():
    x = torch.randn(1, 2, 6, 4, requires_grad=True)
    (scan,) = tttc.explain(online, x, backend="torch", target="").scans
    assert scan.form == "sequential" and "one after another" in scan.backward.reason
    assert scan.backward.stages and not scan.backward.kernels and scan.backward.error < 1e-5
    # One token's cotangents of anchor and carry are both those of the state it starts from.
    assert {"anchor", "W"} <= set(scan.backward.wanted)
    assert all(s.error < 1e-5 for s in scan.backward.stages)
    assert "torch operations" in str(tttc.explain(online, x, backend="torch", target=""))


def test_gradients_in_bfloat16_are_measured_with_the_cotangents_they_got():
    layer = tttc.nn.TTTLinear(16, 2, mini_batch_size=4).bfloat16()
    x = torch.randn(1, 9, 16, dtype=torch.bfloat16)
    (scan,) = tttc.explain(layer, x, backend="torch", target="").scans
    # Sums are made in float32: what is left is one rounding of the gradient to bfloat16.
    assert scan.backward.errors["token.q"] < 2**-8 and scan.backward.errors["token.v"] < 2**-8
    assert all(0 <= e < 0.1 for e in scan.backward.errors.values())


def test_no_backward_where_nothing_wants_a_gradient():
    x = torch.randn(1, 2, 6, 4)
    (scan,) = tttc.explain(online, x, backend="torch", target="").scans
    assert scan.backward is None
    (scan,) = tttc.explain(online, x, backend="torch", target="", backward=True).scans
    assert scan.backward is not None
    layer = tttc.nn.TTTLinear(16, 2, mini_batch_size=4)
    (scan,) = tttc.explain(
        layer, x.view(1, 3, 16), backend="torch", target="", backward=False
    ).scans
    assert scan.backward is None


class Normed(nn.Module):
    """Three regions, two of them equal."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        for layer in (self.first, self.second):
            x = torch.sigmoid(layer(x)) * 2
        return torch.softmax(self.third(x), -1).unsqueeze(0)


def test_kernels_of_regions_have_resources(monkeypatch):
    from tttc.report import regions

    launched = []
    real = regions._launched
    monkeypatch.setattr(
        regions, "_launched", lambda k, given: launched.append((k, given)) or real(k, given)
    )
    found = tttc.explain(Normed(), torch.randn(5, 24), target="sm_80")
    assert len(found.kernels) == len(found.regions) >= 2
    assert sum(r.count for r in found.regions.values()) == found.models[0].regions
    assert max(r.count for r in found.regions.values()) == 2
    for kernel in found.kernels:
        assert kernel.resources["target"] == "sm_80" and kernel.resources["registers"] > 0
        region = found.regions[str(kernel.path)]
        assert kernel.cost == {"bytes": region.bytes_after} and region.bytes_after > 0
        assert region.bytes_before >= region.bytes_after
    assert all(
        x.device.type == "meta" for _, given in launched for x in given if hasattr(x, "device")
    )
    page = found.to_html()
    assert "Kernels around the scans" in page and "compiled for sm_80" in page


def test_a_kernel_that_does_not_compile_says_why():
    layer = tttc.nn.TTTLinear(16, 2, mini_batch_size=4)
    found = tttc.explain(layer, torch.randn(1, 4, 16), backend="torch", target="sm_999")
    assert found.kernels and all("sm_999" in k.resources["error"] for k in found.kernels)
    assert "for sm_999: " in str(found) and "does not compile for sm_999" in found.to_html()
    jsonschema.validate(found.to_dict(), json.loads(SCHEMA.read_text()))


def test_nothing_to_explain():
    found = tttc.explain(nn.Linear(3, 3), torch.randn(2, 3), backend="torch")
    assert not found.scans and "No tttc.scan" in str(found)


# -- benchmark --------------------------------------------------------------------------------------------


def test_benchmark_compares_and_saves(tmp_path):
    layer = tttc.nn.TTTLinear(16, 2, mini_batch_size=8)
    x = torch.randn(1, 40, 16)
    result = tttc.benchmark(layer, x, contenders=["eager", "tttc"], repeats=3, backend="torch")
    assert [r.name for r in result.rows] == ["eager", "tttc"]
    assert all(len(r.times) == 3 and r.error < 1e-5 for r in result.rows)
    assert result.reference == "the naive loop in float64"
    saved = json.loads(result.to_json(tmp_path / "r.json"))
    assert saved == json.loads((tmp_path / "r.json").read_text())
    assert saved["inputs"] == ["float32[1, 40, 16]"]
    assert "\x1b" not in str(result) and "times eager" in str(result)
    assert layer.W1.grad is None


def test_a_slow_naive_loop_is_stopped_and_that_is_said():
    layer = tttc.nn.TTTLinear(16, 2, mini_batch_size=8)
    x = torch.randn(1, 400, 16)
    result = tttc.benchmark(layer, x, repeats=2, budget=0.1, backend="torch")
    assert result["eager"].at_least >= 0.1 and not result["eager"].times
    assert "opaque" in result["torch.compile"].note
    assert result.speed_up("tttc")[1]
    assert result["tttc"].error < 1e-4
    assert result.reference.startswith("the compiled graph")
    assert "eager: stopped after" in str(result)


def test_what_fails_says_so_in_its_row(monkeypatch):
    monkeypatch.setattr("tttc.report.measurement.has_compiler", lambda: False)
    result = tttc.benchmark(
        tttc.nn.TTTLinear(16, 2), torch.randn(1, 4, 16), contenders=["torch.compile"], repeats=1
    )
    assert "no C++ compiler" in result["torch.compile"].note
    assert "no C++ compiler" in str(result)


def test_gradients_are_compared():
    layer = nn.Linear(8, 8)
    result = tttc.benchmark(
        layer,
        torch.randn(4, 8),
        backward=True,
        contenders=["eager", "tttc"],
        repeats=2,
        backend="torch",
    )
    assert all(r.gradient_error < 1e-5 for r in result.rows)
    assert layer.weight.grad is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"repeats": 0}, "repeats"),
        ({"budget": 0}, "budget: expected more than 0"),
        ({"contenders": ["jax"]}, "contenders: expected some of eager"),
    ],
)
def test_benchmark_names_a_wrong_argument(wrong, message):
    with pytest.raises(ValueError, match=message):
        tttc.benchmark(nn.Linear(2, 2), torch.randn(2, 2), **wrong)


def test_rows_without_times():
    assert Row("eager").median is None and Row("eager").spread is None


# -- text ---------------------------------------------------------------------------------------------------


def test_numbers():
    assert [text.count(x) for x in (0, 999, 1234, 1.5e6, 2e15)] == [
        "0",
        "999",
        "1.23 k",
        "1.5 M",
        "2 P",
    ]
    assert [text.byte_count(x) for x in (0, 1023, 1536, 3 << 20)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
    ]
    assert [text.seconds(x) for x in (2.5, 0.0123, 4.2e-6)] == ["2.5 s", "12.3 ms", "4.2 µs"]


# -- the demo --------------------------------------------------------------------------------------------------


def test_the_demo_reads_real_text():
    assert len(library_text(5000)) == 5000
    assert b"import" in library_text(5000)
