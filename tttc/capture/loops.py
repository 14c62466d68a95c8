"""Loops over tokens in a user's model: found in its source, re-rolled when the model first runs.

The model is run once on tensors without values, as far as its loops need to know shapes; whatever is found there is
kept by the class or function that has the loop, so that equal layers share it.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tttc import _tracing
from tttc._within import within
from tttc.capture.iterations import NoTokens, whole_iterations
from tttc.capture.loop_source import LoopSource
from tttc.capture.places import Copier
from tttc.capture.plan import Plan, Planner
from tttc.capture.source import Rewritten
from tttc.ir.body import is_users
from tttc.ir.errors import NotLowerable
from tttc.scan import scan

EAGER, INLINE = -1, -2

Report = Callable[[NotLowerable], None]
_planning: contextvars.ContextVar[tuple[FakeTensorMode, Report, bool] | None] = (
    contextvars.ContextVar("tttc_planning", default=None)
)


class Site:
    """A loop of a program, and what became of it.

    Attributes:
        plans: what runs in its place, for the variables it was met with.
        short: how often it was looked at with too few iterations to say anything.
    """

    def __init__(self, source: LoopSource) -> None:
        self.source = source
        self.plans: list[Plan] = []
        self.refused: list[NotLowerable] = []
        self.short = 0
        self.tokens = True  # False once it is known not to run over tokens
        self.eagerly = torch._dynamo.disable(
            functools.partial(_run_whole, source.eager),
            reason="a loop over tokens that can't be re-rolled runs as it is",
        )

    def counted(self, sources: Sequence[Any]) -> tuple[int, int, int]:
        """The bounds of a loop over sequences of tensors."""
        return (0, min(len(x) for x in sources), 1)

    def choose(self, bounds: Any, values: Any) -> int:
        """Which plan holds for these variables; EAGER or INLINE where none does."""
        if not self.tokens or bounds[2] <= 0:
            return INLINE
        if whole_iterations(self.source, bounds, values) <= 1:
            if not torch.compiler.is_dynamo_compiling():
                self.short += _planning.get() is not None
            return INLINE
        found = self._find(bounds, values)
        if found == EAGER and not torch.compiler.is_dynamo_compiling():
            now = _planning.get()
            if now is not None:
                return self._plan(bounds, values, *now)
        return found

    def _find(self, bounds: Any, values: Any) -> int:
        for i, plan in enumerate(self.plans):
            if plan.fits(bounds, values):
                return i
        return EAGER

    def _plan(
        self, bounds: Any, values: Any, mode: FakeTensorMode, report: Report, verify: bool
    ) -> int:
        try:
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise NotLowerable(
                    "it runs under a transform of torch.func: give its tensors the dimensions of batch and heads, "
                    "and map inside it, over what it does with one token"
                )
            self.plans.append(Planner(self.source, bounds, values, mode, scan, verify).plan())
        except NoTokens:
            self.tokens = False
            return INLINE
        except NotLowerable as error:
            where = error.where or self.source.where
            refused = NotLowerable(
                f"the loop at {self.source.where} can't be re-rolled: {error.reason}", where
            )
            self.refused.append(refused)
            report(refused)
            raise _Stop from None
        return self._find(bounds, values)


class _Stop(Exception):
    """A loop that runs as it is: what comes after it can't be looked at without values."""


def _run_whole(function: Any, values: Any) -> Any:
    return function(*values)


_lock = threading.RLock()
_rewritten: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_classes: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


def rewritten(function: Any) -> types.FunctionType | None:
    """The function with its loops replaced; None where it has none over tokens. One for each function."""
    if not isinstance(function, types.FunctionType) or not is_users(function.__code__.co_filename):
        return None
    with _lock:
        if function not in _rewritten:
            found = Rewritten(function)
            made = None
            if found.loops:
                sites = [Site(loop) for loop in found.loops]
                made = found.with_sites(sites)
            _rewritten[function] = made
        return _rewritten[function]


def _with_loops(cls: type) -> type | None:
    """A class like ``cls`` whose methods have their loops replaced; None where it has no loops over tokens."""
    with _lock:
        if cls not in _classes:
            methods: dict[str, Any] = {}
            for owner in cls.__mro__:
                if owner.__module__.partition(".")[0] in ("torch", "tttc"):
                    continue
                for name, value in vars(owner).items():
                    if name not in methods:
                        methods[name] = rewritten(value)
            methods = {k: v for k, v in methods.items() if v is not None}
            _classes[cls] = None
            if methods:
                methods |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
                _classes[cls] = type(cls)(cls.__name__, (cls,), methods)
        return _classes[cls]


