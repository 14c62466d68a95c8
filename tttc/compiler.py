"""``tttc.compile``: the one place that knows every phase."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from functorch.compile import make_boxed_func
from torch import fx, nn

import tttc.runtime.fused_scan_backward  # noqa: F401  (registers the operators)
from tttc import _recorder, _tracing
from tttc._garbage import not_collected
from tttc.aot import cut, through_autograd
from tttc.blocks import hand_out, outline, put_back
from tttc.capture import regions
from tttc.capture.loops import Loops
from tttc.capture.torch_scan import capturing
from tttc.codegen.rowwise_launch import lower_regions
from tttc.codegen.triton_ready import begin_triton
from tttc.ir.errors import CheckError, NotLowerable
from tttc.lowering import DirectScans, lower_scans, lower_torch_scans
from tttc.options import Options, check_options, of_mode, warn_once
from tttc.passes.bind import bind
from tttc.passes.few_places import few_places
from tttc.passes.from_sizes import remember
from tttc.passes.fuse import decompositions, fuse
from tttc.passes.merge_equal import merge_equal
from tttc.passes.totals import totals
from tttc.progress import phase
from tttc.runtime.rehearsal import rehearse
from tttc.warm import asked
from tttc.warm.graphs import keep_captured, keep_graph
from tttc.warm.recording import outermost

if TYPE_CHECKING:
    from tttc.runtime.blocks import Program
    from tttc.runtime.cuda_graphs import CudaGraphs, Direction


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
    if direction == "inference":
        merge_equal(gm.graph)  # of the others it was done before they were cut
    before = _recorder.graph("aten", gm)
    with phase("fusion", "fusing") as made:
        few_places(gm)
        totals(gm)
        # What a CUDA graph reads lies in memory of its own.
        remember(gm, _given_out(gm.graph, direction), kept=graphs is None)
        fused = fuse(gm)
        made(fused)
    # The regions' kernels run on a GPU (or in Triton's interpreter), their torch operations elsewhere.
    _recorder.kernels(lower_regions(fused, "torch" if options.backend == "torch" else "triton"))
    rehearse(fused)
    after = _recorder.graph("fused", fused)
    keep_graph(direction, bind(fused))
    run = make_boxed_func(_recorder.watched(before, _recorder.watched(after, fused.forward)))
    return run if graphs is None else graphs.replayed(run, gm, direction)


def _given_out(graph: fx.Graph, direction: Direction) -> list[fx.Node]:
    """The results of a graph that its caller gets; the others of a forward are kept for its backward."""
    results: Any = graph.output_node().args[0]
    context = torch._guards.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if direction == "forward" and metadata is not None:
        results = results[: metadata.num_forward_returns]
    return [n for n in results if isinstance(n, fx.Node)]


def _partition(
    joint: fx.GraphModule, inputs: Any, *, blocks: dict[str, Program], **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """AOTAutograd's graph of a forward and its backward, cut with all that blocks keep in sight."""
    hand_out(joint, blocks)
    return cut(joint, inputs, **options)


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
    compiling = phase("capture", "compiling a graph")
    if options.backend != "torch":
        begin_triton()
    with not_collected(), _recorder.attempt(), capturing(False), compiling as made:
        regions.put_in_place(gm)
        made(gm)
        keep_captured(gm)
        stage = _recorder.graph("captured", gm)
        lower_torch_scans(gm, options)
        lower_scans(gm, options)
        blocks = outline(gm)
        compiler = functools.partial(
            _compile_graph, options=options, blocks=blocks, graphs=_cuda_graphs(options)
        )
        with outermost():
            run = through_autograd(
                gm,
                example_inputs,
                fw_compiler=functools.partial(compiler, direction="forward"),
                bw_compiler=functools.partial(compiler, direction="backward"),
                inference_compiler=functools.partial(compiler, direction="inference"),
                decompositions=decompositions(),
                partition_fn=functools.partial(_partition, blocks=blocks),
            )
        return _recorder.watched(stage, run)


