"""``tttc.compile``: the one place that knows every phase."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import operator
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

import tttc.runtime.fused_scan_backward  # noqa: F401  (registers the operators)
from tttc import _recorder, _tracing, logs
from tttc._checks import check_mini_batch_size
from tttc._scan_op import approximation, as_tiles, as_tokens, interned
from tttc.blocks import outline, put_back
from tttc.capture.loops import Loops
from tttc.capture.torch_scan import NoTokens, capturing, plan_scan, scans_of
from tttc.codegen.rowwise_launch import lower_regions
from tttc.ir.body import source_line
from tttc.ir.errors import CheckError, NotLowerable
from tttc.passes.fuse import decompositions, fuse
from tttc.pipeline import build_program, in_tokens
from tttc.progress import phase
from tttc.runtime.fused_scan import saving_interval
from tttc.tuning.choose import tuning_wanted

if TYPE_CHECKING:
    from tttc.runtime.blocks import Program
    from tttc.runtime.cuda_graphs import CudaGraphs, Direction

BACKENDS = ("auto", "triton", "torch")
# Of torch.compile: whether to search for schedules, whether to replay CUDA graphs.
MODES = {
    "default": (False, False),
    "reduce-overhead": (False, True),
    "max-autotune": (True, True),
    "max-autotune-no-cudagraphs": (True, False),
}
scans_log = logging.getLogger("tttc.scans")


@dataclass(frozen=True)
class Options:
    """What :func:`compile` was asked for."""

    backend: str = "auto"
    mini_batch_size: int | None = None
    strict: bool = False
    verify: bool = False
    tune: bool = False
    cuda_graphs: bool = False


class TTTCWarning(UserWarning):
    """A TTT layer runs eagerly, or approximates what its model says; each is said once."""


_warned: set[str] = set()
_warn_lock = threading.Lock()


def warn_once(message: str) -> None:
    """Warn unless the same was said before in this process."""
    with _warn_lock:
        if message in _warned:
            return
        _warned.add(message)
    warnings.warn(message, TTTCWarning, stacklevel=3)


def check_options(options: Options) -> Options:
    """Raise where an option is not what it may be."""
    if options.backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {options.backend!r}")
    if options.mini_batch_size is not None:
        check_mini_batch_size(options.mini_batch_size)
    logs.configure()
    return options


def _of_mode(mode: str | None, tune: bool | None) -> dict[str, bool]:
    """The options that a mode of torch.compile stands for; ``tune`` says more than the mode does."""
    if mode is None:
        mode = "default"
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    search, graphs = MODES[mode]
    wanted = (search or None) if tune is None else tune
    return {"tune": tuning_wanted(wanted), "cuda_graphs": graphs}


# -- the graph of the model ---------------------------------------------------------------------------


def lower_torch_scans(gm: fx.GraphModule, options: Options) -> None:
    """Replace each of PyTorch's own scans by what the compiler made of it, in place.

    One that can't be re-rolled stays as it is, with one warning; under ``strict`` it raises.
    """
    for inner, node in list(scans_of(gm)):
        where = source_line(node) or ""
        try:
            run = plan_scan(inner, node, options.verify)
        except NoTokens:
            continue
        except NotLowerable as error:
            refused = NotLowerable(
                f"the scan at {where} can't be lowered: {error.reason}", error.where or where
            )
            if options.strict:
                raise refused from None
            warn_once(f"{refused.reason}: it runs eagerly")
            _recorder.eager_site(where, 1, refused.reason)
            continue
        count = len(node.args[1])  # type: ignore[arg-type]
        picked = [u.args[1] if u.target is operator.getitem else 0 for u in node.users]
        states = any(i < count for i in picked if isinstance(i, int))
        direct = _DirectScans(options, node, states)

        def planned(init: Any, xs: Any, extra: Any, run: Any = run, direct: Any = direct) -> Any:
            with _tracing.use_backend(direct):
                return run(init, xs, extra)

        with inner.graph.inserting_before(node):
            new = inner.graph.call_function(planned, node.args[1:])
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        inner.graph.erase_node(node)
        inner.recompile()


def lower_scans(gm: fx.GraphModule, options: Options) -> fx.GraphModule:
    """Replace each ``tttc::scan`` by its compiled form, in the graph TorchDynamo captured and those inside it.

    A scan that can't be lowered stays the naive loop, with one warning; under ``strict`` it raises.
    """
    # What runs under torch.utils.checkpoint, say, is a graph of its own.
    for inner in gm.modules():
        if isinstance(inner, fx.GraphModule):
            _lower_scans_of(inner, options)
    return gm


def _lower_scans_of(gm: fx.GraphModule, options: Options) -> None:
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in (
            torch.ops.tttc.scan,
            torch.ops.tttc.scan.default,
        ):
            continue
        arguments: Any = node.args
        key, mini_batch_size = arguments[4:6]
        try:
            key, mini_batch_size = requested(key, mini_batch_size, options)
            program = build_program(interned(key), mini_batch_size, options.verify)
            _recorder.site(node, key, mini_batch_size, program)
            form = f"token by token: {program.reason}" if program.sequential else "in its dual form"
            scans_log.info("%s %s runs %s", _recorder.layer_of(node) or "scan", key, form)
        except NotLowerable as error:
            _recorder.site(node, key, mini_batch_size, None, str(error))
            scans_log.info("%s runs as the naive loop: %s", key, error)
            if options.strict:
                raise
            warn_once(f"the TTT layer with step {key.rpartition('#')[0]} runs eagerly: {error}")
            continue
        _replace_scan(gm.graph, node, key, mini_batch_size, options)
    gm.recompile()


def requested(key: str, mini_batch_size: int, options: Options) -> tuple[str, int]:
    """The step and mini-batch size to run where ``options`` ask for one; warns once where that approximates.

    An online rule (``mini_batch_size`` 1) stays what it is where it has an exact form for many tokens at a time, or
    where its approximation has none either.
    """
    if mini_batch_size == 1:
        tokens = in_tokens(key, options.verify)
        if tokens is not None:
            return tokens, 1
    size = options.mini_batch_size
    if size is None or size == mini_batch_size:
        return key, mini_batch_size
    name = key.rpartition("#")[0]
    if mini_batch_size == 1:
        if not build_program(interned(key), 1, options.verify).sequential:
            return key, 1
        try:
            reason = build_program(interned(approximation(key)), size, options.verify).reason
        except NotLowerable as error:
            reason = error.reason
        if reason is not None:
            warn_once(
                f"mini_batch_size={size}: the TTT layer with step {name} stays token by token: {reason}"
            )
            return key, 1
        key = approximation(key)
    warn_once(
        f"mini_batch_size={size}: the TTT layer with step {name} says {mini_batch_size}, which this approximates"
    )
    return key, size


def _replace_scan(
    graph: fx.Graph, node: fx.Node, key: str, mini_batch_size: int, options: Options
) -> None:
    """Put ``tttc::fused_scan`` in the place of a scan; states that nobody reads are not computed."""
    picks = [u for u in node.users if u.target is operator.getitem and not u.users]
    for pick in picks:
        graph.erase_node(pick)
    skipped = 2 * len(node.args[0])  # type: ignore[arg-type]

    def picked(user: fx.Node) -> Any:
        return user.args[1] if user.target is operator.getitem else 0

    states = any(picked(u) < skipped for u in node.users)
    anchor, carry, tokens, shared = (
        [x.meta["example_value"] for x in group]  # type: ignore[union-attr]
        for group in node.args[:4]
    )
    backend = options.backend
    tile = interned(key).tile
    given: Any = node.args[2]
    if tile is not None:
        given = [
            _inserted(graph, node, as_tokens, x, a) for x, a in zip(given, tile.tokens, strict=True)
        ]
        tokens = [x.meta["example_value"] for x in given]
    interval = saving_interval(anchor, carry, tokens, shared, key, mini_batch_size, backend)
    with graph.inserting_before(node):
        new = graph.call_function(
            torch.ops.tttc.fused_scan.default,
            (
                *node.args[:2],
                given,
                node.args[3],
                key,
                mini_batch_size,
                node.args[6],
                backend,
                states,
                interval,
                _recorder.layer_of(node),
                options.tune,
            ),
        )
        new.meta = dict(node.meta)
    for user in list(node.users):
        index = picked(user) - skipped
        if states:
            user.replace_input_with(node, new)
        else:
            user.args = (new, index)
        if tile is not None and index >= 0:
            users = list(user.users)
            made = _inserted(graph, users[0], as_tiles, user, tile.outputs[index], tile.size)
            for u in users:
                u.replace_input_with(user, made)
    graph.erase_node(node)


def _inserted(
    graph: fx.Graph, before: fx.Node, function: Callable[..., Any], x: fx.Node, *rest: Any
) -> fx.Node:
    """A function of a tensor, as a node of a graph that TorchDynamo captured."""
    with graph.inserting_before(before):
        made = graph.call_function(function, (x, *rest))
    value = x.meta["example_value"]
    if isinstance(value, torch.Tensor) and function is as_tokens:
        made.meta["example_value"] = function(value, *rest)
    return made


def _compile_graph(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    blocks: dict[str, Program],
    direction: Direction,
    graphs: CudaGraphs | None,
) -> Callable[..., Any]:
    """An ATen graph, forward or backward, as AOTAutograd hands it over: what only moves memory is fused."""
    _keep_saved_tensors()
    put_back(gm, blocks)
    before = _recorder.graph("aten", gm)
    with phase("fusion", "fusing") as made:
        fused = fuse(gm)
        made(fused)
    # The regions' kernels run on a GPU (or in Triton's interpreter), their torch operations elsewhere.
    _recorder.kernels(lower_regions(fused, "torch" if options.backend == "torch" else "triton"))
    after = _recorder.graph("fused", fused)
    run = make_boxed_func(_recorder.watched(before, _recorder.watched(after, fused.forward)))
    return run if graphs is None else graphs.replayed(run, gm, direction)


def _keep_saved_tensors() -> None:
    """Backward graphs write over nothing they are given, so they may run twice (``retain_graph=True``)."""
    context = torch._guards.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is not None and metadata.bw_donated_idxs is not None:
        metadata.bw_donated_idxs = []


def _cuda_graphs(options: Options) -> CudaGraphs | None:
    """Who replays the graphs of a model, where that is asked for and somebody looks at no values in between."""
    if not options.cuda_graphs or _recorder.recording():
        return None
    from tttc.runtime.cuda_graphs import CudaGraphs  # TorchInductor takes long to import

    return CudaGraphs()


def compile_graph(
    gm: fx.GraphModule, example_inputs: list[Any], options: Options
) -> Callable[..., Any]:
    """A TorchDynamo graph as a callable: scans lowered, then AOTAutograd, then fusion."""
    with _recorder.attempt(), capturing(False), phase("capture", "compiling a graph") as made:
        made(gm)
        stage = _recorder.graph("captured", gm)
        lower_torch_scans(gm, options)
        lower_scans(gm, options)
        compiler = functools.partial(
            _compile_graph, options=options, blocks=outline(gm), graphs=_cuda_graphs(options)
        )
        run = aot_autograd(
            fw_compiler=functools.partial(compiler, direction="forward"),
            bw_compiler=functools.partial(compiler, direction="backward"),
            inference_compiler=functools.partial(compiler, direction="inference"),
            decompositions=decompositions(),
            partition_fn=min_cut_rematerialization_partition,
        )(gm, example_inputs)
        return _recorder.watched(stage, run)


def dynamo_backend(
    gm: fx.GraphModule, example_inputs: list[Any], **kwargs: Any
) -> Callable[..., Any]:
    """``torch.compile(model, backend="tttc")``: the same compiler through PyTorch's own door.

    ``mode`` and ``options={"backend": ..., "strict": ...}`` take what :func:`compile` takes.
    """
    given = dict(kwargs.get("options") or {})
    given |= _of_mode(kwargs.get("mode"), given.get("tune"))
    try:
        options = Options(**given)
    except TypeError:
        known = ", ".join(Options.__dataclass_fields__)
        raise TypeError(f"options: expected some of {known}, got {', '.join(given)}") from None
    return compile_graph(gm, example_inputs, check_options(options))


# -- what the user holds --------------------------------------------------------------------------------


class _DirectScans:
    """The lowering of scans that run outside a captured graph, under a compiled model.

    Args:
        node: the node of a captured graph that holds them, if one does.
        states: whether anybody reads the states they leave.
    """

    def __init__(self, options: Options, node: fx.Node | None = None, states: bool = True) -> None:
        self.options = options
        self.layer = "" if node is None else _recorder.layer_of(node)
        self.node, self.states = node, states

    def takes(self, step: Callable[..., Any], structure: Any, mini_batch_size: int) -> bool:
        """Whether a scan can be lowered from here; says once why not."""
        if structure is None:
            reason = "a container it uses is no tuple, list, dict or named tuple"
        elif not _tracing.is_plain_function(step):
            reason = "its step closes over variables: pass them through shared="
        else:
            return True
        name = getattr(step, "__qualname__", type(step).__name__)
        self._refuse(name, mini_batch_size, NotLowerable(reason, _defined_at(step)))
        return False

    def __call__(self, call: Any, mini_batch_size: int, place: int) -> list[torch.Tensor] | None:
        """The scan by ``tttc::fused_scan``, or None where it can't be lowered."""
        try:
            key, mini_batch_size = requested(call.key, mini_batch_size, self.options)
            program = build_program(interned(key), mini_batch_size, self.options.verify)
            if self.node is not None:
                _recorder.site(self.node, key, mini_batch_size, program)
                self.node = None
        except NotLowerable as error:
            self._refuse(call.key.rpartition("#")[0], mini_batch_size, error)
            return None
        anchor, carry, tokens, shared = call[1:5]
        tile = interned(key).tile
        if tile is not None:
            tokens = [as_tokens(x, a) for x, a in zip(tokens, tile.tokens, strict=True)]
        interval = saving_interval(
            anchor, carry, tokens, shared, key, mini_batch_size, self.options.backend
        )
        out = torch.ops.tttc.fused_scan(
            anchor,
            carry,
            tokens,
            shared,
            key,
            mini_batch_size,
            place,
            self.options.backend,
            self.states,
            interval,
            self.layer,
            self.options.tune,
        )
        if not self.states:
            out = [*anchor, *anchor, *out]
        states = 2 * len(call.anchor)
        z = out[states : states + len(interned(call.key).outputs)]
        if tile is not None:
            z = [as_tiles(x, a, tile.size) for x, a in zip(z, tile.outputs, strict=True)]
        return [*out[:states], *z]

    def _refuse(self, name: str, mini_batch_size: int, error: NotLowerable) -> None:
        if self.options.strict:
            raise error
        warn_once(f"the TTT layer with step {name} runs eagerly: {error}")
        _recorder.eager_site(name, mini_batch_size, str(error))


