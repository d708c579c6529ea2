"""Two register-blocked products in explicit SIMD, from which the CPU kernels are built, as Numba intrinsics.

The layer's arithmetic has two shapes. `dots`: a few rows against a few rows, summed over d (responses, gradients of
responses). `combine`: a few rows as weighted sums of a list of rows (outputs, input gradients, weight gradients). Both
take lists of row addresses, because rows of one product lie scattered: tokens sorted by leaf, nodes of a path.
Left to LLVM's loop vectoriser the same loops reach a tenth of the machine: it blocks no registers.

Addresses are int64 elements of arrays; every row is d contiguous floats. The caller keeps the arrays alive.
"""

# llvmlite has no types, and Numba's code generation helpers none worth the name.
# mypy: disable-error-code="import-untyped, no-untyped-call"
from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = llvm.get_host_cpu_features()
WIDE = bool(_FEATURES.get("avx512f") and _FEATURES.get("avx512vl"))
"""Whether the host has 32 vector registers of 64 bytes; it decides the blocking below."""

VECTOR_BYTES = 64 if WIDE else 32 if platform.machine() in {"x86_64", "AMD64"} else 16
ROWS = 2 if VECTOR_BYTES == 32 else 4
"""Second side of a `dots` block: 4 tokens × ROWS rows of accumulators fill, and do not spill, the register file."""
COLUMNS = 2 if VECTOR_BYTES == 32 else 4
"""Vectors of a row that `combine` holds at once for each of up to 4 results."""

_I64 = ir.IntType(64)
_CONTRACT = ("contract",)


