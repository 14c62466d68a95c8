"""Rendering a :class:`~tttc.codegen.loop.Loop` as a Triton kernel a person can read."""

from __future__ import annotations

from torch import fx
from tttc.codegen.ordering import least_live, on_demand, products_first
from tttc.codegen.together import MOST, Group, function, groups_of, in_order
from tttc.codegen.triton_functions import RECIPROCAL
from tttc.codegen.triton_operators import Operators
from tttc.codegen.triton_solve import INVERSE
from tttc.codegen.triton_tiles import Tile, base

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of
from tttc.ir.build import dims_of
from tttc.ir.spec import Dims


class Renderer(Operators):
    """Renders one loop under one schedule."""

    lines: list[str]
    indent: int

    def render(self) -> str:
        """The source of the kernel."""
        loop = self.loop
        self._declare_arguments()
        body_start = len(self.lines)
        self._prologue()
        self._invariants()
        if loop.parallel:
            group = self.schedule.group
            self.write(f"start = tl.program_id(1) * {group}")
        if self.schedule.prefetch:
            start = "start" if loop.parallel else ("N - 1" if loop.reverse else "0")
            self.write(f"following = {start}")
            self._prefetch()
        if loop.parallel:
            self.write(f"for n in tl.range(start, tl.minimum(start + {group}, N)):")
        elif loop.reverse:
            self.write("for step in tl.range(0, N):")
            self.write("    n = N - 1 - step")
        else:
            self.write("for n in tl.range(0, N):")
        self.indent += 1
        self._mini_batch()
        self.indent -= 1
        self._epilogue()
        self.body = self.lines[body_start:]
        self.lines = []
        self.indent = 0
        self._header()
        return "\n".join([*self.lines, *self.body]) + "\n"

    def _header(self) -> None:
        loop = self.loop
        what = (
            "in parallel"
            if loop.parallel
            else ("backwards" if loop.reverse else "one after another")
        )
        unit = f"mini-batches of {loop.mini_batch_size} tokens" if loop.tokens else "tokens"
        self.write(f'"""{loop.name}: one program a batch and head; {unit} {what}."""')
        self.write()
        self.write("import triton")
        self.write("import triton.language as tl")
        self.write()
        self.write()
        if any("reciprocal(" in line for line in self.body):
            self.lines += RECIPROCAL.splitlines()
        for count in range(2, MOST + 1):
            if any(f" = sums_{count}(" in line for line in self.body):
                self.lines += function(count).splitlines()
        if any("unit_triangular_inverse(" in line for line in self.body):
            self.lines += INVERSE.splitlines()
        self.write("@triton.jit")
        self.write(f"def {loop.name}(")
        for name in self.arguments:
            self.write(f"    {', '.join([name, *self._strides_of(name)])},")
        extra = ["T", "H"] + (["place"] if loop.refresh else [])
        self.write(f"    {', '.join(extra)},")
        self.write("    " + " ".join(f"{name}: tl.constexpr," for name in self.constants))
        self.write("):")

    def _strides_of(self, name: str) -> list[str]:
        """The arguments that are strides of a tensor."""
        return [
            f"{name}_s{i}" for i in range(0 if name in self.values else len(self.strides[name]))
        ]

    def _pointer(self, tensor: str, *axes: tuple[str, str]) -> None:
        terms = " + ".join(f"{value} * {self.stride(tensor, axis)}" for value, axis in axes)
        self.write(f"{tensor}_ptr = {tensor} + {terms}")

    def _prologue(self) -> None:
        loop = self.loop
        self.write("head = (tl.program_id(0) % H).to(tl.int64)")
        self.write("sequence = (tl.program_id(0) // H).to(tl.int64)")
        self.write(f"N = tl.cdiv(T, {loop.mini_batch_size})" if loop.tokens else "N = T")
        for d in self.dims:
            self.write(f"{d} = tl.arange(0, {self.side(d)})")
            if self.ragged(d):
                self.write(f"in_{d} = {d} < {self.size(d)}")
        self._pointers()

    def _pointers(self) -> None:
        """Where the arguments of this program start."""
        for tensor, axes in sorted(
            self.strides.items(), key=lambda x: self.loop.piece(x[0]) is not None
        ):
            if piece := self.loop.piece(tensor):
                step = f"{piece.offset} * {self.stride(tensor, piece.dim)}"
                self.write(f"{tensor}_ptr = {piece.of}_ptr + {step}")
                continue
            at = [("sequence", "B"), ("head", "H")]
            if tensor.startswith("new_") or "B" in axes:
                self._pointer(tensor, *at)
            elif "H" in axes:
                self._pointer(tensor, ("head", "H"))
            else:
                self.write(f"{tensor}_ptr = {tensor}")

    def _invariants(self) -> None:
        """What does not change from mini-batch to mini-batch: parameters, states to start from."""
        states = self._state_dims() if not self.loop.parallel else {}
        for node, source in self.loop.sources.items():
            if source.kind in ("held", "shared", "constant") and node in self.used:
                tile = self.load(source.name, f"{source.name}_ptr", dims_of(node), None)
                self.tiles[node] = self._named(tile, source.name + "_v")
        for name, dims in states.items():
            tile = self.load(name, f"{name}_ptr", dims, None)
            if name in self.repeated:
                target = self.repeated[name]
                shape = ", ".join(str(self.side(d)) for d in target)
                value = f"{self.line_up(tile, target)} + tl.zeros(({shape},), tl.float32)"
                tile = self.let("x", value, target)
            self._named(tile, name + "_v")
        for node, source in self.loop.sources.items():
            if source.kind == "state" and source.name in states:
                dims = self._tile_dims(node)
                zero = frozenset(d for d in dims if self.ragged(d))
                self.tiles[node] = Tile(source.name + "_v", dims, zero)
        for node, sink in self.loop.sinks:
            if sink.kind == "sum":
                self.write(f"{sink.name}_v = {self.zeros(self.order(dims_of(node)))}")
        self.invariant = set(self.tiles)
        for node in self.loop.graph.nodes:
            if node.op != "call_function" or node not in self.used or self._deferred(node):
                continue
            inputs = node.all_input_nodes
            fixed = [x for x in inputs if x in self.invariant and not self._changes(x)]
            if inputs and len(fixed) == len(inputs):
                self.emit(node)
                self.invariant.add(node)

    def _changes(self, node: fx.Node) -> bool:
        source = self.loop.sources.get(node)
        return source is not None and source.kind in ("state", "token", "saved", "value")

    def _named(self, tile: Tile, name: str) -> Tile:
        self.write(f"{name} = {tile.name}")
        return Tile(name, tile.dims, tile.zero)

    def _indices(self, n: str, suffix: str = "") -> None:
        """Where the tokens of mini-batch ``n`` lie; ``suffix`` tells its variables from those of another."""
        b = self.loop.mini_batch_size
        if not self.loop.tokens:
            self.write(f"last{suffix} = {n}")
            return
        self.write(f"first{suffix} = {n} * {b}")
        self.write(f"count{suffix} = tl.minimum(T - first{suffix}, {b})")
        self.write(f"last{suffix} = first{suffix} + count{suffix} - 1")
        token = TOKEN if TOKEN in self.dims else next(d for d in self.dims if base(d) == TOKEN)
        # Rows beyond the sequence repeat its last token: finite where that is, and never counted.
        row = f"tl.minimum(first{suffix} + {token}, last{suffix})"
        self.write(f"rows{suffix} = tl.cast({row}, tl.int64)")

    def _within(self) -> None:
        """Which rows of a tile lie within the sequence."""
        for start in (TOKEN, EARLIER) if self.loop.tokens else ():
            names = [d for d in self.dims if base(d) == start]
            if names:
                self.write(f"in_{start} = {names[0]} < count")

    def _fetched(self) -> list[fx.Node]:
        """What is loaded for every mini-batch: arguments, and the last tokens of some."""
        found = [
            node
            for node, source in self.loop.sources.items()
            if node in self.used
            and (
                source.kind in ("saved", "value") or (source.kind == "token" and self._whole(node))
            )
        ]
        return found + [
            n for n in self.loop.graph.nodes if n in self.used and self._of_last_token(n)
        ]

    def _of_last_token(self, node: fx.Node) -> bool:
        if node.target is not ops.last:
            return False
        source = self.loop.sources.get(operands_of(node)[0])  # type: ignore[arg-type]
        return source is not None and source.kind == "token"

    def _prefetch(self) -> None:
        """Load what the mini-batch ``following`` reads, as it is stored, for the next turn of the loop."""
        self._indices("following", "_f")
        for i, node in enumerate(self._fetched()):
            raw = self.fetch(*self._place(node, "following", "_f"))
            self.write(f"next_{i} = {raw}")

    def _arrived(self) -> None:
        """What the turn before has loaded for this one."""
        for i, node in enumerate(self._fetched()):
            _, _, dims, _ = self._place(node, "n", "")
            name = self.fresh("x")
            self.write(f"{name} = next_{i}.to(tl.float32)")
            memory = self.memory(dims)
            ragged = frozenset(d for d in memory if self.ragged(d))
            self.tiles[node] = self.sorted_tile(name, memory, ragged)
        # One mini-batch too far is the last one again.
        after = (
            "tl.maximum(n - 1, 0)"
            if self.loop.reverse and not self.loop.parallel
            else "tl.minimum(n + 1, N - 1)"
        )
        self.write(f"following = {after}")
        self._prefetch()

    def _place(self, node: fx.Node, n: str, suffix: str) -> tuple[str, str, Dims, str | None]:
        """Tensor, pointer, dimensions and rows of what a node loads for mini-batch ``n``."""
        source = self.loop.sources.get(node)
        if source is None:
            (token,) = operands_of(node)
            name = self.loop.sources[token].name
            pointer = f"{name}_ptr + tl.cast(last{suffix}, tl.int64) * {self.stride(name, 'T')}"
            return name, pointer, dims_of(node), None
        if source.kind in ("saved", "value"):
            name = f"saved_{source.name}" if source.kind == "saved" else source.name
            pointer = f"{name}_ptr + tl.cast({n}, tl.int64) * {self.stride(name, 'N')}"
            return name, pointer, dims_of(node), None
        if self.loop.tokens:
            return source.name, f"{source.name}_ptr", dims_of(node), f"rows{suffix}"
        pointer = f"{source.name}_ptr + tl.cast({n}, tl.int64) * {self.stride(source.name, 'T')}"
        return source.name, pointer, dims_of(node), None

    def _mini_batch(self) -> None:
        """One turn of the loop."""
        loop = self.loop
        self._indices("n")
        self._within()
        if loop.refresh and any(name.startswith("anchor") for name in self._state_dims()):
            pairs = [
                (n, n.replace("anchor", "carry"))
                for n in self._state_dims()
                if n.startswith("anchor")
            ]
            if loop.refresh == 1:
                for a, c in pairs:
                    self.write(f"{a}_v = {c}_v")
            else:
                self.write(f"if (place + n) % {loop.refresh} == 0:")
                for a, c in pairs:
                    self.write(f"    {a}_v = {c}_v")
        self._save_states()
        fetched = self._fetched()
        for node in fetched:
            self.tiles.pop(node, None)
        if self.schedule.prefetch:
            self._arrived()
        elif not self.schedule.late_loads:
            for node in fetched:
                self._load(node)
        for these in self._together(self._sequence()):
            nodes = these if isinstance(these, tuple) else (these,)
            for x in (x for node in nodes for x in (*node.all_input_nodes, node)):
                if x in fetched and x not in self.tiles:
                    self._load(x)
            if isinstance(these, tuple):
                self.emit_together(these)
            elif these not in fetched and not self._deferred(these):
                self.emit(these)
            for node in nodes:
                if node in self.tiles:
                    self._keep(node)
        for node in self.results:
            if node in fetched and node not in self.tiles:
                self._load(node)
            if node in self.loop.sources or node in self.invariant:
                self._keep(node)
        self._renew()

    def _save_states(self) -> None:
        """Store the states that this mini-batch starts from, where it is one of those before which they are."""
        loop, at = self.loop, "n"
        if loop.save and loop.interval > 1:
            self.write(f"if n % {loop.interval} == 0:")
            self.indent += 1
            at = f"n // {loop.interval}"
        for name in loop.save:
            tensor = f"saved_{name}"
            pointer = f"{tensor}_ptr + tl.cast({at}, tl.int64) * {self.stride(tensor, 'N')}"
            self.store(tensor, pointer, self._state_tile(name, self._state_dims()[name]), None)
        if loop.save and loop.interval > 1:
            self.indent -= 1

    def _sequence(self) -> list[fx.Node]:
        """The operators of a mini-batch in the order they are computed."""
        nodes = [
            n
            for n in self.loop.graph.nodes
            if n.op == "call_function" and n in self.used and n not in self.invariant
        ]
        if self.schedule.order == "graph":
            return nodes
        if self.schedule.order == "products_first":
            return products_first(nodes)
        if self.schedule.order == "on_demand":
            results = [n for n, _ in self.loop.sinks]
            return on_demand(
                nodes, results, lambda n: len(dims_of(n)) < 2, self._updates_last(nodes)
            )
        held = {n for n, _ in self.loop.sinks} | self.invariant
        return least_live(nodes, self._on_chip, held, self._updates_last(nodes))

    def _together(self, nodes: list[fx.Node]) -> list[fx.Node | Group]:
        """The operators of a mini-batch, sums that are made together as one."""
        return in_order(nodes, groups_of(nodes, self.sum_kind))

    def _updates_last(self, nodes: list[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
        """New states wait for those who read the old ones, unless these need the new ones."""
        position = {n: i for i, n in enumerate(nodes)}
        needs: dict[fx.Node, set[fx.Node]] = {}
        for node in nodes:
            inputs = [x for x in node.all_input_nodes if x in position]
            needs[node] = set(inputs).union(*(needs[x] for x in inputs))
        waits: dict[fx.Node, set[fx.Node]] = {}
        for new, sink in self.loop.sinks:
            if sink.kind != "state" or new not in position:
                continue
            old = [
                n for n, s in self.loop.sources.items() if s.kind == "state" and s.name == sink.name
            ]
            readers = {u for n in old for u in n.users if u in position and u is not new}
            waits[new] = {u for u in readers if new not in needs[u]}
        # Waiting must not close a circle: of two states that wait for each other the later one waits.
        for new in sorted(waits, key=position.__getitem__):
            waits[new] = {u for u in waits[new] if position[u] < position[new] or not any(
                other in needs[u] for other in waits if other is not new
            )}  # fmt: skip
        return waits

    def _on_chip(self, node: fx.Node) -> int:
        count = 1
        for d in dims_of(node):
            count *= self.side(d)
        return 0 if node.target is ops.rename or node in self.invariant else count

    def _load(self, node: fx.Node) -> None:
        self.tiles[node] = self.load(*self._place(node, "n", ""))

    def _whole(self, node: fx.Node) -> bool:
        """Whether a token argument is needed for all tokens, not only for the last."""
        return any(u in self.used and u.target is not ops.last for u in node.users) or any(
            n is node for n, _ in self.loop.sinks
        )

    def _keep(self, node: fx.Node) -> None:
        """Store what a node goes to, but for new states, as soon as it is made: it need not stay on chip."""
        for sink in self.results.get(node, ()):
            tile = self.tiles[node]
            if sink.kind == "sum":
                self.write(f"{sink.name}_v += {tile.name}")
                continue
            pointer, rows = f"{sink.name}_ptr", None
            if sink.kind == "value":
                pointer += f" + tl.cast(n, tl.int64) * {self.stride(sink.name, 'N')}"
            elif self.loop.tokens:
                rows = "rows"
            else:
                pointer += f" + tl.cast(n, tl.int64) * {self.stride(sink.name, 'T')}"
            self.store(sink.name, pointer, tile, rows)

    def _renew(self) -> None:
        """The states take their new values, all at once.

        Beyond the sizes they stay zero: what is made there of a norm would grow without bound, and leave the numbers.
        """
        renewed = []
        for node, sink in self.loop.sinks:
            if sink.kind == "state":
                tile = self.tile(node)
                tile = self.cleared(tile, tuple(d for d in tile.dims if self.ragged(d)))
                renewed.append((f"{sink.name}_v", self.line_up(tile, self.order(tile.dims))))
        for target, value in renewed:
            if target != value:
                self.write(f"{target} = {value}")

    def _epilogue(self) -> None:
        loop = self.loop
        for name, dims in self.stored_states().items():
            self.store(f"new_{name}", f"new_{name}_ptr", self._state_tile(name, dims), None)
        for node, sink in loop.sinks:
            if sink.kind == "sum":
                tile = self._sum_tile(node, sink.name)
                pointer = f"{sink.name}_ptr"
                if loop.parallel:
                    pointer += f" + tl.program_id(1).to(tl.int64) * {self.stride(sink.name, 'N')}"
                self.store(sink.name, pointer, tile, None)

    def _sum_tile(self, node: fx.Node, name: str) -> Tile:
        """What is added up over the mini-batches of a program."""
        return Tile(f"{name}_v", self.order(dims_of(node)))