def _defined_at(step: Callable[..., Any]) -> str | None:
    """The file and line of a step, where it is written in Python."""
    code = getattr(inspect.unwrap(step), "__code__", None)
    return None if code is None else f"{code.co_filename}:{code.co_firstlineno}"


class CompiledModule(nn.Module):
    """A module compiled by :func:`compile`; it shares parameters, buffers and submodules with the original.

    Its ``state_dict`` has the original's keys; moving, training and loading either moves, trains and loads both.
    """

    def __init__(self, module: nn.Module, options: Options) -> None:
        super().__init__()
        object.__setattr__(self, "_tttc_module", module)
        object.__setattr__(self, "_tttc_options", options)
        object.__setattr__(self, "_tttc_call", _compiled_call(module, options))
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = module.__dict__[name]

    @property
    def training(self) -> bool:
        """Whether the original is in training mode."""
        return self._tttc_module.training

    @training.setter
    def training(self, mode: bool) -> None:
        module = self.__dict__.get("_tttc_module")
        if module is not None:
            module.training = mode

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_tttc_module"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original computes."""
        return self._tttc_call(*args, **kwargs)

    def extra_repr(self) -> str:
        """The options the module was compiled with."""
        return f"compiled by tttc, backend={self._tttc_options.backend}"

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        return CompiledModule(copy.deepcopy(self._tttc_module, memo), self._tttc_options)

    def __reduce__(self) -> Any:
        return (CompiledModule, (self._tttc_module, self._tttc_options))