def dynamo_backend(
    gm: fx.GraphModule, example_inputs: list[Any], **kwargs: Any
) -> Callable[..., Any]:
    """``torch.compile(model, backend="tttc")``: the same compiler through PyTorch's own door.

    ``mode`` and ``options={"backend": ..., "strict": ...}`` take what :func:`compile` takes.
    """
    given = dict(kwargs.get("options") or {})
    given |= of_mode(kwargs.get("mode"), given.get("tune"))
    try:
        options = Options(**given)
    except TypeError:
        known = ", ".join(Options.__dataclass_fields__)
        raise TypeError(f"options: expected some of {known}, got {', '.join(given)}") from None
    return compile_graph(gm, example_inputs, check_options(options))


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


def _dynamo(loops: Loops, backend: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """The model under TorchDynamo; its frames come from disk where that is asked for."""
    if asked() and not loops.any and not torch.compiler.is_exporting():
        warm = _warm(loops.target, backend, options)
        if warm is not None:
            return warm
    compiled: Callable[..., Any] = torch.compile(loops.target, backend=backend, dynamic=True)
    return compiled


def _warm(
    target: Callable[..., Any], backend: Callable[..., Any], options: Options
) -> Callable[..., Any] | None:
    """As ``torch.compile(..., dynamic=True)`` has it, but that frames may come from disk; None where they can't."""
    try:
        from tttc.warm.frames import WarmFrames, code_of  # on parts of PyTorch that it may move
    except (ImportError, AttributeError) as error:
        logging.getLogger("tttc.warm").info("not under PyTorch %s: %s", torch.__version__, error)
        return None
    code = code_of(target)
    if code is None:
        return None
    made = torch._TorchCompileWrapper(backend, None, None, True)
    context: Any = torch._dynamo.optimize(backend=made, dynamic=True)
    callback = getattr(context, "callback", None)
    convert = getattr(callback, "_torchdynamo_orig_backend", None)
    if callback is None or convert is None:
        return None  # TorchDynamo is switched off, or works in another way
    callback._torchdynamo_orig_backend = WarmFrames(convert, code, options)
    compiled: Callable[..., Any] = context(target)
    return compiled


def _compiled_call(target: Callable[..., Any], options: Options) -> Callable[..., Any]:
    backend = _shared_backend(options)
    if _recorder.recording():  # who looks on wants to see it compiled
        backend = functools.partial(compile_graph, options=options)
    loops = Loops(target)
    compiled = _dynamo(loops, backend, options)
    direct = DirectScans(options)
    # What ``config.patch`` does, but that takes as long as ten operators.
    patched = torch._dynamo.config._make_closure_patcher(
        # Under dynamic=True Dynamo makes symbols of floats (an eps, a base), can't keep them and starts over.
        specialize_float=True,
        recompile_limit=COMPILATIONS,
        accumulated_recompile_limit=8 * COMPILATIONS,
    )

    def refuse(error: NotLowerable) -> None:
        if options.strict:
            raise error
        warn_once(f"{error.reason}: it runs eagerly")
        _recorder.eager_site(error.where or "", 1, error.reason)

    first = True
    whole = regions.takes(target) and not loops.any

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal whole
        try:
            return run(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException:
            if not whole:
                raise
            whole = False  # there is more in a block than nodes: a graph break, say
            return run(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal first
        collecting, first = not_collected() if first else nullcontext(), False
        if loops.any:
            loops.prepare(args, kwargs, refuse, options.verify)
        # PyTorch takes regions for the same whatever torch.device or another mode is around them.
        once = regions.traced_once(whole and not torch._C._len_torch_function_stack())
        backend = _tracing.use_backend(direct)
        replaced = loops.replaced() if loops.any else nullcontext()
        with collecting, replaced, backend, capturing(True), once:
            restored = patched()
            try:
                return compiled(*args, **kwargs)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if isinstance(error.inner_exception, (NotLowerable, CheckError)):
                    raise error.inner_exception from None
                raise
            finally:
                restored()

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
    options = Options(backend, mini_batch_size, strict, verify, **of_mode(mode, tune))
    check_options(options)
    if isinstance(model, CompiledModule):
        return CompiledModule(model._tttc_module, options)
    if isinstance(model, nn.Module):
        return CompiledModule(model, options)
    return functools.wraps(model)(_compiled_call(model, options))
