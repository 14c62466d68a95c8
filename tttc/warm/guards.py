"""Guards of TorchDynamo, built once more in another process, on its own objects.

PyTorch can write guards to disk, but not those on what an object is (functions, classes, modules): it would leave them
out. Here what is written is which guards there were and how they read, with names for objects. Another process builds all of
them on what it finds in their places, which makes guards that hold there, and looks whether they read the same.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import dataclasses
import functools
import importlib
import logging
import re
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._dynamo import convert_frame
from torch._dynamo.guards import CheckFunctionManager, GuardBuilder
from torch._dynamo.output_graph import OutputGraphCommon, OutputGraphGuardsState
from torch._dynamo.source import GlobalSource
from torch._guards import Guard, GuardsSet, Source
from torch.utils import _pytree as pytree
from torch.utils._ordered_set import OrderedSet

from tttc.warm import recording
from tttc.warm.names import content, described, resolve
from tttc.warm.recording import NotKept

# Guards that say all they check when they are shown, or that are checked by what is kept of them.
KINDS = frozenset(
    """
    HASATTR NOT_PRESENT_IN_GENERIC_DICT TYPE_MATCH DICT_CONTAINS DICT_NOT_CONTAINS SET_CONTAINS SET_NOT_CONTAINS
    BOOL_MATCH NONE_MATCH NOT_NONE_MATCH ID_MATCH DUAL_LEVEL AUTOGRAD_SAVED_TENSORS_HOOKS EQUALS_MATCH CONSTANT_MATCH
    FUNCTION_MATCH CLASS_MATCH MODULE_MATCH CLOSURE_MATCH BUILTIN_MATCH SEQUENCE_LENGTH TUPLE_ITERATOR_LEN
    RANGE_ITERATOR_MATCH DUPLICATE_INPUT DICT_KEYS_MATCH EMPTY_NN_MODULE_HOOKS_DICT GRAD_MODE
    DETERMINISTIC_ALGORITHMS GLOBAL_STATE TORCH_FUNCTION_STATE DEFAULT_DEVICE SHAPE_ENV TENSOR_MATCH
    """.split()  # noqa: SIM905
)
GlobalState = torch._C._dynamo.guards.GlobalStateGuard
_nodes = re.compile(r"(___dict_version\(.*\.SUPPORTED_NODES\)) == \d+$")
BUILTINS = "__tttc_builtins"
_lock = threading.Lock()
_number = re.compile(r"0x[0-9a-f]{6,}|\d{6,}")


@dataclass
class Kept:
    """Guards as they are written.

    Attributes:
        guards: sources and kinds.
        state: what else they are made of, but for values.
        shapes: conditions on sizes.
        text: how they read.
        empty: dictionaries of hooks that were empty, which TorchDynamo takes for granted.
        imports: modules that are known under names of their own.
        scopes: globals of classes without a module, likewise.
    """

    guards: list[Guard]
    state: dict[str, Any]
    shapes: Any
    empty: list[str]
    imports: dict[str, str]
    scopes: dict[str, tuple[str, str]]
    text: list[str] = field(default_factory=list)


class _Builder(CheckFunctionManager):
    """PyTorch's, which also says which objects guards ask for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.asked: dict[int, Any] = {}
        self.kept: tuple[list[Guard], Any] | None = None
        super().__init__(*args, **kwargs)

    def id_ref(self, obj: object, obj_str: str) -> int:
        """The id of an object that has to be this one."""
        number = super().id_ref(obj, obj_str)
        self.asked.setdefault(number, obj)
        return number


_rebuilding = threading.local()