# Dynamo compiles a function a few times and then leaves it to run eagerly, whoever asks. One layer class serves
# many models, dtypes and places in a mini-batch: what is compiled must stay compiled.
COMPILATIONS = 256


@functools.cache
def _shared_backend(options: Options) -> Callable[..., Any]:
    """The same object for the same options: equal models then share what Dynamo made of one of them."""
    return functools.partial(compile_graph, options=options)


def _compiled_call(target: Callable[..., Any], options: Options) -> Callable[..., Any]:
    backend = _shared_backend(options)
    if _recorder.recording():  # who looks on wants to see it compiled
        backend = functools.partial(compile_graph, options=options)
    loops = Loops(target)
    compiled = torch.compile(loops.target, backend=backend, dynamic=True)
    direct = _DirectScans(options)
    config = {
        # Under dynamic=True Dynamo makes symbols of floats (an eps, a base), can't keep them and starts over.
        "specialize_float": True,
        "recompile_limit": COMPILATIONS,
        "accumulated_recompile_limit": 8 * COMPILATIONS,
    }

    def refuse(error: NotLowerable) -> None:
        if options.strict:
            raise error
        warn_once(f"{error.reason}: it runs eagerly")
        _recorder.eager_site(error.where or "", 1, error.reason)

    def call(*args: Any, **kwargs: Any) -> Any:
        if loops.any:
            loops.prepare(args, kwargs, refuse, options.verify)
        patched = torch._dynamo.config.patch(config)
        with loops.replaced(), _tracing.use_backend(direct), capturing(True), patched:
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if isinstance(error.inner_exception, (NotLowerable, CheckError)):
                    raise error.inner_exception from None
                raise

    return call


