"""Rendering a :class:`~tttc.codegen.loop.Loop` so that each warp holds a piece of its widest dimension.

A mini-batch of 16 tokens is too few for warpgroups, and products of few tokens by many features keep no warp busy for
long: what takes time is that warps wait for each other. Here a warp has its own piece of the widest dimension, of the
state too, which stays in the accumulators of its matrix unit. Products that keep the dimension need no other warp; those
that sum over it leave each warp with a part, and the parts are added up as late as possible::

    z[w t j] = x[t i] W[i w j];  y[t i] = sum over w of (f(z)[w t j] V[w j i])

Values without the dimension are spread over all threads, rows within a warp. Written in Gluon, for its layouts.

Source: the accumulators of ``mma.m16n8k16`` are laid out as its operands are (PTX ISA), so that products follow each
other in registers.
"""

from __future__ import annotations

import re
from typing import Any

from torch import fx
from tttc.codegen.gluon_copies import START_COPY
from tttc.codegen.loop import Loop
from tttc.codegen.ordering import on_demand, products_first
from tttc.codegen.schedule import Schedule
from tttc.codegen.triton_functions import FUNCTIONS
from tttc.codegen.triton_tiles import Tile, base
from tttc.codegen.warp_tiles import Share, WarpTiles

from tttc.ir import ops
from tttc.ir.body import EARLIER, TOKEN, operands_of, spec_of
from tttc.ir.build import ancestors, dims_of
from tttc.ir.errors import NotLowerable
from tttc.ir.spec import Dims, parse, parse_relation

ARRIVED = 5  # products after which what is loaded at the start of a turn is there

OF_ALL = """

@gluon.jit
def of_all(x, shape: gl.constexpr, layout: gl.constexpr):
    \"\"\"A matrix that all warps have.\"\"\"
    everywhere = gl.full(shape, 0, x.dtype, layout)
    made, _ = gl.broadcast(gl.expand_dims(x, 0), everywhere)
    return made
"""