class _Filter(logging.Filter):
    """A guard that can't be made here is no error: the frame is compiled as if nothing had been kept."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to say it."""
        return not getattr(_rebuilding, "on", False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    _rebuilding.on = True
    try:
        yield
    finally:
        _rebuilding.on = False


def _known_nodes(found: re.Match[str]) -> str:
    """The classes that pytrees are made of: PyTorch guards on a number that changes when one is registered."""
    names = sorted(f"{x.__module__}.{x.__qualname__}" for x in pytree.SUPPORTED_NODES)
    return f"{found[1]} {', '.join(names)}"


class _Rebuilder(_Builder):
    """Builds guards in the order in which they were kept: of two that say the same only the first is made."""

    def build_guards(self, sorted_guards: Any, *args: Any, **rest: Any) -> Any:
        """As PyTorch's."""
        assert self.output_graph is not None
        kept = list(self.output_graph.guards)
        builder, manager = super().build_guards(kept, *args, **rest)
        equal = [g for g in kept if g.create_fn_name() in ("EQUALS_MATCH", "CONSTANT_MATCH")]
        self.values = [f"{g.name} is {content(builder.get(g))}" for g in equal]
        return builder, manager

    def text(self) -> list[str]:
        """The guards as they read, one a line, with objects by name instead of by a number of this process.

        And what values they want: the guards themselves show those by ``repr``, which may leave something out.
        """
        names = {str(number): described(obj) for number, obj in self.asked.items()}

        def shown(found: re.Match[str]) -> str:
            return "0x" if found[0].startswith("0x") else names.get(found[0], found[0])

        lines = str(self.guard_manager).splitlines()
        lines = [_nodes.sub(_known_nodes, _number.sub(shown, x)) for x in lines]
        return sorted([*lines, *self.values])


class _Recorder(_Builder):
    """In the place of PyTorch's while a frame is compiled: keeps the guards of the frame."""

    def build_guards(self, sorted_guards: Any, *args: Any, **rest: Any) -> Any:
        """With ``save_guards``, conditions on sizes are kept as text."""
        sources, code, graph, save = args
        watched = recording.current()
        if watched is not None:
            self.kept, save = (list(sorted_guards), graph), True
        return super().build_guards(sorted_guards, sources, code, graph, save, **rest)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        watched = recording.current()
        if watched is not None and self.kept is not None:
            with watched.kept():
                watched.guards = Captured(*self.kept, self)
        self.asked.clear()
        self.kept = None


def watch() -> None:
    """Have guards recorded where a recording is wanted."""
    with _lock:
        if convert_frame.CheckFunctionManager is not _Recorder:
            convert_frame.CheckFunctionManager = _Recorder  # type: ignore[misc]
            logging.getLogger("torch._guards").addFilter(_Filter())


class Captured:
    """What guards and their frame leave behind.

    Attributes:
        guards: as they are written.
        traced: the code that was traced.
        classes: those that guards ask for.
        scope: names among the globals.
    """

    def __init__(self, guards: list[Guard], graph: Any, builder: _Builder) -> None:
        state = graph.dump_guards_state()
        self.classes = [x for x in builder.asked.values() if isinstance(x, type)]
        self.scope = _Scope(graph, state.name_of_builtins_dict_key_in_fglobals, self.classes)
        rename = self.scope.rename
        if state.torch_function_mode_stack or state.functorch_layers or state.aotautograd_guards:
            raise NotKept("it runs under modes, transforms, or on inputs that overlap")
        if state.export or state.export_constraints or state.skip_guards_check:
            raise NotKept("it is exported")
        if getattr(graph, "torch_function_subclass_inlined", False):
            raise NotKept("it is given tensors of other classes")
        others = {g.create_fn_name() for g in guards} - KINDS
        if others:
            raise NotKept(f"it has guards of other kinds: {', '.join(sorted(others))}")
        self.guards = Kept(
            [_plain(g, rename) for g in guards],
            {
                "guard_on_key_order": {rename(x) for x in state.guard_on_key_order},
                "input_source_to_sizes_strides": {
                    rename(source): pytree.tree_map(_size, sizes)
                    for source, sizes in state.input_source_to_sizes_strides.items()
                },
                "dual_level": state.dual_level,
                "name_of_builtins_dict_key_in_fglobals": BUILTINS,
            },
            builder.shape_code_parts,
            [rename(g.originating_source).name for g in guards if _is_empty(g)],
            self.scope.imports,
            self.scope.scopes,
        )
        self.traced = list(graph.traced_code)


class _Scope:
    """Names that TorchDynamo has put among the globals of a frame, and names for them that are the same everywhere."""

    def __init__(self, graph: Any, builtins: str | None, classes: list[type]) -> None:
        self.imports = dict(graph.import_sources)
        self.scopes: dict[str, tuple[str, str]] = {}
        self.names: dict[str, str] = {}
        self._renamed: dict[Source, Source] = {}
        for hook in graph.cleanups:
            if hook.name == builtins:
                self.names[hook.name] = BUILTINS
            elif hook.name.startswith("___unnamed_scope"):
                module, qualname = _class_of(graph.global_scope[hook.name], classes)
                new = f"__tttc_scope_{module}_{qualname}".replace(".", "_")
                self.names[hook.name], self.scopes[new] = new, (module, qualname)
            elif not hook.name.startswith("__compiled_fn"):
                raise NotKept(f"it needs {hook.name}")

    def rename(self, source: Source) -> Source:
        """A source with the new names."""
        if source not in self._renamed:
            parts = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.init}  # type: ignore[arg-type]
            new = {k: self.rename(v) for k, v in parts.items() if isinstance(v, Source)}
            if isinstance(source, GlobalSource):
                new["global_name"] = self.names.get(source.global_name, source.global_name)  # type: ignore[assignment]
            changed = any(v is not parts[k] and v != parts[k] for k, v in new.items())
            self._renamed[source] = dataclasses.replace(source, **new) if changed else source  # type: ignore[type-var]
        return self._renamed[source]


