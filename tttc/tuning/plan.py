"""A plan: the schedules of all kernels of a loop; and what plans are told apart by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from tttc.codegen.crowding import Crowd, crowding
from tttc.codegen.devices import device_of
from tttc.codegen.heuristics import default_schedule
from tttc.codegen.loop import Loop
from tttc.codegen.schedule import Schedule
from tttc.codegen.stages import stages
from tttc.codegen.staging import WHOLE, Call, Split, forward_split
from tttc.ir.build import dims_of

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """The size class of a call, and what it runs on: what a plan is chosen for, beside the loop.

    Attributes:
        crowd: how full the device is of programs (:func:`tttc.codegen.crowding.crowding`).
        programs, mini_batches: their numbers of bits: powers of two share a plan.
        dtype: of the tokens.
        device: the call runs on.
        gluon: whether device and tokens are such that kernels for warpgroups may run.
    """

    crowd: Crowd = Crowd.ONE
    programs: int = 0
    mini_batches: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    gluon: bool = False


def setting_of(
    programs: int,
    mini_batches: int,
    dtype: torch.dtype,
    device: torch.device,
    gluon: bool = False,
) -> Setting:
    """The setting of a call of so many sequences times heads, and mini-batches."""
    crowd = crowding(programs, mini_batches, device)
    return Setting(crowd, programs.bit_length(), mini_batches.bit_length(), dtype, device, gluon)


def split_of(loop: Loop, setting: Setting, backward: bool = False) -> Split:
    """How rules split a loop; of the size class the smallest call counts."""
    if backward:
        return WHOLE  # as :func:`tttc.codegen.heuristics.backward_stages` says
    programs, mini_batches = (max(1 << n >> 1, 1) for n in (setting.programs, setting.mini_batches))
    call = Call(programs, mini_batches, device_of(setting.device), setting.dtype.itemsize)
    return forward_split(loop, call)


def by_rules(
    loop: Loop, setting: Setting, backward: bool = False, split: Split | None = None
) -> Plan:
    """The plan of a loop that no search has found one for; ``split``: of :func:`split_of`, where that is known."""
    how = split_of(loop, setting, backward) if split is None else split

    def chosen(part: Loop) -> Schedule:
        return default_schedule(part, setting.crowd, backward, setting.gluon, how)

    whole = chosen(loop)
    common = {"stages": whole.stages, "narrow": whole.narrow}
    chosen_of = [
        (part.name, whole if part is loop else chosen(part)) for part in stages(loop, whole.stages)
    ]
    return Plan(tuple((name, replace(its, **common)) for name, its in chosen_of))


@dataclass(frozen=True)
class Plan:
    """A schedule for each kernel of a loop, by the kernel's name, in the order they run."""

    schedules: tuple[tuple[str, Schedule], ...]

    @property
    def stages(self) -> int:
        """What the loop was asked to be split into."""
        return self.schedules[0][1].stages

    def schedule(self, loop: Loop) -> Schedule:
        """The schedule of one of the kernels."""
        return dict(self.schedules)[loop.name]

    def fits(self, loop: Loop) -> bool:
        """Whether it has a schedule for each kernel the loop is split into."""
        return [x.name for x in stages(loop, self.stages)] == [name for name, _ in self.schedules]

    def document(self) -> list[dict[str, Any]]:
        """The plan as JSON has it."""
        return [{"kernel": name, "schedule": s.choices()} for name, s in self.schedules]

    @classmethod
    def of(cls, document: Any, origin: str) -> Plan:
        """The plan in such a document.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(document, list) or not document:
            raise ValueError("plan: expected a list of kernels")
        return cls(tuple((_text(x), _schedule(x.get("schedule"), origin)) for x in document))


def _text(entry: Any) -> str:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("kernel"), str):
        raise ValueError("plan: expected the name of a kernel")
    return entry["kernel"]


def _schedule(choices: Any, origin: str) -> Schedule:
    """A schedule of JSON; every field must be there, of the type it has."""
    if not isinstance(choices, Mapping):
        raise ValueError("schedule: expected its choices")
    plain = Schedule().choices()
    if set(choices) != set(plain):
        raise ValueError(f"schedule: expected {', '.join(plain)}, got {', '.join(choices)}")
    for f in fields(Schedule):
        if f.name not in plain:
            continue
        given, like = choices[f.name], plain[f.name]
        right = type(given) is type(like) or (like is None and type(given) in (int, str))
        if not right:
            raise ValueError(f"schedule: {f.name} is {given!r}, unlike {like!r}")
        if type(given) is int and not 1 <= given <= 1 << 16:
            raise ValueError(f"schedule: {f.name} is {given!r}")
    return Schedule(**choices, origin=origin)


def digest(loop: Loop) -> str:
    """What a loop is, whatever its nodes are called: equal in every process."""
    number = {node: i for i, node in enumerate(loop.graph.nodes)}

    def plain(x: Any) -> Any:
        return ("node", number[x]) if isinstance(x, fx.Node) else x

    lines: list[Any] = [
        (loop.name, loop.mini_batch_size, loop.tokens, loop.refresh, loop.reverse, loop.parallel),
        (loop.once, loop.save, loop.interval, loop.store_state, sorted(loop.sizes.items())),
    ]
    for node in loop.graph.nodes:
        source = loop.sources.get(node)
        target = getattr(node.target, "__name__", str(node.target))
        if node.op == "placeholder":
            target = ""
        if node.op != "output":
            arguments = fx.node.map_aggregate(node.args, plain)
            lines.append((target, arguments, dims_of(node), source and (source.kind, source.name)))
    lines += [(number[node], sink.kind, sink.name) for node, sink in loop.sinks]
    return hashlib.sha256("\n".join(map(repr, lines)).encode()).hexdigest()