class Loops:
    """The loops of one model.

    Args:
        target: a module or a function.
    """

    def __init__(self, target: Callable[..., Any]) -> None:
        self.module = target if isinstance(target, nn.Module) else None
        function = None if self.module is not None else rewritten(target)
        self.target: Callable[..., Any] = target if function is None else function
        self.any = function is not None or bool(self._replacements())
        self.seen: list[Any] = []

    def _replacements(self) -> list[tuple[nn.Module, type]]:
        if self.module is None:
            return []
        found = []
        for module in self.module.modules():
            other = _with_loops(type(module))
            if other is not None:
                found.append((module, other))
        return found

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Within, the model's loops are what became of them: modules have other classes."""
        changed = self._replacements()
        before = [(m, type(m)) for m, _ in changed]
        for module, cls in changed:
            module.__class__ = cls
        try:
            yield
        finally:
            for module, old in before:
                module.__class__ = old

    def prepare(self, args: Any, kwargs: Any, report: Report, verify: bool = False) -> None:
        """Look at the loops of the model as these arguments reach them, if nothing like them was seen.

        Args:
            report: told of each loop that can't be re-rolled; what it raises goes to the caller.
            verify: compare what is written with the loop itself however long that takes.
        """
        signature = _signature(args, kwargs)
        if any(_alike(signature, known) for known in self.seen):
            return
        before, short = self._state(), self._short()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        copier = Copier(lambda path, x: x)
        with self.replaced():
            target = self.target if self.module is None else copier.copy(self.module, "self")
        fakes: dict[int, Any] = {}

        def fake(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) not in fakes:
                fakes[id(x)] = mode.from_tensor(x, static_shapes=True)
            return fakes[id(x)]

        args, kwargs = pytree.tree_map(fake, (args, kwargs))
        planning = within(_planning, (mode, report, verify))
        backend = _tracing.use_backend(_Abstract())
        try:
            with planning, mode, backend, torch.random.fork_rng(devices=[]):
                target(*args, **kwargs)
        except (_Stop, NotLowerable) as error:
            if isinstance(error, NotLowerable):
                raise
        except (
            Exception
        ) as error:  # whatever the model raises, it raises again where it is run for real
            logging.getLogger(__name__).info("the model does not run without values: %r", error)
        self._remember(signature, self._state() == before and self._short() == short)

    def _state(self) -> int:
        return sum(len(site.plans) + len(site.refused) for site in sites_of(self))

    def _short(self) -> int:
        return sum(site.short for site in sites_of(self))

    def _remember(self, signature: Any, nothing_new: bool) -> None:
        """Sizes with which nothing new was found may be any."""
        if nothing_new:
            for i, known in enumerate(self.seen):
                wider = _widened(signature, known)
                if wider is not None:
                    self.seen[i] = wider
                    return
        self.seen.append(signature)


def sites_of(loops: Loops) -> list[Site]:
    functions: list[Any] = [loops.target] if loops.module is None else []
    for _, cls in loops._replacements():
        functions += [f for f in vars(cls).values() if isinstance(f, types.FunctionType)]
    return [
        cell.cell_contents
        for f in functions
        for cell in f.__closure__ or ()
        if isinstance(cell.cell_contents, Site)
    ]


def _signature(args: Any, kwargs: Any) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described: list[Any] = []
    for x in leaves:
        if isinstance(x, torch.Tensor):
            described.append((x.dtype, x.device, x.requires_grad, tuple(x.shape)))
        elif isinstance(x, (int, float, bool, str, type(None))):
            described.append(x)
        else:
            described.append(id(x))
    return (str(spec), torch.is_grad_enabled(), described)


def _alike(new: Any, known: Any) -> bool:
    return new == known or _widened(new, known) == known


def _widened(new: Any, known: Any) -> Any:
    """``known`` with the sizes that differ from ``new`` free (None); None where more than sizes differ."""
    if new[:2] != known[:2] or len(new[2]) != len(known[2]):
        return None
    out = []
    for a, b in zip(new[2], known[2], strict=True):
        if not (isinstance(a, tuple) and isinstance(b, tuple)):
            if type(a) is not type(b) or a != b:
                return None
            out.append(b)
            continue
        if a[:3] != b[:3] or len(a[3]) != len(b[3]):
            return None
        shape = tuple(
            m if n == m else None if (m is None or m > 1) and n > 1 else -1
            for n, m in zip(a[3], b[3], strict=True)
        )
        if -1 in shape:
            return None
        out.append((*b[:3], shape))
    return (*known[:2], out)


class _Abstract:
    """Scans on tensors without values: shapes alone."""

    def takes(self, step: Any, structure: Any, mini_batch_size: int) -> bool:
        return structure is not None and _tracing.is_plain_function(step)

    def __call__(self, call: Any, mini_batch_size: int, place: int) -> list[torch.Tensor]:
        return torch.ops.tttc.scan(
            call.anchor, call.carry, call.tokens, call.shared, call.key, mini_batch_size, place
        )
