"""A second process begins with what the first one compiled, and never with what is not its own any more."""

import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from marks import interpreted, on_gpu
from test_stages import call_of

from tttc import _scan_op, pipeline
from tttc.nn import TTTLinear
from tttc.warm import asked, steps
from tttc.warm.recording import NotKept

MODEL = """
import torch
from torch import nn

import tttc

RATE = 0.5
OFFSET = 0.25


def scaled(x):
    return 2.0 * x + OFFSET


def gradient(W, k, v):
    return torch.outer(k, k @ W - v)


def read(q, W):
    return q @ W


def step(anchor, W, token, shared):
    k, v, q = token
    W = W - RATE * gradient(anchor, k, v)
    return W, read(q, W)


def first(z):
    return (z[0] if isinstance(z, tuple) else z).to(torch.float32)


class Centre(nn.Module):
    def forward(self, z):
        return z - z.mean(-1, keepdim=True)


class Layer(nn.Module):
    HEADS = 2

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24, bias=False)
        self.W = nn.Parameter(0.1 * torch.randn(2, 4, 4))
        self.centre = Centre()
        self.gain = 1.5

    def forward(self, x):
        k, v, q = self.project(scaled(x)).unflatten(-1, (3, self.HEADS, 4)).permute(2, 0, 3, 1, 4)
        state, z = tttc.scan(step, self.W, (k, v, q), mini_batch_size=4)
        return self.gain * self.centre(first(z).transpose(1, 2).flatten(2))


def make():
    torch.manual_seed(0)
    return Layer()
"""

# Compiles each of its models, and says whether TorchDynamo had to, and how far from float64 it is.
DRIVER = """
import copy, importlib, json, logging, sys, warnings

import torch

import tttc

logging.basicConfig()
logging.getLogger("tttc.warm").setLevel(logging.INFO)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check(name, layer, compiled, x, train=True):
    before, exact = graphs(), copy.deepcopy(layer).double()
    with torch.set_grad_enabled(train):
        y, wanted = compiled(x), exact(x.double())
        errors = [(y - wanted).abs().max() / wanted.abs().max()]
        if train:
            y.square().sum().backward()
            wanted.square().sum().backward()
            for p, q in zip(layer.parameters(), exact.parameters(), strict=True):
                errors.append((p.grad - q.grad).abs().max() / q.grad.abs().max())
                p.grad = None
    say(name, graphs() - before, max(map(float, errors)))


said = {}


def say(name, compiled, error=0.0):
    said[name] = {"compiled": compiled, "error": error}


def run(name, x, change=None, train=True, backend="torch"):
    module = importlib.import_module(name)
    layer = module.make()
    if change is not None:
        change(module, layer)
    compiled = tttc.compile(layer, backend=backend, strict=True)
    check(name, layer, compiled, x, train)
    return layer, compiled


x = torch.linspace(-1, 1, 2 * 10 * 8).view(2, 10, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    exec(sys.stdin.read())
said["warnings"] = [str(w.message) for w in caught if w.category is RuntimeWarning]
print(json.dumps(said))
"""


