"""Equal blocks are traced by TorchDynamo once; what was traced of one is taken for no other program."""

from __future__ import annotations

import functools
import warnings
from collections import Counter

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import tttc
import tttc.compiler
from tttc import _recorder
from tttc.capture import regions, same_blocks, stamps
from tttc.models import TTTConfig, TTTLanguageModel

pytestmark = pytest.mark.skipif(
    regions._known is None and not stamps.WORK,
    reason="this PyTorch traces every block: there is nothing to take",
)

DEPTH = 4
IDS = torch.arange(2 * 13).reshape(2, 13) % 7
STYLES = {
    "transformer": {},
    "mamba": {"backbone": "mamba", "layer": "mlp"},
}


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def known(monkeypatch):
    """Modules of this file are taken for PyTorch's own: what they do may be asked of what is looked at of a block."""
    monkeypatch.setattr(same_blocks, "KNOWN", (*same_blocks.KNOWN, __name__))


@pytest.fixture
def as_captured(monkeypatch):
    """Captured graphs run as they are, their scans lowered.

    Which blocks are taken for which, the guards and the nodes in their places are all there by then; AOTAutograd
    and fusion, three quarters of a compilation, are for tests of what they make of it.
    """
    monkeypatch.setattr(tttc.compiler, "outline", lambda gm: {})
    monkeypatch.setattr(tttc.compiler, "through_autograd", lambda gm, inputs, **options: gm.forward)
    yield
    torch._dynamo.reset()  # equal models of other files would have these graphs


@pytest.fixture
def taken(monkeypatch):
    """For each block but the first ones: whether it was taken for one that was traced."""
    said = []
    if regions._known is None:
        stamped = stamps._stamped

        def noted(*given):
            made = stamped(*given)
            said.append(made is not None)
            return made

        monkeypatch.setattr(stamps, "_stamped", noted)
    else:
        asked = regions._reusable
        monkeypatch.setattr(regions, "_reusable", lambda *a: said.append(asked(*a)) or said[-1])
    return said


def model(**config):
    sizes = {"hidden_size": 16, "num_layers": DEPTH, "num_heads": 2, "mini_batch_size": 4}
    made = TTTLanguageModel(TTTConfig(vocab_size=7, **sizes, **config)).double()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return made


def compiled(made, **options):
    return tttc.compile(made, backend="torch", strict=True, **options)