class _Emitter:
    """What both products need of one function under construction: vectors of the array's float type."""

    def __init__(self, context: Any, builder: Any, dtype: types.Float) -> None:
        self.builder = builder
        self.scalar = context.get_value_type(dtype)
        self.lanes = VECTOR_BYTES // (dtype.bitwidth // 8)
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.suffix = f"v{self.lanes}f{dtype.bitwidth}"

    def zero(self) -> Any:
        return ir.Constant(self.vector, None)

    def variable(self) -> Any:
        return cgutils.alloca_once(self.builder, self.vector)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """a·b + c, fused where the machine can (a separate llvm.fma would be a library call where it cannot)."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=_CONTRACT), c, flags=_CONTRACT)

    def row(self, addresses: Any, index: Any) -> Any:
        """Pointer to the floats of row `index` of a list of addresses."""
        address = self.builder.load(self.builder.gep(addresses, [index]))
        return self.builder.inttoptr(address, self.scalar.as_pointer())

    def _at(self, row: Any, j: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(row, [j]), self.vector.as_pointer())

    def load(self, row: Any, j: Any) -> Any:
        return self.builder.load(self._at(row, j), align=4)

    def store(self, value: Any, row: Any, j: Any) -> None:
        self.builder.store(value, self._at(row, j), align=4)

    def mask(self, left: Any) -> Any:
        """Lanes below `left` (int64)."""
        lanes = ir.Constant(ir.VectorType(_I64, self.lanes), [ir.Constant(_I64, i) for i in range(self.lanes)])
        return self.builder.icmp_signed("<", lanes, self.splat(left, ir.VectorType(_I64, self.lanes)))

    def _masked(self, name: str, result: Any, arguments: list[Any]) -> Any:
        kind = ir.FunctionType(result, [a.type for a in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.masked.{name}.{self.suffix}.p0")
        return self.builder.call(function, arguments)

    def load_masked(self, row: Any, j: Any, mask: Any) -> Any:
        return self._masked("load", self.vector, [self._at(row, j), ir.Constant(ir.IntType(32), 4), mask, self.zero()])

    def store_masked(self, value: Any, row: Any, j: Any, mask: Any) -> None:
        self._masked("store", ir.VoidType(), [value, self._at(row, j), ir.Constant(ir.IntType(32), 4), mask])

    def splat(self, value: Any, vector: Any = None) -> Any:
        vector = self.vector if vector is None else vector
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(
            one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)
        )

    def _pick(self, a: Any, b: Any, lanes: list[int]) -> Any:
        index = ir.VectorType(ir.IntType(32), len(lanes))
        return self.builder.shuffle_vector(a, b, ir.Constant(index, [ir.Constant(ir.IntType(32), i) for i in lanes]))

    def sums(self, vectors: list[Any]) -> Any:
        """One vector whose lane i is the sum of the lanes of vectors[i]: log2 rounds of halving pairs together.

        Four times fewer instructions than one horizontal sum after another. The list is padded to a power of two.
        """
        while len(vectors) & (len(vectors) - 1):
            vectors = [*vectors, self.zero()]
        width, lanes = self.lanes, self.lanes
        while width > 1:
            half = width // 2
            if len(vectors) > 1:
                low = [s * width + i for s in range(2 * lanes // width) for i in range(half)]
                pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            else:
                low = [s * width + i for s in range(lanes // width) for i in range(half)]
                pairs = [(vectors[0], vectors[0])]
                lanes //= 2
            high = [i + half for i in low]
            vectors = [
                self.builder.fadd(self._pick(a, b, low), self._pick(a, b, high), flags=_CONTRACT) for a, b in pairs
            ]
            width = half
        return vectors


def _make_dots(tokens: int, rows: int) -> Callable[..., Any]:
    """Intrinsic for a block of `tokens` × `rows` dot products.

    Blocks of every size add up in the same order (one running vector a product), so that a product has the same bits
    whichever block it falls into: results do not depend on how tokens are cut into tasks.
    """
    count = tokens * rows

    def dots(typingctx: Any, xs: Any, x0: Any, ws: Any, w0: Any, d: Any, out: Any, o0: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            dtype = signature.args[5].dtype
            e = _Emitter(context, builder, dtype)
            data = [context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2, 5)]
            x = [e.row(data[0], builder.add(args[1], _I64(t))) for t in range(tokens)]
            w = [e.row(data[1], builder.add(args[3], _I64(r))) for r in range(rows)]
            d = args[4]
            sums = [e.variable() for _ in range(count)]
            for variable in sums:
                builder.store(e.zero(), variable)

            def step(j: Any, load: Callable[[Any, Any], Any]) -> None:
                xv, wv = [load(p, j) for p in x], [load(p, j) for p in w]
                for i, variable in enumerate(sums):
                    value = e.multiply_add(xv[i // rows], wv[i % rows], builder.load(variable))
                    builder.store(value, variable)

            whole = builder.and_(d, _I64(-e.lanes))
            with cgutils.for_range_slice(builder, _I64(0), whole, _I64(e.lanes)) as (j, _):
                step(j, e.load)
            with cgutils.for_range_slice(builder, whole, d, _I64(e.lanes)) as (j, _):
                mask = e.mask(builder.sub(d, j))
                step(j, lambda p, at: e.load_masked(p, at, mask))
            totals = [builder.load(variable) for variable in sums]
            start = args[6]
            for vector in e.sums(totals):
                target = builder.bitcast(builder.gep(data[2], [start]), vector.type.as_pointer())
                builder.store(vector, target, align=4)
                start = builder.add(start, _I64(vector.type.count))
            return context.get_dummy_value()

        return types.void(xs, types.int64, ws, types.int64, types.int64, out, types.int64), codegen

    dots.__doc__ = f"""out[o0 + {rows}·t + r] = <x_t, w_r> for {tokens} rows listed from xs[x0], {rows} from ws[w0].

    Writes up to the next power of two, or a whole vector's worth if there are more, of elements.
    """
    return intrinsic(dots)


def _make_combine(results: int) -> Callable[..., Any]:
    """Intrinsic for `results` weighted sums of the same list of rows."""

    def combine(
        typingctx: Any, src: Any, s0: Any, count: Any, coef: Any, c0: Any, ci: Any, cs: Any, dst: Any, i0: Any, d: Any,
        add: Any,
    ) -> Any:  # fmt: skip
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            dtype = signature.args[3].dtype
            e = _Emitter(context, builder, dtype)
            sources, weights, targets = (
                context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3, 7)
            )
            _, s0, count, _, c0, ci, cs, _, i0, d, add = args
            outs = [e.row(targets, builder.add(i0, _I64(i))) for i in range(results)]
            starts = [builder.add(c0, builder.mul(ci, _I64(i))) for i in range(results)]

            def chunk(j: Any, columns: int, load: Callable[[Any, Any], Any], store: Callable[..., None]) -> None:
                at = [builder.add(j, _I64(c * e.lanes)) for c in range(columns)]
                sums = [[e.variable() for _ in at] for _ in outs]
                for out, line in zip(outs, sums, strict=True):
                    for a, variable in zip(at, line, strict=True):
                        # Where nothing is to be added the loaded value may be garbage: it is selected away.
                        builder.store(builder.select(add, load(out, a), e.zero()), variable)
                with cgutils.for_range(builder, count, intp=_I64) as loop:
                    row = e.row(sources, builder.add(s0, loop.index))
                    values = [load(row, a) for a in at]
                    offset = builder.mul(loop.index, cs)
                    for start, line in zip(starts, sums, strict=True):
                        weight = e.splat(builder.load(builder.gep(weights, [builder.add(start, offset)])))
                        for value, variable in zip(values, line, strict=True):
                            builder.store(e.multiply_add(weight, value, builder.load(variable)), variable)
                for out, line in zip(outs, sums, strict=True):
                    for a, variable in zip(at, line, strict=True):
                        store(builder.load(variable), out, a)

            columns = max(COLUMNS, COLUMNS * 2 // results)
            stride = e.lanes * columns
            whole = builder.and_(d, _I64(-stride))
            with cgutils.for_range_slice(builder, _I64(0), whole, _I64(stride)) as (j, _):
                chunk(j, columns, e.load, e.store)
            with cgutils.for_range_slice(builder, whole, d, _I64(e.lanes)) as (j, _):
                mask = e.mask(builder.sub(d, j))
                chunk(j, 1, lambda p, at: e.load_masked(p, at, mask), lambda v, p, at: e.store_masked(v, p, at, mask))
            return context.get_dummy_value()

        n = types.int64
        return types.void(src, n, n, coef, n, n, n, dst, n, n, types.boolean), codegen

    combine.__doc__ = f"""y_i (+)= sum_s coef[c0 + ci·i + cs·s] · row_s for {results} rows listed from dst[i0].

    Over `count` source rows listed from src[s0]; `add` adds to what the results were before.
    """
    return intrinsic(combine)


dots81 = _make_dots(8, 1)
dots41, dots42, dots44 = _make_dots(4, 1), _make_dots(4, 2), _make_dots(4, 4)
dots11, dots12, dots14 = _make_dots(1, 1), _make_dots(1, 2), _make_dots(1, 4)
combine1, combine2, combine3, combine4 = (_make_combine(n) for n in (1, 2, 3, 4))


@intrinsic
def prefetch(typingctx: Any, address: Any, size: Any) -> Any:
    """Ask for the cache lines of `size` bytes at an address, so that a row is near before a product needs it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        end = builder.add(args[0], args[1])
        with cgutils.for_range_slice(builder, args[0], end, _I64(64)) as (at, _):
            builder.call(function, [builder.inttoptr(at, byte), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fetch_add(typingctx: Any, counter: Any) -> Any:
    """Take the next value of a shared int64 counter [1], atomically: how threads draw tasks."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, _I64(1), "monotonic")

    return types.int64(counter), codegen