class WarpRenderer(WarpTiles):
    """Renders one loop for warps that each hold a piece."""

    lines: list[str]
    indent: int
    tiles: dict[fx.Node, Tile]
    exact = False  # whether what is not finite is kept from tokens that do not see it

    def render(self) -> str:
        """The source of the kernel."""
        self._declare_arguments()
        self._prologue()
        self._parameters()
        self._turns()
        if self.schedule.nan == "again":
            total = " + ".join(self._total(name, dims) for name, dims in self._state_dims().items())
            self.write(f"if {total} != 0.0:  # once more, with care for what is not finite")
            self.indent += 1
            self.exact = True
            self._turns()
            self.indent -= 1
        self._epilogue()
        self.body, self.lines, self.indent = self.lines, [], 0
        self._header()
        return "\n".join([*self.lines, *self.body]) + "\n"

    def _total(self, name: str, dims: Dims) -> str:
        """A sum that is zero where all of a state is finite."""
        value = f"{name}_v * 0.0"
        for axis in reversed(range(len(dims) + self.spread(dims))):
            value = f"gl.sum({value}, {axis})"
        return value

    def _header(self) -> None:
        super()._header()
        start = self.lines.index("import triton")
        self.lines[start : start + 2] = [
            "from triton.experimental import gluon",
            "from triton.experimental.gluon import language as gl",
            "from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2",
            "",
            *self.layouts.lines(),
            *OF_ALL.splitlines(),
            *START_COPY.splitlines(),
        ]
        self.lines = [_in_gluon(line) for line in self.lines]
        self.body = [_in_gluon(line) for line in self.body]

    def _prologue(self) -> None:
        self.write("head = (gl.program_id(0) % H).to(gl.int64)")
        self.write("sequence = (gl.program_id(0) // H).to(gl.int64)")
        self.write(f"N = gl.cdiv(T, {self.loop.mini_batch_size})")
        self._pointers()

    # -- arguments ----------------------------------------------------------------------------------------

    def _place_in(self, tensor: str, dims: Dims, first: str, layout: str = "") -> str:
        """The offsets of a tile of arguments; ``first``: the first token, where it has tokens."""
        parts = []
        for d in dims:
            place = self._index(d, dims, layout)
            if base(d) in (TOKEN, EARLIER):
                place = f"({first} + gl.minimum({place}, T - 1 - {first})).to(gl.int64)"
                parts.append(f"{place} * {self.stride(tensor, 'T')}")
            else:
                parts.append(f"{place} * {self.stride(tensor, d)}")
        return " + ".join(parts)

    def _index(self, dim: str, dims: Dims, layout: str) -> str:
        """Indices along a dimension of an argument, in a layout or that of tiles over ``dims``."""
        if layout:
            part = self.layouts.slice(layout, 1 - dims.index(dim)) if len(dims) == 2 else layout
            places = f"gl.arange(0, {self.side(dim)}, layout={part})"
            return places + self.index((dim,), dims)
        if dim != self.wide:
            return self.places(dim, dims)
        product = self.layouts.product()
        if len(dims) == 1:
            whole = self.layouts.slice(product, 1)
            warp, own = self.layouts.slice(whole, 1), self.layouts.slice(whole, 0)
            axes = [[1], [0]]
        else:
            gone = 2 - dims.index(dim)
            part = self.layouts.slice(product, gone)
            warp, own = self.layouts.slice(part, 1), self.layouts.slice(part, 0)
            axes = [[1, gone], [0, gone]]
        size = self.piece(dim)
        first = self.expanded(f"gl.arange(0, {self.warps}, layout={warp})", axes[0])
        within = self.expanded(f"gl.arange(0, {size}, layout={own})", axes[1])
        return f"({first} * {size} + {within})"

    def load(self, tensor: str, pointer: str, dims: Dims, rows: str | None) -> Share:
        """Load an argument without tokens."""
        ordered = self.order(dims)
        offset = self._place_in(tensor, ordered, "0")
        address = f"{pointer} + {offset}" if offset else pointer
        return self.let("x", f"gl.load({address}).to(gl.float32)", ordered)

    def store(self, tensor: str, pointer: str, tile: Tile, rows: str | None) -> None:
        """Store a tile; rows of tokens beyond the sequence are left out."""
        share = self.share(tile)
        name = self.line_up(share, share.dims) if share.dims else share.name
        offset = self._place_in(tensor, share.dims, "first")
        address = f"{pointer} + {offset}" if offset else pointer
        value = f"{name}.to({self.argument(tensor)}.dtype.element_ty)"
        tokens = tuple(d for d in share.dims if base(d) in (TOKEN, EARLIER))
        condition = f", mask={self.mask(tokens, share.dims)}" if tokens else ""
        if self.wide in share.dims and tokens:
            raise NotLowerable("results with the dimension that warps share have no form yet")
        self.write(f"gl.store({address}, {value}{condition})")

    def _state_tile(self, name: str, dims: Dims) -> Share:
        return Share(
            f"{name}_v",
            self.order(dims),
            frozenset(),
            self.natural(self.order(dims)),
            self.spread(dims),
        )

    def _parameters(self) -> None:
        """What does not change, and room in shared memory."""
        for node, source in self.loop.sources.items():
            if source.kind == "shared" and node in self.used:
                tile = self.load(source.name, f"{source.name}_ptr", dims_of(node), None)
                self.write(f"{source.name}_v = {tile.name}")
                tile.name = f"{source.name}_v"
                self.tiles[node] = tile
        for node in self._matrices():
            memory = self._memory(node)
            rows, columns = (self.side(d) for d in memory)
            layout = self.layouts.shared(columns, False)
            self.write(
                f"{self._room(node)} = gl.allocate_shared_memory(DOT, [2, {rows}, {columns}], {layout})"
            )
        for node in self._vectors():
            size, numbers = self.side(dims_of(node)[0]), self.layouts.numbers()
            self.write(
                f"{self._room(node)} = gl.allocate_shared_memory(gl.float32, [2, {size}], {numbers})"
            )
        self.copied = {}
        for node, source in self.loop.sources.items():
            if source.kind != "state":
                continue
            dims = self.order(dims_of(node))
            if len(dims) == 2 and any(self._turns_state(u, dims) for u in node.users):
                name = self.copied[source.name] = f"{source.name}_s"
                layout = self.layouts.shared(self.piece(dims[1]), True)
                self.write(
                    f"{name} = gl.allocate_shared_memory(DOT, {self.shape(dims, True)}, {layout})"
                )
        self.invariant = set(self.tiles)

    def _turns_state(self, user: fx.Node, dims: Dims) -> bool:
        """Whether a product sums over the rows of a state, so that it is read from shared memory."""
        labels = self._dot_labels(user) if user in self.used else None
        return labels is not None and labels[2] == dims[0]

    def _matrices(self) -> list[fx.Node]:
        return [n for n in self._fetched() if len(dims_of(n)) == 2]

    def _vectors(self) -> list[fx.Node]:
        return [n for n in self._fetched() if len(dims_of(n)) == 1]

    def _memory(self, node: fx.Node) -> Dims:
        return self.order(dims_of(node))

    def _room(self, node: fx.Node) -> str:
        return f"{self.loop.sources[node].name}_here"

    # -- a turn of the loop -------------------------------------------------------------------------------

    def _turns(self) -> None:
        """All mini-batches, from the states to start from."""
        self.tiles = {n: t for n, t in self.tiles.items() if n in self.invariant}
        for name, dims in self._state_dims().items():
            tile = self.load(name, f"{name}_ptr", dims, None)
            self.write(f"{name}_v = {tile.name}")
        for node, source in self.loop.sources.items():
            if source.kind == "state":
                self.tiles[node] = self._state_tile(source.name, dims_of(node))
        self._store_copies()
        self.write("first = 0")
        self._start_matrices("0")
        self._start_vectors()
        self._store_vectors("0")
        before = len(self.lines)
        self.write("for n in range(0, N):")
        self.indent += 1
        self._mini_batch()
        self.indent -= 1
        self.lines[before:before] = ["    " * self.indent + line for line in self.rooms]
        self.rooms.clear()
        self._forget()

    def _store_copies(self) -> None:
        for name, copy in self.copied.items():
            self.write(f"{copy}.store({name}_v.to(DOT))")
            self.copies[f"{name}_v"] = copy

    def _start_matrices(self, slot: str) -> None:
        """Begin to copy the matrices of the mini-batch from token ``first`` on into shared memory."""
        for node in self._matrices():
            tensor, memory = self.loop.sources[node].name, self._memory(node)
            layout = self.layouts.read(*(self.side(d) for d in memory))
            address = f"{tensor}_ptr + {self._place_in(tensor, memory, 'first', layout)}"
            self.write(f"start_copy({self._room(node)}.index({slot}), {address})")
        self.write("async_copy.commit_group()")

    def _start_vectors(self) -> None:
        """Load the vectors of the mini-batch from token ``first`` on, and numbers of its last token."""
        for node in self._vectors():
            tensor, dims = self.loop.sources[node].name, dims_of(node)
            layout = self.layouts.vector(self.side(dims[0]))
            self.write(
                f"{tensor}_next = gl.load({tensor}_ptr + {self._place_in(tensor, dims, 'first', layout)})"
            )
        for i, node in enumerate(self._last()):
            (token,) = operands_of(node)
            tensor = self.loop.sources[token].name
            at = f"gl.minimum(first + {self.loop.mini_batch_size}, T) - 1"
            self.write(
                f"last_{i}_next = gl.load({tensor}_ptr + gl.cast({at}, gl.int64) * {self.stride(tensor, 'T')})"
            )

    def _last(self) -> list[fx.Node]:
        return [n for n in self._fetched() if n.target is ops.last]

    def _mini_batch(self) -> None:
        self._forget()
        b = self.loop.mini_batch_size
        self.write(f"first = n * {b}")
        self.write(f"count = gl.minimum(T - first, {b})")
        self._save_states()
        for node in self._vectors():
            tensor, dims = self.loop.sources[node].name, dims_of(node)
            self.write(f"{tensor}_row_s = {self._room(node)}.index(n & 1)")
            self.copies[f"{tensor}_row"] = f"{tensor}_row_s"
            self.tiles[node] = Share(
                f"{tensor}_row", dims, frozenset(), self.natural(dims), raw=True
            )
        for i, node in enumerate(self._last()):
            self.tiles[node] = self.let("x", f"last_{i}_next.to(gl.float32)", ())
        self.write("async_copy.wait_group(0)")
        for node in self._matrices():
            tensor, memory = self.loop.sources[node].name, self._memory(node)
            name = self.fresh("x")
            self.write(f"{name}_s = {self._room(node)}.index(n & 1)")
            self.copies[name] = f"{name}_s"
            self.tiles[node] = Share(name, memory, frozenset(), self.natural(memory), raw=True)
        self.write(f"first = gl.minimum(n + 1, N - 1) * {b}")
        self._start_matrices("(n + 1) & 1")
        self._start_vectors()
        self.write(f"first = n * {b}")
        before, there = self.products, False
        for node in self._sequence():
            if node not in self.tiles and not self._deferred(node):
                self.emit(node)
            if node in self.tiles:
                self._keep(node)
            if self.products >= before + ARRIVED and not there:
                self._store_vectors("(n + 1) & 1")
                there = True
        for node in self.results:
            if node in self.loop.sources:
                self._keep(node)
        if not there:
            self._store_vectors("(n + 1) & 1")
        self._renew()
        self._store_copies()

    def _store_vectors(self, slot: str) -> None:
        """Put the vectors of the next mini-batch, which are there by now, into shared memory: registers are few."""
        for node in self._vectors():
            name = self.loop.sources[node].name
            self.write(f"{self._room(node)}.index({slot}).store({name}_next.to(gl.float32))")

    def _order(self) -> list[fx.Node]:
        """Each value right before it is read, results of tokens before new states: those wait for nobody."""
        nodes = [
            n for n in self.loop.graph.nodes
            if n.op == "call_function" and n in self.used and n not in self._fetched()
        ]  # fmt: skip
        results = [n for n, s in self.loop.sinks if s.kind != "state"]
        results += [n for n, s in self.loop.sinks if s.kind == "state"]
        order = on_demand(
            nodes, results, lambda n: len(dims_of(n)) < 2, self._updates_last(nodes), freeing=True
        )
        return products_first(order)

    def _sequence(self) -> list[fx.Node]:
        """New states are made between the last product of the results and what else these need, which waits."""
        order = self._order()
        needed = ancestors(n for n, s in self.loop.sinks if s.kind != "state")
        made = [
            i for i, n in enumerate(order)
            if n in needed and any(self._dot_labels(x) for x in (n, *n.all_input_nodes) if x in order)
        ]  # fmt: skip
        cut = max(made, default=len(order) - 1) + 1
        tail = [n for n in order[cut:] if n in needed]
        waiting, ready = [n for n in order[cut:] if n not in needed], []
        for node in waiting:
            if not any(
                x in tail or (x in waiting and x not in ready) for x in node.all_input_nodes
            ):
                ready.append(node)
        return [*order[:cut], *ready, *tail, *(n for n in waiting if n not in ready)]

    # -- operators ----------------------------------------------------------------------------------------

    def emit(self, node: fx.Node) -> None:
        """One operator."""
        if node.target is ops.rename:
            source = self.tile(operands_of(node)[0])
            names = dict(zip(dims_of(node.args[1]), dims_of(node), strict=True))
            dims = tuple(names[d] for d in source.dims)
            zero = frozenset(names[d] for d in source.zero)
            if self.order(dims) != dims:
                raise NotLowerable("a tile is turned under new names")
            self.tiles[node] = Share(
                source.name,
                dims,
                zero,
                source.layout,
                source.lead,
                source.partial,
                source.rest,
                source.raw,
            )
            return
        super().emit(node)

    def _elementwise(self, node: fx.Node) -> Tile:
        function = str(node.args[0])
        if "propagate_nan" in FUNCTIONS[function]:
            raise NotLowerable(f"{function} has no form for warps yet")
        operands = operands_of(node)
        target = self.order(dims_of(node))
        fused = self._accumulated(node, function, operands, target)
        if fused is not None:
            return fused
        tiles = [self.tile(x) for x in operands]
        put_off = self._put_off(function, tiles, target)
        return put_off if put_off is not None else super()._elementwise(node)

    def _put_off(self, function: str, tiles: list[Share], target: Dims) -> Share | None:
        """A function of what warps have yet to add up that is linear in it; None where it is added up first."""
        parts = [t for t in tiles if t.partial]
        if not parts or any(t.dims != target for t in parts):
            return None
        if function == "neg" and not parts[0].rest:
            made = self.let("e", f"-{parts[0].name}", target, parts[0].zero)
        elif function == "mul" and len(parts) == 1 and not parts[0].rest and self.spread(target):
            values = [t.name if t.partial else self.line_up(t, target) for t in tiles]
            made = self.let("e", f"{values[0]} * {values[1]}", target)
        elif function in ("add", "sub") and self.spread(target):
            values = [t.name if t.partial else self._first_alone(t, target) for t in tiles]
            made = self.let("e", FUNCTIONS[function].format(*values), target)
        elif function in ("add", "sub") and tiles[0].partial and not tiles[1].partial:
            sign = "+" if function == "add" else "-"
            rest = f"{tiles[0].rest} {sign} {self.line_up(tiles[1], target)}"
            return Share(tiles[0].name, target, frozenset(), tiles[0].layout, True, True, rest)
        else:
            return None
        made.partial, made.lead, made.layout = True, True, self.layouts.product()
        return made

    def _first_alone(self, tile: Share, target: Dims) -> str:
        return f"gl.where({self.places_of_warps()} == 0, {self.line_up(tile, target)}, 0.0)"

    def cleared(self, tile: Tile, dims: Dims) -> Tile:
        """The tile with zeros at tokens beyond the sequence."""
        missing = tuple(d for d in tile.dims if d in dims and d not in tile.zero)
        if not missing:
            return tile
        share = self.share(tile)
        value = self.line_up(share, share.dims)
        value = f"gl.where({self.mask(missing, share.dims)}, {value}, 0.0)"
        return self.let("m", value, share.dims, share.zero | set(missing))

    def negated(self, tile: Tile) -> Tile:
        share = self.share(tile)
        value = share.name if share.partial and not share.rest else self.line_up(share, share.dims)
        made = self.let("n", f"-{value}", share.dims, share.zero)
        made.partial = share.partial
        return made

    def _causal(self, tile: Tile, relation: Any) -> Tile:
        """A tile over pairs of tokens, zero where the relation does not hold."""
        share, r = self.share(tile), parse_relation(str(relation))
        comparison = "<" if r.strict else "<="
        later, earlier = (self.places(d, share.dims) for d in (r.later, r.earlier))
        if not share.partial:
            self.line_up(share, share.dims)
        made = self.let(
            "m",
            f"gl.where({earlier} {comparison} {later}, {share.name}, 0.0)",
            share.dims,
            share.zero,
        )
        made.partial = share.partial
        return made

    def _is_tile(self, x: Any, target: Dims) -> bool:
        return isinstance(x, fx.Node) and x in self.tiles and self.tiles[x].dims == target

    def _dot(self, node: fx.Node, accumulator: Tile | None = None, negative: bool = False) -> Tile:
        """A matrix product; where warps have parts of what it sums over, a sum that they have yet to add up."""
        labels = self._dot_labels(node)
        assert labels is not None
        rows, columns, inner = labels
        spec = parse(spec_of(node))
        tiles = {
            frozenset(o): self.tile(x)
            for x, o in zip(operands_of(node), spec.operands, strict=True)
        }
        left, right = tiles[frozenset((rows, inner))], tiles[frozenset((inner, columns))]
        values = pairs = None
        if node.target is ops.masked_contraction:
            r = parse_relation(str(node.args[0]))
            pair = {r.earlier, r.later}
            pairs = left if set(left.dims) == pair else right
            values = right if pairs is left else left
            masked = self.share(self._causal(pairs, str(node.args[0])))
            left, right = (masked, right) if pairs is left else (left, masked)
            pairs = masked
        if base(inner) in (TOKEN, EARLIER) and not (pairs is not None and inner == r.earlier):
            small = left if self.elements(left) <= self.elements(right) else right
            cleared = self.share(self.cleared(small, (inner,)))
            left, right = (cleared, right) if small is left else (left, cleared)
        if negative:
            if left is pairs or (
                right is not pairs and self.elements(left) <= self.elements(right)
            ):
                left = self.share(self.negated(left))
            else:
                right = self.share(self.negated(right))
        if pairs is not None and self.exact:
            assert values is not None
            return self._with_care(left, right, values, labels, str(node.args[0]), accumulator)
        return self._multiply(left, right, labels, accumulator, str(spec))

    def _multiply(
        self,
        left: Share,
        right: Share,
        labels: tuple[str, str, str],
        accumulator: Tile | None,
        note: str = "",
    ) -> Share:
        rows, columns, inner = labels
        target = (rows, columns)
        if not self.spread(target) and inner != self.wide and not (left.partial or right.partial):
            # Of tokens and features: one warp makes it, and it is added up with what others make.
            pair = left if left.lead else right
            if not pair.lead:
                raise NotLowerable("a product of matrices without the dimension that warps share")
            alone = self.of_first(pair)
            left, right = (alone, right) if pair is left else (left, alone)
        partial = inner == self.wide or left.partial or right.partial
        if partial and self.wide in target:
            for x in (left, right):
                if x.partial:
                    self.add_up(x)
            partial = False
        a, b = self.factor(left, 0, rows, inner), self.factor(right, 1, columns, inner)
        rest = ""
        start = self.zeros(target)
        if accumulator is not None:
            onto = self.share(accumulator)
            if partial == onto.partial:
                start, rest = (onto.name if partial else self.line_up(onto, target)), onto.rest
            elif partial:
                rest = f" + {self.line_up(onto, target)}"
            else:
                raise NotLowerable("a whole product onto parts of a sum")
        made = self.let("c", f"mma_v2({a}, {b}, {start})", target, note=note)
        self.products += 1
        made.partial, made.rest, made.lead, made.layout = (
            partial,
            rest,
            True,
            self.layouts.product(),
        )
        return made

    def _with_care(
        self, left: Share, right: Share, values: Share, labels: tuple[str, str, str], relation: str,
        accumulator: Tile | None,
    ) -> Share:  # fmt: skip
        """A causal product of finite values; not a number where a token sees one that is not finite."""
        pairs_left = left is not values and set(left.dims) != set(values.dims)
        rows, columns, _ = labels
        whole = self.line_up(values, values.dims)
        sign = "-" if (right if pairs_left else left).name != values.name else ""
        finite = f"{whole} * 0.0 == 0.0"
        clean = self.let("f", f"gl.where({finite}, {sign}{whole}, 0.0)", values.dims, values.zero)
        bad = self.let("f", f"gl.where({finite}, 0.0, 1.0)", values.dims)
        pair = left if pairs_left else right
        ones = self.share(self._causal(self._ones(pair.dims), relation))
        seen = (ones, bad) if pairs_left else (bad, ones)
        reached = self._multiply(*seen, labels, None)
        given = (left, clean) if pairs_left else (clean, right)
        made = self._multiply(*given, labels, accumulator)
        value = f'{made.name} + gl.where({reached.name} > 0.0, float("nan"), 0.0)'
        total = self.let("c", value, (rows, columns))
        total.partial, total.rest, total.lead, total.layout = (
            made.partial,
            made.rest,
            made.lead,
            made.layout,
        )
        return total

    def _ones(self, dims: Dims) -> Share:
        return self.let("f", f"{self.zeros(dims)} + 1.0", dims)

    def _masked_contraction(self, node: fx.Node) -> Tile:
        if self._dot_labels(node) is None:
            raise NotLowerable(f"a causal sum that is no matrix product: {spec_of(node)}")
        return self._dot(node)

    def _masked(self, node: fx.Node) -> Tile:
        return self._causal(self.tile(operands_of(node)[0]), node.args[0])

    def _broadcast_product(self, node: fx.Node, tiles: list[Any], masked: bool = False) -> Tile:
        """Multiply, then add up."""
        spec = parse(spec_of(node))
        every = self.order(tuple(dict.fromkeys(d for t in tiles for d in t.dims)))
        result = self.order(spec.result)
        summed = [d for d in every if d not in result]
        for d in summed:
            if base(d) in (TOKEN, EARLIER):
                i = min(
                    (i for i, t in enumerate(tiles) if d in t.dims),
                    key=lambda i: len(tiles[i].dims),
                )
                tiles[i] = self.cleared(tiles[i], (d,))
        if not summed:
            put_off = self._put_off("mul", tiles, every) if len(tiles) == 2 else None
            if put_off is not None:
                return put_off
            return self.let("e", " * ".join(self.line_up(t, every) for t in tiles), result)
        whole = len(every) == 1 or not self.spread(every)
        if (not whole and summed != [every[0]]) or (whole and len(summed) > 1):
            raise NotLowerable(f"a sum over {' '.join(summed)} of {' '.join(every)}")
        value = " * ".join(self.line_up(t, every) for t in tiles)
        if whole and self.wide in every:
            value = f"gl.sum(gl.sum({value}, 1), 0)"
        else:
            axis = every.index(summed[0]) + (0 if whole else 1)
            value = f"gl.sum({value}, {axis})"
        made = self.let("c", value, result, note=str(spec))
        if len(every) == 2:
            made.layout = self.layouts.slice(
                self.natural(every), every.index(summed[0]) + (0 if whole else 1)
            )
        return made

    def _keep(self, node: fx.Node) -> None:
        """Store what a node goes to as soon as it is made."""
        for sink in self.results.get(node, ()):
            self.store(sink.name, f"{sink.name}_ptr", self.tile(node), "rows")

    def _renew(self) -> None:
        """The states take their new values, all at once."""
        values = []
        for node, sink in self.loop.sinks:
            if sink.kind == "state":
                tile = self.tile(node)
                values.append((sink.name, self.line_up(tile, self.order(dims_of(node)))))
        for name, value in values:
            if value != f"{name}_v":
                self.write(f"{name}_v = {value}")


def _in_gluon(line: str) -> str:
    """Triton's names by those of Gluon, which are the same."""
    line = line.replace("@triton.jit", "@gluon.jit").replace("tl.range(", "range(")
    return re.sub(r"\btl\.", "gl.", line)


def warp_renderer(loop: Loop, schedule: Schedule) -> WarpRenderer:
    """A renderer for warps that share the widest dimension of a loop.

    Raises:
        NotLowerable: where the loop has no such form.
    """
    renderer = WarpRenderer(loop, schedule)
    if schedule.nan == "again" and (name := _forgotten(renderer)):
        raise NotLowerable(f"what is not finite may not show in {name} at the end")
    return renderer


def _forgotten(renderer: WarpRenderer) -> str:
    """A state that is no sum of the old one and something, so that it may lose what is not finite; empty for none."""
    loop = renderer.loop
    for node, sink in loop.sinks:
        if sink.kind != "state":
            continue
        olds = [n for n, s in loop.sources.items() if s.kind == "state" and s.name == sink.name]
        while node not in olds:
            if node.target is not ops.elementwise or node.args[0] not in ("add", "sub"):
                return sink.name
            node = operands_of(node)[0]
    return ""
