"""``tttc.compile`` by its torch backend, against the naive loop in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import tttc
from tttc.nn import TTTMLP, TTTLinear

LAYERS = [TTTLinear, TTTMLP]
LENGTHS = [1, 7, 16, 17, 100, 256]
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def forward_only():
    """No gradients, and nothing that an earlier test compiled: Dynamo compiles a function a few times only."""
    import torch._dynamo

    torch._dynamo.reset()
    with torch.no_grad():
        yield


def random_layer(layer, d=8, heads=2, b=16, seed=0, dtype=torch.float64, **options):
    """A layer whose every parameter is random, so that no term of a formula is zero or one."""
    gen = torch.Generator().manual_seed(seed)
    module = layer(d * heads, heads, b, dtype=torch.float64, **options)
    for name, p in module.named_parameters():
        mean = 1.0 if name in ("norm_weight", "post_norm.weight") else 0.0
        p.copy_(mean + 0.1 * torch.randn(p.shape, generator=gen, dtype=p.dtype))
    return module.to(dtype)


def random_input(T, d=8, heads=2, B=2, dtype=torch.float64, seed=5):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, d * heads, generator=gen, dtype=torch.float64).to(dtype)


def assert_close(got, expected, tolerance=TOLERANCE):
    """Trees of tensors (and places) agree, relative to the size of the values where those are large."""
    a, b = pytree.tree_leaves(got), pytree.tree_leaves(expected)
    assert len(a) == len(b) and a
    for x, y in zip(a, b, strict=True):
        if isinstance(y, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
        else:
            assert x == y


@pytest.mark.parametrize("b", [1, 4, 16, 64])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_length_and_mini_batch(layer, b):
    module = random_layer(layer, b=b)
    compiled = tttc.compile(module, backend="torch", strict=True)
    x = random_input(LENGTHS[-1])
    # The naive loop once, in pieces: its state after each is what a call of that length ends with.
    expected, state, start = x[:, :0], None, 0
    for T in LENGTHS:
        piece, state = module(x[:, start:T], state, return_state=True)
        expected, start = torch.cat([expected, piece], 1), T
        assert_close(compiled(x[:, :T], return_state=True), (expected, state))


@pytest.mark.parametrize("d", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("layer", LAYERS)
def test_every_head_dimension(layer, d):
    module = random_layer(layer, d=d, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True)
    x = random_input(10, d=d, B=1)
    assert_close(compiled(x, return_state=True), module(x, return_state=True))


def test_gate_and_convolutions():
    module = random_layer(TTTLinear, b=4, gate=True, share_qk=True)
    compiled = tttc.compile(module, backend="torch", strict=True)
    x = random_input(10)
    assert_close(compiled(x, return_state=True), module(x, return_state=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_two_calls_are_one(layer):
    module = random_layer(layer, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True)
    x = random_input(11)
    whole, end = module(x, return_state=True)
    for cut in (1, 3, 4, 8, 9):
        first, state = compiled(x[:, :cut], return_state=True)
        second, state = compiled(x[:, cut:], state, return_state=True)
        assert_close(torch.cat([first, second], 1), whole)
        assert_close(state, end)


def test_token_by_token_is_one_call():
    module = random_layer(TTTLinear, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True)
    x = random_input(9)
    whole, end = module(x, return_state=True)
    state, pieces = None, []
    for t in range(9):
        y, state = compiled(x[:, t : t + 1], state, return_state=True)
        pieces.append(y)
    assert_close(torch.cat(pieces, 1), whole)
    assert_close(state, end)


@pytest.mark.parametrize("layer", LAYERS)
def test_verify_passes(layer):
    module = random_layer(layer, b=4, seed=3)
    compiled = tttc.compile(module, backend="torch", strict=True, verify=True)
    x = random_input(10)
    assert_close(compiled(x), module(x))


# --- nothing is compiled twice -----------------------------------------------------------------------


def graphs_captured():
    import torch._dynamo.utils

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_one_capture_serves_every_batch_and_length():
    module = random_layer(TTTLinear, b=4)
    compiled = tttc.compile(module, backend="torch", strict=True)
    compiled(random_input(10, B=2))
    before = graphs_captured()
    for B, T in [(3, 10), (2, 33), (5, 4), (7, 64), (2, 2)]:
        x = random_input(T, B=B)
        assert_close(compiled(x), module(x))
    assert graphs_captured() == before


def graph_of(T):
    """How many nodes the graphs have that are captured at one length."""
    import torch._dynamo

    torch._dynamo.reset()
    module = random_layer(TTTLinear, b=16)
    seen = []

    def backend(gm, inputs):
        seen.append(len(gm.graph.nodes))
        return tttc.compiler.compile_graph(gm, inputs, tttc.compiler.Options("torch"))

    torch.compile(module, backend=backend)(random_input(T, B=1))
    return seen


def test_what_is_compiled_does_not_grow_with_length():
    assert graph_of(512) == graph_of(32)


# --- a compiled module is a module ---------------------------------------------------------------------


def test_parameters_are_shared_and_keys_kept():
    module = random_layer(TTTLinear, b=4)
    compiled = tttc.compile(module, backend="torch")
    assert list(compiled.state_dict()) == list(module.state_dict())
    assert [n for n, _ in compiled.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert all(a is b for a, b in zip(compiled.parameters(), module.parameters(), strict=True))
    x = random_input(6)
    compiled(x)
    module.W1.mul_(2.0)
    assert_close(compiled(x), module(x))
    other = random_layer(TTTLinear, b=4, seed=1)
    compiled.load_state_dict(other.state_dict())
    assert_close(module(x), other(x))
    assert_close(compiled(x), other(x))
    assert compiled.hidden_size == 16


def test_train_eval_and_dtype_reach_both():
    module = random_layer(TTTLinear, b=4)
    compiled = tttc.compile(module, backend="torch")
    compiled.eval()
    assert not module.training and not module.post_norm.training
    compiled.train()
    assert module.training and module.post_norm.training
    x = random_input(6)
    expected = module(x)
    compiled.to(torch.float32)
    assert module.W1.dtype is torch.float32
    got = compiled(x.float())
    assert got.dtype is torch.float32
    assert_close(got.double(), expected, 1e-5)


def test_copy_and_pickle():
    import copy
    import pickle

    module = random_layer(TTTLinear, b=4)
    compiled = tttc.compile(module, backend="torch")
    x = random_input(6)
    expected = compiled(x)
    for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert_close(other(x), expected)
        other.W1.zero_()
        assert module.W1.abs().sum() > 0
        assert list(other.state_dict()) == list(module.state_dict())
    assert "backend=torch" in repr(compiled)


def test_compiling_again_takes_the_new_options():
    module = random_layer(TTTLinear, b=4)
    once = tttc.compile(module, backend="torch")
    twice = tttc.compile(once, backend="torch", strict=True)
    x = random_input(6)
    assert_close(twice(x), module(x))
    assert twice.W1 is module.W1


def test_inside_another_model():
    module = random_layer(TTTLinear, b=4)
    whole = torch.nn.Sequential(torch.nn.LayerNorm(16, dtype=torch.float64), module)
    compiled = tttc.compile(whole, backend="torch", strict=True)
    x = random_input(6)
    assert_close(compiled(x), whole(x))
    assert list(compiled.state_dict()) == list(whole.state_dict())


# --- PyTorch's own door ----------------------------------------------------------------------------------


def test_through_torch_compile():
    module = random_layer(TTTLinear, b=4)
    x = random_input(10)
    assert_close(torch.compile(module, backend="tttc")(x), module(x))
    options = {"backend": "torch", "strict": True, "verify": True}
    assert_close(torch.compile(module, backend="tttc", options=options)(x), module(x))


def test_torch_compile_names_a_wrong_option():
    module = random_layer(TTTLinear, b=4)
    with pytest.raises(Exception, match=r"options: expected some of backend.*got speed"):
        torch.compile(module, backend="tttc", options={"speed": 11})(random_input(5))
    with pytest.raises(
        Exception, match=r"backend: expected one of auto, triton, torch, got 'cuda'"
    ):
        torch.compile(module, backend="tttc", options={"backend": "cuda"})(random_input(5))
