"""The language models: against a forward pass written out, states carried on, sizes, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from tttc.models import SIZES, TTTConfig, TTTLanguageModel

KINDS = [("linear", "transformer"), ("mlp", "mamba")]


def tiny(layer="linear", backbone="transformer", seed=0, num_layers=2):
    torch.manual_seed(seed)
    config = TTTConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_layers=num_layers,
        num_heads=2,
        mini_batch_size=4,
        layer=layer,
        backbone=backbone,
    )
    model = TTTLanguageModel(config, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def some_ids(B=2, T=9):
    return torch.randint(11, (B, T), generator=torch.Generator().manual_seed(3))


def rms(x, norm):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight


@pytest.mark.parametrize(("layer", "backbone"), KINDS)
@torch.no_grad()
def test_forward_written_out(layer, backbone):
    model, ids = tiny(layer, backbone), some_ids()
    x = model.embedding.weight[ids]
    for block in model.blocks:
        if backbone == "mamba":
            padded = F.pad(rms(x, block.conv_norm).mT, (3, 0))
            x = x + F.conv1d(padded, block.conv.weight[:, None], block.conv.bias, groups=8).mT
        x = x + block.ttt(rms(x, block.ttt_norm))
        y = rms(x, block.mlp_norm)
        up, gate = y @ block.mlp.up_proj.weight.T, y @ block.mlp.gate_proj.weight.T
        x = x + (up * gate * gate.sigmoid()) @ block.mlp.down_proj.weight.T
    expected = rms(x, model.norm) @ model.embedding.weight.T
    torch.testing.assert_close(model(ids), expected, rtol=1e-10, atol=1e-10)
    assert type(model.blocks[0].ttt).__name__ == {"linear": "TTTLinear", "mlp": "TTTMLP"}[layer]
    for block in model.blocks:
        assert (block.ttt.g_proj is not None) == block.ttt.share_qk == (backbone == "mamba")


@pytest.mark.parametrize(("layer", "backbone"), KINDS)
@torch.no_grad()
def test_continuing_equals_one_long_call(layer, backbone):
    model, ids = tiny(layer, backbone), some_ids()
    whole = model(ids)
    for cuts in ([5, 4], [1] * 9):
        state, parts = None, []
        for part in ids.split(cuts, 1):
            logits, state = model(part, state, return_state=True)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("layer", "backbone"), KINDS)
def test_captured_whole(layer, backbone, constant_floats):
    model, ids = tiny(layer, backbone, num_layers=1), some_ids()
    captured = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    logits = captured(ids)
    torch.testing.assert_close(logits, model(ids), rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(model(ids).square().sum(), list(model.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_a_step_of_training_lowers_the_loss():
    model, ids = tiny(), some_ids()
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_module():
    model, ids = tiny("mlp", "mamba"), some_ids()
    assert not [name for name in model.state_dict() if "head" in name]  # tied to the embedding
    twin = copy.deepcopy(model)
    other = tiny("mlp", "mamba", seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(twin(ids), model(ids)) and torch.equal(other(ids), model(ids))
    half = copy.deepcopy(model).bfloat16()
    assert half(ids).dtype == torch.bfloat16
    assert model(ids[:, :0]).shape == (2, 0, 11) and model(ids[:0]).shape == (0, 9, 11)


@pytest.mark.parametrize(
    ("size", "millions"), [("125m", 125), ("350m", 350), ("760m", 760), ("1.3b", 1300)]
)
def test_named_sizes(size, millions):
    model = TTTLanguageModel(TTTConfig.named(size), device="meta")
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.12 * millions
    assert model.config.mini_batch_size == 16
    changed = TTTConfig.named(size, layer="mlp", num_layers=1)
    assert (changed.layer, changed.num_layers) == ("mlp", 1)
    assert changed.hidden_size == SIZES[size]["hidden_size"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"layer": "linaer"},
            ValueError,
            r"layer: expected one of \('linear', 'mlp'\), got 'linaer'",
        ),
        ({"backbone": "lstm"}, ValueError, r"backbone: expected one of .* got 'lstm'"),
        ({"num_layers": 0}, ValueError, r"num_layers: expected an int of at least 1, got 0"),
        ({"vocab_size": 2.5}, TypeError, r"vocab_size: expected an int of at least 1, got 2.5"),
        (
            {"mini_batch_size": 0},
            ValueError,
            r"mini_batch_size: expected an int of at least 1, got 0",
        ),
    ],
)
def test_errors_of_the_config(change, error, message):
    with pytest.raises(error, match=message):
        TTTConfig(**change)


def test_errors_of_the_model():
    with pytest.raises(ValueError, match=r"size: expected one of .* got '7b'"):
        TTTConfig.named("7b")
    with pytest.raises(
        ValueError, match=r"hidden_size: expected a multiple of num_heads = 5, got 8"
    ):
        TTTLanguageModel(TTTConfig(hidden_size=8, num_heads=5))
    model, ids = tiny(), some_ids()
    with pytest.raises(TypeError, match=r"ids: expected an int32 or int64 tensor .* torch.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"ids: expected shape \[B, T\], got \(9,\)"):
        model(ids[0])
    _, state = model(ids, return_state=True)
    with pytest.raises(
        ValueError, match=r"state: expected one BlockState for each of 2 blocks, got 1"
    ):
        model(ids, state[:1])
    with pytest.raises(TypeError, match=r"state: expected a tuple of BlockState, got list"):
        model(ids, list(state))
