"""What AOTAutograd puts around forward and backward graphs, made once more in another process.

AOTAutograd ends with a few calls that make, of compiled graphs and of what it has found out about them, the function that
TorchDynamo calls. Their arguments are kept, and the calls made again.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._functorch._aot_autograd import graph_compile
from torch._functorch._aot_autograd.runtime_wrappers import AOTDispatchAutograd, RuntimeWrapper

from tttc.warm import recording
from tttc.warm.recording import NotKept, Recording

# Of what AOTDispatchAutograd.post_compile takes: made anew, or not needed once graphs are compiled.
_MADE = ("compiled_fw_func", "compiled_bw_func")
_LEFT = ("lazy_backward_info", "bw_compiler", "try_save_cache_entry", "aot_config", "fw_metadata")
_lock = threading.Lock()
_watched = False
_autograd = AOTDispatchAutograd.post_compile
_inference = RuntimeWrapper.post_compile
_around = graph_compile.post_compile


@dataclass
class Kept:
    """The arguments of the last calls of AOTAutograd.

    Attributes:
        config: its configuration.
        metadata: what it knows of inputs, outputs and what is saved.
        wrapper: of a graph that needs no gradients; None with a backward.
        given: of one that does.
    """

    config: Any
    metadata: Any
    wrapper: Any = None
    given: dict[str, Any] = dataclasses.field(default_factory=dict)


def watch() -> None:
    """Have the last calls of AOTAutograd recorded where a recording is wanted."""
    global _watched
    with _lock:
        if not _watched:
            AOTDispatchAutograd.post_compile = staticmethod(_record_autograd)  # type: ignore[method-assign]
            RuntimeWrapper.post_compile = _record_inference  # type: ignore[method-assign,assignment]
            graph_compile.post_compile = _record_around
            _watched = True


def _arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """What ``AOTDispatchAutograd.post_compile`` is given by name: one object with everything, or everything."""
    if len(args) == 1 and dataclasses.is_dataclass(args[0]):
        return {f.name: getattr(args[0], f.name) for f in dataclasses.fields(args[0])}
    names = _autograd.__code__.co_varnames
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _outermost() -> Recording | None:
    """The recording, while the whole graph goes through AOTAutograd."""
    watched = recording.current()
    return watched if watched is not None and watched.outermost else None


def _record_autograd(*args: Any, **kwargs: Any) -> Any:
    watched = _outermost()
    if watched is not None:
        with watched.kept():
            given = _arguments(*args, **kwargs)
            metadata = _check(given["fw_metadata"])
            if given["maybe_subclass_meta"] is not None or given["backward_state_indices"]:
                raise NotKept("it has tensors of other classes, or hooks in its backward")
            if given["compiled_bw_func"] is None:
                raise NotKept("its backward is compiled when it is first run")
            rest = {k: v for k, v in given.items() if k not in (*_MADE, *_LEFT)}
            watched.autograd = Kept(_plain(given["aot_config"]), metadata, given=rest)
    return _autograd(*args, **kwargs)


def _record_inference(
    self: Any, compiled: Any, aot_config: Any, *, runtime_metadata: Any, **rest: Any
) -> Any:
    watched = _outermost()
    if watched is not None and not self.trace_joint:
        with watched.kept():
            metadata = _check(runtime_metadata)
            watched.autograd = Kept(_plain(aot_config), metadata, wrapper=self)
    return _inference(self, compiled, aot_config, runtime_metadata=runtime_metadata, **rest)


def _record_around(wrappers: Any, *args: Any, **kwargs: Any) -> Any:
    watched = _outermost()
    if watched is not None and any(
        w.needs_post_compile or getattr(w, "old_input_metadata", None) for w in wrappers
    ):
        watched.refuse("its arguments overlap")
    return _around(wrappers, *args, **kwargs)


def _check(metadata: Any) -> Any:
    """Raise where AOTAutograd's wrappers around a single graph do something."""
    if metadata.tokens or metadata.num_backward_tokens:
        raise NotKept("it has effects")
    if metadata.is_rng_op_functionalized or metadata.num_graphsafe_rng_states:
        raise NotKept("it draws random numbers by a state of its own")
    return metadata


def _plain(config: Any) -> Any:
    """A configuration without functions."""
    left = ("fw_compiler", "bw_compiler", "inference_compiler", "partition_fn", "cache_info")
    return dataclasses.replace(config, **dict.fromkeys(left), decompositions={})


def assembled(kept: Kept, graphs: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function that TorchDynamo's code calls.

    Args:
        graphs: the graphs as functions: "inference", or "forward" and "backward".
    """
    run: Callable[..., Any]
    if kept.wrapper is not None:
        run = _inference(
            kept.wrapper,
            make_boxed_func(graphs["inference"]),
            kept.config,
            runtime_metadata=kept.metadata,
        )
    else:
        backward = torch._dynamo.disable(
            make_boxed_func(graphs["backward"]), reason="compiled by tttc"
        )
        given = {
            **dict.fromkeys(_LEFT),
            **kept.given,
            "compiled_fw_func": make_boxed_func(graphs["forward"]),
            "compiled_bw_func": backward,
            "aot_config": kept.config,
            "fw_metadata": kept.metadata,
        }
        run = _autograd(**_taken(given))

    def call(*args: Any) -> Any:
        return run(list(args))

    return call


def _taken(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments as ``AOTDispatchAutograd.post_compile`` takes them in this version of PyTorch."""
    code = _autograd.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if len(names) > 1:
        return {k: v for k, v in given.items() if k in names}
    from torch._functorch._aot_autograd.runtime_wrappers import AOTDispatchAutogradCompileSpec

    return {names[0]: AOTDispatchAutogradCompileSpec(**given)}