def check(made, run=None):
    torch.testing.assert_close((run or compiled(made))(IDS), made(IDS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("style", STYLES)
def test_values_and_gradients(style, taken):
    made = model(**STYLES[style])

    def gradients(run):
        made.zero_grad()
        run(IDS).square().sum().backward()
        return [p.grad.clone() for p in made.parameters()]

    expected, got = gradients(made), gradients(compiled(made))
    assert taken == [True] * (DEPTH - 1)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def recorded(made, monkeypatch, once):
    """The operators that were captured, the layers of its scans, and the guards on the model."""
    guards = []
    build = torch._dynamo.guards.CheckFunctionManager.__init__

    def keep(self, code, output, *args, **kwargs):
        guards.extend(output.guards)
        return build(self, code, output, *args, **kwargs)

    with monkeypatch.context() as patch, _recorder.record() as recording:
        patch.setattr(torch._dynamo.guards.CheckFunctionManager, "__init__", keep)
        if not once:
            patch.setattr(regions, "takes", lambda target: False)
        compiled(made)(IDS)
    (captured,) = [s.module for s in recording.stages if s.name == "captured"]
    captured.graph.eliminate_dead_code()
    # Sizes are computed once a model, or once a block.
    values = [(n.target, n.meta.get("example_value")) for n in captured.graph.nodes]
    nodes = [str(target) for target, x in values if not isinstance(x, (torch.SymInt, int))]
    return nodes, [s.layer for s in recording.sites], {*map(described, guards)}


def described(guard):
    create = guard.create_fn
    given = create.keywords if isinstance(create, functools.partial) else {}
    plain = [(k, v) for k, v in given.items() if isinstance(v, (str, bool, int))]
    # That a class is one that is known already, and which class it is, is the same for a class.
    name = guard.create_fn_name().replace("DUPLICATE_INPUT", "CLASS_MATCH")
    return guard.name, name, str(plain)


@pytest.mark.parametrize("style", STYLES)
def test_graph_and_guards_are_those_of_tracing_every_block(style, taken, as_captured, monkeypatch):
    made = model(**STYLES[style])
    each = recorded(made, monkeypatch, once=False)
    assert not taken
    torch._dynamo.reset()
    once = recorded(made, monkeypatch, once=True)
    assert taken == [True] * (DEPTH - 1)
    assert Counter(once[0]) == Counter(each[0])
    assert once[1] == each[1] == [f"blocks.{i}.ttt" for i in range(DEPTH)]
    lacking = {g for g in each[2] - once[2] if g[0].startswith(("L[", "type(L[", "dict("))}
    assert len(each[2]) > 100
    assert not lacking


def learning_rate(block):
    block.ttt.base_lr = 3.0


def epsilon(block):
    block.mlp_norm.eps = 0.5


def rope(block):
    block.ttt.rope_theta = 10.0


def sizes(block):
    block.ttt.mini_batch_size = 2
    block.ttt.tau_offset = nn.Parameter(block.ttt.tau_offset.detach()[:2])


def width(block):
    block.mlp.up_proj = nn.Linear(16, 24, bias=False, dtype=torch.float64)
    block.mlp.gate_proj = nn.Linear(16, 24, bias=False, dtype=torch.float64)
    block.mlp.down_proj = nn.Linear(24, 16, bias=False, dtype=torch.float64)


def bias(block):
    block.mlp.down_proj = nn.Linear(
        block.mlp.down_proj.in_features, 16, bias=True, dtype=torch.float64
    )


def other_class(block):
    block.mlp_norm = nn.LayerNorm(16, dtype=torch.float64)


def own_forward(block):
    block.mlp.forward = lambda x: 2 * x


def strides(block):
    weight = block.mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T


def frozen(block):
    block.mlp.up_proj.weight.requires_grad_(False)


def shared(block):
    block.mlp.up_proj = block.mlp.gate_proj


def tied(block):
    block.mlp.up_proj.weight = block.mlp.gate_proj.weight


DIFFERENCES = [
    *(learning_rate, epsilon, rope, sizes, width, bias, other_class),
    *(strides, frozen, shared, tied),
]
CHANGES = [*DIFFERENCES, own_forward]


@pytest.mark.parametrize(
    ("change", "at"), [*((c, 2) for c in DIFFERENCES), (learning_rate, 0), (shared, 0), (tied, 0)]
)
def test_a_block_that_differs_is_traced_by_itself(change, at, taken, as_captured):
    made = model()
    change(made.blocks[at])
    assert not same_blocks.alike(made.blocks[at], made.blocks[1])
    assert same_blocks.alike(made.blocks[3], made.blocks[1])
    check(made)
    assert False in taken
    assert True in taken


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_afterwards_is_seen(change, as_captured):
    made = model()
    run = compiled(made)
    check(made, run)
    change(made.blocks[2])
    check(made, run)


def test_changes_are_seen_in_what_is_made_of_captured_graphs():
    """Strides make a difference nowhere else; then no two blocks are alike, in what only scans and weights say."""
    made = model()
    run = compiled(made)
    check(made, run)
    strides(made.blocks[2])
    check(made, run)
    for block, change in zip(made.blocks, (sizes, learning_rate, tied, width), strict=True):
        change(block)
    check(made, run)


def test_a_gradient_that_is_no_longer_wanted():
    made = model()
    run = compiled(made)
    run(IDS).sum().backward()
    frozen(made.blocks[2])
    made.zero_grad()
    run(IDS).square().sum().backward()
    assert made.blocks[2].mlp.up_proj.weight.grad is None
    got = made.blocks[1].mlp.up_proj.weight.grad.clone()
    made.zero_grad()
    made(IDS).square().sum().backward()
    torch.testing.assert_close(got, made.blocks[1].mlp.up_proj.weight.grad, rtol=1e-8, atol=1e-8)


def test_weights_of_several_blocks_may_be_one(taken):
    made = model()
    made.blocks[2].mlp.up_proj.weight = made.blocks[1].mlp.up_proj.weight
    made.blocks[3] = made.blocks[0]
    check(made)
    assert taken == [True] * (DEPTH - 1)


def test_hooks_are_run(taken, as_captured):
    made = model()
    made.blocks[2].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    check(made)
    assert not taken


SCALES = {}


class Registered(nn.RMSNorm):
    """What it does depends on who it is."""

    def forward(self, x):
        return super().forward(x) * SCALES[self]


class Counting(nn.RMSNorm):
    """Writes into what it holds, and nobody reads that."""

    def __init__(self):
        super().__init__(16, dtype=torch.float64)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls.add_(1)
        return super().forward(x)


def test_blocks_with_modules_of_somebody_are_traced_each(taken, as_captured):
    made = model()
    for i, block in enumerate(made.blocks):
        block.mlp_norm = Registered(16, dtype=torch.float64)
        SCALES[block.mlp_norm] = i + 1.0
    check(made)
    own_forward(made.blocks[2])
    check(made)
    assert not taken
    assert not regions.takes(nn.Sequential(made))
    assert regions.takes(nn.Sequential(model(), Counting()))


def test_modules_of_somebody_that_come_later(taken, as_captured):
    made = model()
    run = compiled(made)
    for i, block in enumerate(made.blocks):
        block.mlp_norm = Registered(16, dtype=torch.float64)
        SCALES[block.mlp_norm] = i + 1.0
    check(made, run)
    assert True not in taken


def test_what_is_written_in_place_and_read_by_nobody(known):
    made = model()
    for block in made.blocks:
        block.mlp_norm = Counting()
    run = compiled(made)
    for _ in range(3):
        run(IDS)
    assert [block.mlp_norm.calls.item() for block in made.blocks] == [3] * DEPTH


class WhereTensorsAre(nn.RMSNorm):
    def forward(self, x):
        y = super().forward(x)
        return 2 * y if torch.empty(1).device.type == "meta" else y


@pytest.mark.parametrize("first", ["with", "without"])
def test_where_tensors_are_made_by_default(first, known, as_captured):
    made = model()
    for block in made.blocks:
        block.mlp_norm = WhereTensorsAre(16, dtype=torch.float64)
    run = compiled(made)
    for meta in [first == "with", first != "with"]:
        with torch.device("meta" if meta else "cpu"):
            check(made, run)


def test_a_break_in_a_block_is_a_break(as_captured):
    made = model()
    forward = made.blocks[2].mlp.forward

    def broken(x):
        torch._dynamo.graph_break()
        return forward(x)

    made.blocks[2].mlp.forward = broken
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(made)


def test_a_state_goes_from_block_to_block(as_captured):
    made = model()
    run = compiled(made)
    check(made, run)
    first, state = run(IDS[:, :6], return_state=True)
    more = run(IDS[:, 6:], state)
    torch.testing.assert_close(torch.cat([first, more], 1), made(IDS), rtol=1e-9, atol=1e-9)


def test_regions_of_others_are_left_to_pytorch(taken):
    class Part(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.note = factor  # read by nobody

        def forward(self, x):
            return (x * self.weight).sin()

    region = torch.compiler.nested_compile_region(lambda part, x: part(x))
    parts = nn.ModuleList([Part(1.0), Part(2.0), Part(3.0)])

    def run(x):
        for part in parts:
            x = region(part, x)
        return x

    x = torch.randn(3)
    with regions.traced_once(True):
        torch.testing.assert_close(torch.compile(run, backend="eager")(x), run(x))
    if regions._known is None:
        assert not taken  # which 2.11 does not do for them
    else:
        assert taken[-1]  # the second's x needs gradients, which the first's did not


def replaced():
    """What stands in the place of PyTorch's, and what it is there while a model is called."""
    if regions._known is None:
        there = stamps.hops.InvokeSubgraphHigherOrderVariable._call_function
        return there, stamps._original, stamps._call
    return regions.dynamo.is_reusable, regions._known, regions._reusable


def test_pytorch_is_left_as_it_was():
    """Nothing of PyTorch's is replaced but while a model is called, by however many threads at once."""
    there, theirs, ours = replaced()
    assert not regions.wanted and there is theirs
    first, second = regions.traced_once(True), regions.traced_once(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert regions.wanted and replaced()[0] is ours
    second.__exit__(None, None, None)
    assert not regions.wanted and replaced()[0] is theirs


def holding(**what):
    made = nn.Identity()
    vars(made).update(what)
    return made


def test_what_is_shared_and_of_which_type_makes_a_difference():
    one = [1]
    apart, together = holding(a=[1], b=[1]), holding(a=one, b=one)
    assert same_blocks.alike(apart, holding(a=[1], b=[1]))
    assert same_blocks.alike(together, holding(a=apart.a, b=apart.a))
    assert not same_blocks.alike(apart, together)
    assert not same_blocks.alike(together, apart)
    assert not same_blocks.alike(holding(a={1: 2}), holding(a={True: 2}))
    assert not same_blocks.alike(holding(a=Counter()), holding(a=Counter()))
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    weights[1].grad = torch.ones(2)
    assert not same_blocks.alike(*(holding(a=w) for w in weights))


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        self.shrink = nn.Softshrink(0.1)

    def forward(self, x):
        return self.shrink(self.project(x)).sin()


ELSEWHERE = []


class Named(nn.Module):
    """Something of the first block is used before, by another name."""

    def __init__(self, name):
        super().__init__()
        self.parts = nn.ModuleList(Part() for _ in range(3))
        self.name = name
        self.shrink = self.parts[0].shrink
        self.head = self.parts[0].project.weight
        ELSEWHERE[:] = [self.head]

    def forward(self, x):
        if self.name == "module":
            x = x + self.shrink.lambd
        else:
            x = x @ (self.head if self.name == "weight" else ELSEWHERE[0])
        for part in self.parts:
            x = regions.run(part, x)
        return x


@pytest.mark.parametrize("name", ["weight", "module", "global"])
def test_what_is_a_blocks_by_another_name_is_its_own(name, taken, known):
    """The first block's are those of the head, too: the second's are not."""
    made, x = Named(name), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with regions.traced_once(True):
        got = compiled(made)(x)
    torch.testing.assert_close(got, made(x), rtol=1e-9, atol=1e-9)
    assert not taken[0]


class Factored(Part):
    """Reads a list that the model may have read by a global name."""

    def __init__(self):
        super().__init__()
        self.factors = [2.0]

    def forward(self, x):
        return super().forward(x) * self.factors[0]


class ReadsTheFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(Factored() for _ in range(3))
        ELSEWHERE[:] = [self.parts[0].factors]

    def forward(self, x):
        x = x * ELSEWHERE[0][0]
        for part in self.parts:
            x = run(part, x)
        return x


def test_a_change_of_what_the_first_has_by_another_name(known):
    made, x = ReadsTheFirst(), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    run = compiled(made)
    torch.testing.assert_close(run(x), made(x), rtol=1e-12, atol=1e-12)
    made.parts[1].factors[0] = 3.0
    torch.testing.assert_close(run(x), made(x), rtol=1e-12, atol=1e-12)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, dtype=torch.float64))

    def forward(self, x):
        if torch.are_deterministic_algorithms_enabled():
            x = x + 1.0
        return (x * self.weight).sin()


def run(block, x):
    """As models do it."""
    return regions.run(block, x) if regions.wanted else block(x)


def in_checkpoints(blocks, x):
    x = x * blocks[0].weight * blocks[1].weight

    def both(a, b):
        return run(blocks[0], a) + run(blocks[1], b)

    return torch.utils.checkpoint.checkpoint(both, x, 2 * x, use_reentrant=False)


def on_weights(blocks, x):
    a = run(blocks[0], blocks[0].weight)
    return a + run(blocks[1], x * blocks[1].weight)


def under_settings(blocks, x):
    x = run(blocks[0], 2 * x)
    torch.use_deterministic_algorithms(True)
    x = run(blocks[1], x)
    torch.use_deterministic_algorithms(False)
    return x


def twice(blocks, x):
    return run(blocks[1], run(blocks[0], run(blocks[0], 2 * x)))


def in_a_list(blocks, x):
    for block in blocks:
        block.more = [block.weight]
    return run(blocks[1], run(blocks[0], x * blocks[0].more[0]))


class Uses(nn.Module):
    def __init__(self, uses):
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(2))
        self.uses = uses

    def forward(self, x):
        return self.uses(self.blocks, x)


@pytest.mark.parametrize("uses", [in_checkpoints, on_weights, under_settings, twice, in_a_list])
def test_blocks_that_are_used_in_other_ways(uses, known):
    made = Uses(uses)
    x = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    wanted, got = made(x), compiled(made)(x)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    leaves = [x, *made.parameters()]
    grads = [torch.autograd.grad(y.sum(), leaves) for y in (got, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)
