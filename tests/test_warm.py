"""A second process begins with what the first one compiled, and never with what is not its own any more."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

MODEL = '''
import torch
from torch import nn

import tttc

RATE = 0.5
OFFSET = 0.25


def scaled(x):
    return 2.0 * x + OFFSET


def gradient(W, k, v):
    return torch.outer(k, k @ W - v)


def step(anchor, W, token, shared):
    k, v, q = token
    W = W - RATE * gradient(anchor, k, v)
    return W, q @ W


class Layer(nn.Module):
    HEADS = 2

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24, bias=False)
        self.W = nn.Parameter(0.1 * torch.randn(2, 4, 4))
        self.gain = 1.5

    def forward(self, x):
        k, v, q = self.project(scaled(x)).unflatten(-1, (3, self.HEADS, 4)).permute(2, 0, 3, 1, 4)
        state, z = tttc.scan(step, self.W, (k, v, q), mini_batch_size=4)
        return self.gain * z.transpose(1, 2).flatten(2)


def make():
    torch.manual_seed(0)
    return Layer()
'''

# Compiles each of its models, and says whether TorchDynamo had to, and how far from float64 it is.
DRIVER = '''
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


def run(name, x, change=None, train=True):
    module = importlib.import_module(name)
    layer = module.make()
    if change is not None:
        change(module, layer)
    compiled = tttc.compile(layer, backend="torch", strict=True)
    check(name, layer, compiled, x, train)
    return layer, compiled


x = torch.linspace(-1, 1, 2 * 10 * 8).view(2, 10, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    exec(sys.stdin.read())
said["warnings"] = [str(w.message) for w in caught if w.category is RuntimeWarning]
print(json.dumps(said))
'''


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
        print(run.stderr)  # shown where a test fails: why a program was not used
        said = json.loads(run.stdout.splitlines()[-1])
        for name, found in said.items():
            assert name == "warnings" or found["error"] < 1e-5, (name, found, run.stderr)
        return said

    def programs(self):
        return sorted((self.cache / "programs").glob("*.program"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four models compiled by a first process, forward and backward."""
    made = Folder(tmp_path_factory.mktemp("warm"))
    made.model("same", "helper", "constant", "step", "patched", "hooked", "changing")
    said = made.process(
        'for name in ("same", "helper", "constant", "step", "patched", "hooked", "changing"): run(name, x)'
    )
    assert [v["compiled"] for k, v in said.items() if k != "warnings"] == [1] * 7
    assert len(made.programs()) == 7
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
    folder.model("constant", replaced={"OFFSET = 0.25": "OFFSET = 0.5"})
    folder.model("step", replaced={"RATE = 0.5": "RATE = 0.25"})
    said = folder.process(
        """
def patch(module, layer):
    module.scaled = lambda x: 5.0 * x

def hook(module, layer):
    layer.project.register_forward_hook(lambda module, args, result: 2.0 * result)

run("same", x)
run("helper", x)
run("constant", x)
run("step", x)
run("patched", x, patch)
run("hooked", x, hook)
"""
    )
    compiled = {k: v["compiled"] for k, v in said.items() if k != "warnings"}
    assert compiled == {"same": 0, "helper": 1, "constant": 1, "step": 1, "patched": 1, "hooked": 1}
    assert len(folder.programs()) == len(before)  # written over, or not kept


def test_guards_are_those_of_the_model(folder):
    said = folder.process(
        """
layer, compiled = run("changing", x)
layer.gain = 2.5
check("attribute", layer, compiled, x)
type(layer).HEADS = 2
check("grad mode", layer, compiled, x, train=False)
layer.double()
check("dtype", layer, compiled, x.double())
layer.float()
check("back", layer, compiled, x)
layer.project.register_forward_hook(lambda module, args, result: 2.0 * result)
"""
    )
    compiled = {k: v["compiled"] for k, v in said.items() if k != "warnings"}
    assert compiled == {"changing": 0, "attribute": 1, "grad mode": 1, "dtype": 1, "back": 0}


@pytest.mark.parametrize(
    "change",
    [
        "torch._functorch.config.cse = False",
        "import tttc.warm.key as key; key.versions = lambda: {'tttc': '0.0.1'}",
        "torch.use_deterministic_algorithms(True)",
        "x = x[:1]",
        "torch.autocast('cpu', torch.bfloat16).__enter__(); tolerance()",
    ],
    ids=["configuration", "version", "global state", "a batch of one", "autocast"],
)
def test_other_circumstances_are_other_programs(folder, change):
    prefix = "def tolerance():\n    global check\n    check = lambda *args: say(args[0], 0) or counted(*args)\n"
    prefix += """
def counted(name, layer, compiled, x, train=True):
    before = graphs()
    compiled(x)
    say(name, graphs() - before)
"""
    said = folder.process(f'{prefix}{change}\nrun("same", x)')
    assert said["same"]["compiled"] == 1


def test_switched_off(folder):
    assert folder.process('run("same", x)', TTTC_WARM="0")["same"]["compiled"] == 1


@pytest.mark.parametrize("how", ["cut", "flipped", "other", "empty"])
def test_a_damaged_file_counts_as_none(tmp_path, how):
    folder = Folder(tmp_path)
    folder.model("same")
    folder.process('run("same", x, train=False)')
    (path,) = folder.programs()
    whole = path.read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:],
        "other": b"something else",
        "empty": b"",
    }
    path.write_bytes(damaged[how])
    said = folder.process('run("same", x, train=False)')
    assert said["same"]["compiled"] == 1
    assert len(said["warnings"]) == 1 and "is damaged" in said["warnings"][0]
    said = folder.process('run("same", x, train=False)')
    assert said["same"]["compiled"] == 0 and not said["warnings"]


def test_two_processes_at_once(tmp_path):
    folder = Folder(tmp_path)
    folder.model("same")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(folder.process, ['run("same", x)'] * 2))
    assert all(not said["warnings"] for said in both)
    assert len(folder.programs()) == 1
    assert not list((folder.cache / "programs").glob("*.partial"))
    assert folder.process('run("same", x)')["same"]["compiled"] == 0
