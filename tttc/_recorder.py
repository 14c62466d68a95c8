"""What a compilation leaves behind for those who look at it; nothing is kept unless somebody records."""

from __future__ import annotations

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from tttc._within import within
from tttc.ir.program import Program

if TYPE_CHECKING:
    from tttc.codegen.kernel import Kernel


@dataclass
class Stage:
    """A graph of the model as it stood, and the arguments it was first called with."""

    name: str
    module: fx.GraphModule
    inputs: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Site:
    """One call of :func:`tttc.scan`: the layer it is in, and what became of it."""

    key: str
    mini_batch_size: int
    layer: str
    where: str | None
    program: Program | None
    reason: str | None = None  # why it runs eagerly
    said: int | None = None  # the mini-batch size in the model, where it was captured


@dataclass
class Recording:
    """Graphs, scans and kernels of one compilation, in the order met."""

    stages: list[Stage] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)


_OWN_FRAMES = ("tttc/scan.py", "tttc\\scan.py")

_current: contextvars.ContextVar[Recording | None] = contextvars.ContextVar(
    "tttc_recording", default=None
)


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Record the compilations that happen within."""
    recording = Recording()
    with within(_current, recording):
        yield recording


def recording() -> bool:
    """Whether somebody records."""
    return _current.get() is not None


@contextlib.contextmanager
def attempt() -> Iterator[None]:
    """Forget what was recorded within if it raises: TorchDynamo tries again."""
    recording = _current.get()
    if recording is None:
        yield
        return
    lists: tuple[list[Any], ...] = (recording.stages, recording.sites, recording.kernels)
    lengths = [len(x) for x in lists]
    try:
        yield
    except BaseException:
        for items, length in zip(lists, lengths, strict=True):
            del items[length:]
        raise


def graph(name: str, gm: fx.GraphModule) -> Stage | None:
    """Keep a graph as it is now; passes that come after may change ``gm`` in place."""
    recording = _current.get()
    if recording is None:
        return None
    copied = fx.Graph()
    copied.output(copied.graph_copy(gm.graph, {}))  # type: ignore[arg-type]
    module = fx.GraphModule(gm, copied, class_name=name)
    module.meta = dict(gm.meta)
    stage = Stage(name, module)
    recording.stages.append(stage)
    return stage


def watched(stage: Stage | None, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, its first arguments kept as those of ``stage``."""
    if stage is None:
        return run

    def call(*args: Any) -> Any:
        if stage.inputs is None:
            stage.inputs = args
        return run(*args)

    return call


def layer_of(node: fx.Node) -> str:
    """The name of the module a captured node belongs to, as ``named_modules`` has it; "" for the model itself."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    layer = str(stack[-1][0]) if stack else ""
    return re.sub(r"^L\['\w+'\]\.?", "", layer)


def site(
    node: fx.Node,
    key: str,
    mini_batch_size: int,
    program: Program | None,
    reason: str | None = None,
) -> None:
    """Keep a scan of a captured graph, lowered or not."""
    recording = _current.get()
    if recording is not None:
        said: Any = node.args[5] if len(node.args) > 5 else mini_batch_size
        frames = re.findall(r'File "([^"]+)", line (\d+)', node.stack_trace or "")
        outside = [f"{f}:{n}" for f, n in frames if not f.endswith(_OWN_FRAMES)]
        where = outside[-1] if outside else None
        layer = layer_of(node)
        recording.sites.append(Site(key, mini_batch_size, layer, where, program, reason, said))


def eager_site(name: str, mini_batch_size: int, reason: str) -> None:
    """Keep a scan that runs as the naive loop, outside any captured graph."""
    recording = _current.get()
    if recording is not None:
        recording.sites.append(Site(name, mini_batch_size, "", None, None, reason))


def kernels(made: Sequence[Kernel]) -> None:
    """Keep the kernels made for a graph."""
    recording = _current.get()
    if recording is not None:
        recording.kernels.extend(made)
