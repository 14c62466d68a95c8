"""Blocks that repeat in a model are traced once, whatever they hold; what does not fit runs as before."""

from __future__ import annotations

import copy

import pytest
import torch
import tttc.codegen.rowwise_launch
from torch import nn
from torch.nn import functional as F

import tttc
import tttc.blocks
import tttc.compiler
from tttc import _recorder
from tttc.models import TTTConfig, TTTLanguageModel

WIDTH, DEPTH = 6, 10  # a repeat has to save 64 nodes


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def seen(monkeypatch):
    """Of each graph: the rows of blocks that were traced once, and its nodes for AOTAutograd."""
    rows, nodes = [], []
    replace, outline = tttc.blocks._replace, tttc.blocks.outline

    def replacing(graph, block, repeat, now):
        rows.append(len(repeat.blocks))
        replace(graph, block, repeat, now)

    def outlining(gm):
        programs = outline(gm)
        nodes.append(len(gm.graph.nodes))
        return programs

    monkeypatch.setattr(tttc.blocks, "_replace", replacing)
    monkeypatch.setattr(tttc.compiler, "outline", outlining)
    return rows, nodes


class Block(nn.Module):
    """Enough operators that ten blocks are worth it: fewer would not be traced once."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype)
        self.down = nn.Linear(2 * WIDTH, WIDTH, dtype=dtype)
        self.scale = 0.5

    def branch(self, x):
        y = self.up(self.norm(x)).tanh()
        return self.down(y * y.sigmoid()) * self.scale

    def forward(self, x):
        return x + self.branch(x)


class Deep(nn.Module):
    def __init__(self, block=Block, depth=DEPTH):
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x):
        x = x.sin()
        for block in self.blocks:
            x = block(x)
        return x.cos()


def run(model, x, gradients=True):
    """Results and gradients."""
    if not gradients:
        with torch.no_grad():
            return [model(x)]
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.mT.shape).mT
    (y * weights).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def check(model, gradients=True, tolerance=1e-9):
    """A compiled model gives what the model gives."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    expected = [t.clone() for t in run(model, x, gradients)]
    got = run(tttc.compile(model, backend="torch"), x, gradients)
    assert len(expected) == len(got)
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("gradients", [False, True])
def test_equal_blocks_are_traced_once(seen, gradients):
    check(Deep(), gradients)
    assert seen[0] == [DEPTH]


def test_depth_costs_calls_not_operators(seen, monkeypatch):
    emitted = []
    emit = tttc.codegen.rowwise_launch.emit
    monkeypatch.setattr(
        tttc.codegen.rowwise_launch, "emit", lambda gm: emitted.append(gm) or emit(gm)
    )
    counts = []
    for depth in (DEPTH, 2 * DEPTH):
        torch._dynamo.reset()
        emitted.clear()
        check(Deep(depth=depth))
        counts.append((seen[1][-1], len(emitted)))
    (few, kernels), (many, as_many) = counts
    parameters = len(list(Block().parameters()))
    assert many - few == DEPTH * (parameters + 2)  # and a call with its result
    assert as_many == kernels
    assert seen[0] == [DEPTH, 2 * DEPTH]


def test_what_is_free_to_make_again_is_not_saved(monkeypatch):
    """A block of two linear layers would save its weights transposed: views, of which AOTAutograd traces each."""
    blocks = []
    traced = tttc.blocks.traced_block
    monkeypatch.setattr(
        tttc.blocks, "traced_block", lambda *args: blocks.append(traced(*args)) or blocks[-1]
    )
    model = nn.Sequential(*(Block() for _ in range(DEPTH)))
    tttc.compile(model)(torch.randn(3, WIDTH, dtype=torch.float64)).sum().backward()
    (block,) = blocks
    targets = [n.target for n in block.forward.results]
    assert torch.ops.aten.t.default not in targets
    assert torch.ops.aten.t.default in [n.target for n in block.backward.graph.nodes]
    assert all(not x.is_leaf or x.grad is not None for x in model.parameters())