class Folder:
    """A folder with models, a cache, and processes that use them."""

    def __init__(self, path):
        self.path = path
        self.cache = path / "cache"
        (path / "driver.py").write_text(DRIVER)

    def model(self, *names, **changes):
        """Write models, each with texts of its source changed."""
        text = MODEL
        for old, new in changes.get("replaced", {}).items():
            assert old in text
            text = text.replace(old, new)
        for name in names:
            (self.path / f"{name}.py").write_text(text)

    def process(self, program, **environment):
        """What a process says that runs ``program`` in the driver."""
        given = {k: v for k, v in os.environ.items() if k != "TTTC_WARM"}
        given |= {"TTTC_CACHE_DIR": str(self.cache), "OMP_NUM_THREADS": "1", **environment}
        # Sources that change within a second: what Python keeps of them would be taken for the new ones.
        given |= {"PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run(
            [sys.executable, "driver.py"], cwd=self.path, env=given, input=program,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        self.log = run.stderr
        print(self.log)  # shown where a test fails: why a program was not used
        said = json.loads(run.stdout.splitlines()[-1])
        for name, found in said.items():
            assert name == "warnings" or found["error"] < 1e-5, (name, found, run.stderr)
        return said

    def programs(self):
        return sorted((self.cache / "programs").glob("*.program"))


NAMES = [
    "same",
    "helper",
    "method",
    "constant",
    "step",
    "returned",
    "rounded",
    "patched",
    "replaced",
    "hooked",
    "changing",
]
CIRCUMSTANCES = {
    "configuration": "torch._functorch.config.patch(cse=False)",
    "of_dynamo": "torch._dynamo.config.patch(capture_scalar_outputs=True)",
    "version": "patch.object(tttc.warm.key, 'versions', lambda: {'tttc': '0.0.1'})",
    "source": "patch.object(tttc.warm.key, '_compiler', lambda: 'another')",
    "precision": "high()",
    "autocast": "torch.autocast('cpu', torch.bfloat16)",
    "switched_off": "patch.dict(os.environ, TTTC_WARM='0')",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models compiled by a first process, forward and backward."""
    made = Folder(tmp_path_factory.mktemp("warm"))
    others = [*CIRCUMSTANCES, "a_batch_of_one"]
    names = [*NAMES, *others]
    made.model(*names)
    said = made.process(
        f"for name in {NAMES}: run(name, x)\nfor name in {others}: run(name, x, train=False)"
    )
    assert [v["compiled"] for k, v in said.items() if k != "warnings"] == [1] * len(names)
    assert len(made.programs()) == len(names)
    return made


def test_a_second_process_compiles_nothing(folder):
    said = folder.process(
        """
layer, compiled = run("same", x)
check("again", layer, compiled, x)
check("longer", layer, compiled, torch.linspace(-1, 1, 3 * 17 * 8).view(3, 17, 8))
other = copy.deepcopy(layer)
check("equal", other, tttc.compile(other, backend="torch", strict=True), x)
""",
        PYTHONHASHSEED="11",
    )
    assert said == {
        "same": {"compiled": 0, "error": pytest.approx(0, abs=1e-5)},
        "again": {"compiled": 0, "error": pytest.approx(0, abs=1e-5)},
        "longer": {"compiled": 0, "error": pytest.approx(0, abs=1e-5)},
        "equal": {"compiled": 0, "error": pytest.approx(0, abs=1e-5)},
        "warnings": [],
    }


def test_what_changed_is_compiled(folder):
    before = folder.programs()
    folder.model("helper", replaced={"return 2.0 * x + OFFSET": "return 3.0 * x + OFFSET"})
    folder.model(
        "method", replaced={"z - z.mean(-1, keepdim=True)": "z - z.mean(-2, keepdim=True)"}
    )
    folder.model("constant", replaced={"OFFSET = 0.25": "OFFSET = 0.5"})
    folder.model("step", replaced={"RATE = 0.5": "RATE = 0.25"})
    folder.model("returned", replaced={"return q @ W": "return (q @ W,)"})
    folder.model("rounded", replaced={"return q @ W": "return (q @ W).double()"})
    said = folder.process(
        """
def patch(module, layer):
    module.scaled = lambda x: 5.0 * x

def replace(module, layer):
    module.Centre.forward = lambda self, z: 2.0 * z

def hook(module, layer):
    layer.project.register_forward_hook(lambda module, args, result: 2.0 * result)

run("same", x)
for name in ("helper", "method", "constant", "step", "returned"): run(name, x)
run("rounded", x)
run("patched", x, patch)
run("replaced", x, replace)
run("hooked", x, hook)
"""
    )
    changed = (
        "helper",
        "method",
        "constant",
        "step",
        "returned",
        "rounded",
        "patched",
        "replaced",
        "hooked",
    )
    compiled = {k: v["compiled"] for k, v in said.items() if k != "warnings"}
    assert compiled == {"same": 0, **dict.fromkeys(changed, 1)}
    assert folder.programs() == before  # written over, or not kept


def test_guards_are_those_of_the_model(folder):
    said = folder.process(
        """
layer, compiled = run("changing", x)
layer.gain = 2.5
check("attribute", layer, compiled, x)
check("grad mode", layer, compiled, x, train=False)
layer.double()
check("rounded", layer, compiled, x.double())
layer.float()
check("back", layer, compiled, x)
layer.project.bias = torch.nn.Parameter(torch.ones(24))
check("bias", layer, compiled, x)
layer.centre = torch.nn.Identity()
check("module", layer, compiled, x)
sys.modules["changing"].OFFSET = 0.75
check("constant", layer, compiled, x)
"""
    )
    compiled = {k: v["compiled"] for k, v in said.items() if k != "warnings"}
    changes = ("attribute", "grad mode", "rounded", "bias", "module", "constant")
    assert compiled == {"changing": 0, "back": 0, **dict.fromkeys(changes, 1)}


def test_other_circumstances_are_other_programs(folder):
    program = """
import contextlib, os
from unittest.mock import patch

import tttc.warm.key

@contextlib.contextmanager
def high():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")

def check(name, layer, compiled, x, train):  # that it compiles: under autocast values are others'
    before = graphs()
    with torch.set_grad_enabled(train):
        compiled(x)
    say(name, graphs() - before)

run("same", x)
run("a_batch_of_one", x[:1], train=False)
"""
    for name, context in CIRCUMSTANCES.items():
        program += f"with {context}: run({name!r}, x, train=False)\n"
    said = folder.process(program)
    compiled = {k: v["compiled"] for k, v in said.items() if k != "warnings"}
    assert compiled == {"same": 0, "a_batch_of_one": 1, **dict.fromkeys(CIRCUMSTANCES, 1)}


@interpreted
def test_kernels_and_models_of_blocks(tmp_path):
    """Regions with kernels of their own (in Triton's interpreter), and blocks that are traced once."""
    folder = Folder(tmp_path)
    folder.model("same")
    program = """
from tttc.models import TTTConfig, TTTLanguageModel
from tttc.codegen.rowwise_launch import Launch

launched = []
launch = Launch._run
Launch._run = lambda self, *args: launched.append(self.kernel.name) or launch(self, *args)
run("same", x, backend="triton")
say("kernels", len(launched))

sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mini_batch_size": 4}
model = TTTLanguageModel(TTTConfig(**sizes, vocab_size=16)).double()
ids = torch.arange(20).view(2, 10) % 16
before, y = graphs(), tttc.compile(model, backend="torch", strict=True)(ids)
y.square().mean().backward()
got = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
exact = copy.deepcopy(model)
exact(ids).square().mean().backward()
pairs = zip(got, (p.grad for p in exact.parameters()), strict=True)
say("model", graphs() - before, max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
"""
    first, second = (folder.process(program, TRITON_INTERPRET="1") for _ in range(2))
    assert (first["same"]["compiled"], first["model"]["compiled"]) == (1, 1)
    assert (second["same"]["compiled"], second["model"]["compiled"]) == (0, 0)
    assert first["kernels"] == second["kernels"] and first["kernels"]["compiled"] > 0


LOCAL = """
def made():
    class Inner(nn.Module):
        def forward(self, z):
            return 2.0 * z

    return Inner()


class Layer"""
OPERATOR = """
@torch.library.custom_op("somebody::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * x


twice.register_fake(torch.empty_like)
twice.register_autograd(lambda ctx, g: 2.0 * g)


def scaled"""
RESULT = """
@torch.compiler.assume_constant_result
def number():
    return 2.0


def scaled"""


def test_what_may_change_unseen_is_not_kept(tmp_path):
    folder = Folder(tmp_path)
    folder.model("a_class", replaced={"\nclass Layer": LOCAL, "= Centre()": "= made()"})
    folder.model("an_operator", replaced={"\ndef scaled": OPERATOR, "2.0 * x +": "twice(x) +"})
    folder.model("a_result", replaced={"\ndef scaled": RESULT, "2.0 * x +": "number() * x +"})
    folder.process('for name in ("a_class", "an_operator", "a_result"): run(name, x)')
    assert not folder.programs()
    reasons = [line.partition("Layer.forward: ")[2] for line in folder.log.splitlines()]
    assert reasons == [
        "another process has no name for a_class.made.<locals>.Inner",
        "it calls somebody.twice.default",
        "the result of number is taken for a constant",
    ]


def test_a_damaged_file_counts_as_none(tmp_path):
    folder = Folder(tmp_path)
    names = ["cut", "flipped", "other", "empty"]
    folder.model(*names)
    program = f"for name in {names}: run(name, x, train=False)"
    folder.process(program)
    cut, flipped, other, empty = folder.programs()
    whole = flipped.read_bytes()
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    other.write_bytes(b"something else")
    empty.write_bytes(b"")
    said = folder.process(program)
    assert [said[name]["compiled"] for name in names] == [1] * 4
    assert len(said["warnings"]) == 4
    assert all("is damaged" in text for text in said["warnings"])
    said = folder.process(program)
    assert [said[name]["compiled"] for name in names] == [0] * 4 and not said["warnings"]


def test_two_processes_at_once(tmp_path):
    folder = Folder(tmp_path)
    folder.model("same")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(folder.process, ['run("same", x)'] * 2))
    assert all(not said["warnings"] for said in both)
    assert len(folder.programs()) == 1
    assert not list((folder.cache / "programs").glob("*.partial"))
    assert folder.process('run("same", x)')["same"]["compiled"] == 0


@on_gpu
def test_kernels_of_a_later_process_compute_the_same(folder):
    folder.model("same")
    program = """
layer = importlib.import_module("same").make().cuda()
check("same", layer, tttc.compile(layer, backend="triton", strict=True), x.cuda())
with torch.no_grad():
    check("again", layer, tttc.compile(layer, backend="triton", strict=True), x.cuda(), False)
"""
    first, second = folder.process(program), folder.process(program)
    assert first["same"]["compiled"] > 0
    assert second["same"]["compiled"] == second["again"]["compiled"] == 0
    assert max(x["error"] for said in (first, second) for x in (said["same"], said["again"])) < 1e-4


def test_asked_for_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("TTTC_WARM", raising=False)
    assert asked()
    for word, wanted in (("0", False), ("1", True)):
        monkeypatch.setenv("TTTC_WARM", word)
        assert asked() is wanted


def test_what_rules_said_of_a_step_is_kept(monkeypatch):
    """A later process asks them nothing; what it has asked them meanwhile stands."""
    call, program, _ = call_of(TTTLinear, T=32, d=16, b=16)
    key, place = call.key, torch.device("cpu")
    monkeypatch.setattr(program, "rules", {"loop": "its plan", "another": "plan"})
    kept = steps.written(key, {(16, place)})
    for module, name in (
        (_scan_op, "_by_key"),
        (_scan_op, "_by_content"),
        (pipeline, "_programs"),
    ):
        monkeypatch.setattr(module, name, {})  # as in a process that begins
    found = steps.read(kept)
    made = pipeline.build_program(_scan_op.interned(found), 16)
    assert made is not program and made.rules == {"loop": "its plan", "another": "plan"}
    made.rules = {"loop": "its own"}
    assert steps.read(kept) == found
    assert made.rules == {"loop": "its own", "another": "plan"}
    # What is not so is not left behind.
    (size, _, rules), *_ = kept.programs
    other = dataclasses.replace(kept, programs=((size, "of another step", rules),))
    with pytest.raises(NotKept):
        steps.read(other)
    assert _scan_op.interned(found), "somebody else's entry stays"
    for known in (_scan_op._by_key, _scan_op._by_content, pipeline._programs):
        known.clear()
    with pytest.raises(NotKept):
        steps.read(other)
    assert not _scan_op._by_key and not _scan_op._by_content and not pipeline._programs