def _class_of(scope: Any, classes: list[type]) -> tuple[str, str]:
    """The class with functions that have these globals and are in no module (a named tuple)."""
    for cls in classes:
        if getattr(cls.__new__, "__globals__", None) is scope:
            return cls.__module__, cls.__qualname__
    raise NotKept("it needs the globals of a function that has no module")


def install(kept: Kept, scope: dict[str, Any]) -> None:
    """Put among the globals of a frame what guards and code know under names of their own."""
    scope[BUILTINS] = vars(builtins)
    for name, (module, qualname) in kept.scopes.items():
        scope[name] = resolve(module, qualname).__new__.__globals__
    for name, module in kept.imports.items():
        scope[name] = importlib.import_module(module)


def _is_empty(guard: Guard) -> bool:
    return guard.create_fn_name() == "EMPTY_NN_MODULE_HOOKS_DICT"


def _size(x: Any) -> Any:
    """None for a size that is not the same in every call."""
    if isinstance(x, torch.SymInt):
        return x.node.maybe_as_int()
    return x


def _plain(guard: Guard, rename: Callable[[Source], Source]) -> Guard:
    """A guard without what it has found in this process."""
    create = guard.create_fn
    if isinstance(create, functools.partial):
        if create.func is GuardBuilder.TENSOR_MATCH:  # of a tensor that is found again
            create = create.func
        else:
            given = {k: _renamed(v, rename) for k, v in create.keywords.items()}
            create = functools.partial(
                create.func, *(_renamed(x, rename) for x in create.args), **given
            )
    return dataclasses.replace(
        guard,
        originating_source=rename(guard.originating_source),
        create_fn=create,
        guard_types=None,
        code_list=None,
        obj_weakref=None,
        guarded_class_weakref=None,
        stack=None,
        user_stack=None,
    )


def _renamed(x: Any, rename: Callable[[Source], Source]) -> Any:
    return rename(x) if isinstance(x, Source) else x


def rebuild(
    kept: Kept, code: types.CodeType, local: Any, scope: dict[str, Any]
) -> tuple[Any, list[str]]:
    """The same guards on what is in this process, and how they read.

    Args:
        code: of the frame.
        local: its variables.
        scope: its globals.

    Raises:
        NotKept: where they don't hold.
    """
    graph = OutputGraphCommon(
        OutputGraphGuardsState(
            local_scope=local,
            global_scope=scope,
            torch_function_mode_stack=[],
            functorch_layers=[],
            current_device=torch.utils._device.CURRENT_DEVICE,
            global_state_guard=GlobalState(),
            _guards=GuardsSet(OrderedSet(map(copy.copy, kept.guards))),
            _aotautograd_guards=[],
            skip_guards_check=True,  # here it is done below
            **kept.state,
        )
    )
    install(kept, scope)
    try:
        with _quiet():
            builder = _Rebuilder(code, graph, shape_code_parts=kept.shapes)
    except Exception as error:  # whatever is not where it was
        raise NotKept(f"guards can't be made: {error}") from None
    names = {"L": local, "G": scope}
    if not builder.guard_manager.check(local):
        raise NotKept("guards do not hold")
    if any(len(eval(name, names)) for name in kept.empty):
        raise NotKept("modules have hooks")
    return builder.guard_manager, builder.text()


def rebuilt(kept: Kept, code: types.CodeType, local: Any, scope: dict[str, Any]) -> Any:
    """Guards of this process that read like those that were kept.

    Raises:
        NotKept: where they don't hold, or others would hold.
    """
    manager, text = rebuild(kept, code, local, scope)
    if text != kept.text:
        other = sorted({*kept.text} - {*text})
        raise NotKept("guards read differently: " + (other[0].strip() if other else "more of them"))
    return manager