def test_what_is_kept_for_a_backward_is_one_tensor_to_autograd(monkeypatch):
    counts = []
    hand_out = tttc.compiler.hand_out

    def read(gm):
        calls = gm.graph.find_nodes(op="call_function", target=torch.ops.tttc.block.default)
        return [(len(n.users), len(n.args[0])) for n in (calls[0], calls[-1])]

    def handing_out(joint, programs):
        before = read(joint)
        hand_out(joint, programs)
        counts.append((before, read(joint)))

    monkeypatch.setattr(tttc.compiler, "hand_out", handing_out)
    check(Deep())
    ((((shown, _), (_, given)), ((picked, _), (_, handed))),) = counts
    assert shown == 2  # the result, and what stands for the rest
    kept = picked - 1
    assert kept > 4 and handed - given == kept - 1


def test_language_model(seen):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2}
    model = TTTLanguageModel(
        TTTConfig(**sizes, num_layers=3, mini_batch_size=4), dtype=torch.float64
    )
    ids = torch.randint(11, (2, 9))
    naive = copy.deepcopy(model)
    compiled = tttc.compile(model, backend="torch", strict=True)
    for m in (naive, compiled):
        m(ids).square().sum().backward()
    assert seen[0] == [3]
    for p, q in zip(naive.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        expected, state = naive(ids[:, :5], return_state=True)
        got, other = compiled(ids[:, :5], return_state=True)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        more = compiled(ids[:, 5:], other, return_state=True)[0]
        torch.testing.assert_close(more, naive(ids[:, 5:], state), rtol=1e-9, atol=1e-9)


def test_scans_keep_the_names_of_their_layers():
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2}
    model = TTTLanguageModel(TTTConfig(**sizes, num_layers=3, mini_batch_size=4))
    with _recorder.record() as recording:
        tttc.compile(model, backend="torch")(torch.randint(11, (2, 9))).sum().backward()
    graphs = [stage.module.graph for stage in recording.stages if stage.name == "aten"]
    told = [
        [
            next(a for a in n.args if str(a).startswith("blocks"))
            for n in graph.nodes
            if "scan" in n.name
        ]
        for graph in graphs
    ]
    layers = [f"blocks.{i}.ttt" for i in range(3)]
    assert told == [layers, layers[::-1]]


def test_what_changes_later_is_seen(seen):
    """Every block is guarded, also those that were not traced."""
    model = Deep()
    compiled = tttc.compile(model, backend="torch")
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        compiled(x)
        for change in (
            lambda b: setattr(b, "scale", 0.25),
            lambda b: setattr(b.norm, "eps", 0.5),
            lambda b: setattr(b, "up", nn.Linear(WIDTH, 2 * WIDTH, bias=False, dtype=x.dtype)),
        ):
            change(model.blocks[7])
            torch.testing.assert_close(compiled(x), model(x))
    assert seen[0][0] == DEPTH


def frozen():
    model = Deep()
    for block in model.blocks[:5]:
        block.requires_grad_(False)
    model.blocks[8].norm.requires_grad_(False)
    return model


def shared_parameters():
    model = Deep()
    model.blocks[3].up = model.blocks[4].up
    model.blocks[5] = model.blocks[6]
    return model


def hooked():
    model = Deep()
    model.blocks[6].up.register_forward_hook(lambda module, args, out: out * 2)
    return model


class Narrow(Block):
    def __init__(self):
        super().__init__(torch.float32)

    def forward(self, x):
        return x + self.branch(x.float()).double()


def dtypes_of_layers():
    model = Deep(depth=2 * DEPTH)
    for i in range(DEPTH):
        model.blocks[i] = Narrow()
    return model


def alternating():
    model = Deep(depth=2 * DEPTH)
    for block in model.blocks[::2]:
        block.norm = nn.RMSNorm(WIDTH, dtype=torch.float64)
    return model


class InPlace(Block):
    def forward(self, x):
        y = self.branch(x)
        y += 1
        return x + y.mul_(2)