def compile(
    model: Callable[..., Any],
    *,
    backend: str = "auto",
    mini_batch_size: int | None = None,
    strict: bool = False,
    verify: bool = False,
    tune: bool | None = None,
    mode: str | None = None,
) -> Any:
    """Compile a model that contains TTT layers.

    Args:
        model: an ``nn.Module`` or a function; its scans (:func:`tttc.scan`) are lowered, whatever surrounds
            them is captured by TorchDynamo and fused where it only moves memory.
        backend: "triton" (fused kernels), "torch" (the same graphs by torch operations, any device) or
            "auto": Triton for tensors on a GPU, torch elsewhere.
        mini_batch_size: None for exactly what the model says. An int of at least 1 asks every scan for
            mini-batches of that size, an approximation where the model says another; each step warns once. An
            online rule (mini-batch size 1) that has an exact form for many tokens at a time keeps it.
            :func:`tttc.explain` measures how far an approximation is from what the model says.
        strict: raise :class:`NotLowerable` where a TTT layer can't be lowered, instead of running it
            eagerly with one warning.
        verify: after every pass run the graph before and after it in float64, and compare to 1e-9.
        tune: on the first call of each size class time the most promising schedules of every scan's kernels on the
            GPU at hand, and remember the fastest on disk. None: as the environment's ``TTTC_TUNE`` says (``1`` or
            ``0``), else False. What was remembered is used either way; where nothing was, rules choose.
        mode: as of :func:`torch.compile`: None or "default"; "reduce-overhead", which replays the captured graphs as
            CUDA graphs from the third call of a size on: short calls, which take the host longer to launch than the
            GPU to run, then take what the GPU takes (results and gradients lie in memory of the graphs: what is kept
            beyond the next call has to be cloned); "max-autotune-no-cudagraphs", which is ``tune=True``;
            "max-autotune", which is both. Without a GPU no graphs are recorded.

    Returns:
        A module (same parameters, same ``state_dict`` keys) or a function, called like ``model``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch, tttc
        >>> layer = tttc.nn.TTTLinear(64, 4, mini_batch_size=16)
        >>> compiled = tttc.compile(layer, backend="torch")
        >>> x = torch.randn(2, 40, 64)
        >>> torch.allclose(compiled(x), layer(x), atol=1e-4)
        True
    """
    if not callable(model):
        raise TypeError(f"model: expected an nn.Module or a function, got {type(model).__name__}")
    options = Options(backend, mini_batch_size, strict, verify, **_of_mode(mode, tune))
    check_options(options)
    if isinstance(model, CompiledModule):
        return CompiledModule(model._tttc_module, options)
    if isinstance(model, nn.Module):
        return CompiledModule(model, options)
    return functools.wraps(model)(_compiled_call(model, options))