class Detached(Block):
    def forward(self, x):
        return x + self.branch(x) * self.branch(x.detach()).detach()


class Turned(Deep):
    """The last block's gradient arrives with other strides than its result has."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.mT * torch.arange(x.shape[1], dtype=x.dtype)


class Constant(Block):
    def forward(self, x):
        return x + self.branch(x) * torch.tensor([0.5, 2.0], dtype=x.dtype).sum()


class Collecting(Deep):
    """Several values leave a block, one of them an integer."""

    def forward(self, x):
        collected, places = [], []
        for block in self.blocks:
            y = block.branch(x)
            collected.append(y.mean())
            places.append(y.argmax())
            x = x + y
        return x * torch.stack(collected).sum() + torch.stack(places).sum()


class Viewing(Deep):
    """A block's result and a view of it leave the block."""

    def forward(self, x):
        views = []
        for block in self.blocks:
            x = block(x)
            views.append(x[:, 0])
        return x + torch.stack(views).sum(0)[:, None]


class Writing(Deep):
    """Blocks write into what they are given."""

    def forward(self, x):
        x = x.sin()
        for block in self.blocks:
            x += block.branch(x.clone())
        return x.cos()


class OfOneModule(Deep):
    """The same parameters each time."""

    def forward(self, x):
        for _ in range(DEPTH):
            x = self.blocks[0](x)
        return x


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (frozen, None),
        (shared_parameters, [DEPTH]),
        (hooked, None),
        (dtypes_of_layers, [DEPTH, DEPTH]),
        (alternating, [DEPTH]),
        (lambda: Deep(InPlace), [DEPTH]),
        (lambda: Deep(Detached), [DEPTH]),
        (Turned, [DEPTH]),
        (lambda: Deep(Constant), None),
        (Collecting, [DEPTH]),
        (Viewing, None),
        (Writing, None),
        (OfOneModule, [DEPTH]),
    ],
    ids=[
        "frozen",
        "shared",
        "hooked",
        "dtypes",
        "alternating",
        "in-place",
        "detached",
        "turned",
        "constant",
        "collecting",
        "viewing",
        "writing",
        "one-module",
    ],
)
def test_any_block(make, rows, seen):
    model = make()
    tolerance = 1e-5 if make is dtypes_of_layers else 1e-9  # which computes in float32
    check(model, tolerance=tolerance)
    if rows is not None:
        assert sorted(seen[0]) == rows
    check(model, gradients=False, tolerance=tolerance)


def test_dropout_draws_what_it_drew(monkeypatch):
    model = Deep()
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: F.dropout(out, 0.5))
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    drawn = []
    for outline in (tttc.compiler.outline, lambda gm: {}):
        monkeypatch.setattr(tttc.compiler, "outline", outline)
        torch._dynamo.reset()
        torch.manual_seed(1)
        drawn.append(run(tttc.compile(model, backend="torch"), x))
    for a, b in zip(*drawn, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("writes", [False, True])
def test_the_same_block_on_the_same_values_draws_anew(writes, seen):
    """Equal calls are not one: where a graph writes into a tensor PyTorch looks for them, else we do."""

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            if writes:
                self.calls.add_(1)
            return torch.stack([F.dropout(self.block(x), 0.5) for _ in range(DEPTH)])

    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    drawn = tttc.compile(Several(), backend="torch")(x)
    assert seen[0] == [DEPTH]
    assert len({tuple(t.flatten().tolist()) for t in drawn.detach()}) == DEPTH


def test_autocast_inside_and_outside(seen):
    class Cast(Deep):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    x = torch.randn(2, 5, WIDTH)
    inside = Cast().float()
    plain = Deep()
    plain.load_state_dict(inside.state_dict())
    plain.float()
    with torch.no_grad():
        expected = inside(x)
        torch.testing.assert_close(tttc.compile(inside, backend="torch")(x), expected)
        assert seen[0] == []
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(tttc.compile(plain, backend="torch")(x), expected)
    assert seen[0] == [DEPTH]
