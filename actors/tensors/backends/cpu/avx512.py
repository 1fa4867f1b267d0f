"""AVX-512 in kernels: vector types and instructions as LLVM names them, and whether this CPU has them."""

import functools
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

WIDTH = 16  # float32 of a vector
I32, I64, F32, POINTER = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.PointerType()
_READ_INTO_L2 = 0, 2, 1  # arguments of LLVM's prefetch


class _Bfloat(ir.Type):  # type: ignore[misc]
    """LLVM's type of bfloat16, which llvmlite does not define."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


SUMS, WORDS = ir.VectorType(F32, WIDTH), ir.VectorType(I32, WIDTH)
PAIRS, ROUNDED = ir.VectorType(_Bfloat(), 2 * WIDTH), ir.VectorType(_Bfloat(), WIDTH)
_HALVES = ir.VectorType(ir.IntType(16), WIDTH)


@functools.cache  # it is called for each layer, and reading the features takes 0.1 ms
def has_dot_product() -> bool:
    """Whether this CPU has VDPBF16PS: products of pairs of bfloat16, summed in float32."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether this CPU has AMX: products of tiles of bfloat16."""
    return bool(llvmlite.binding.get_host_cpu_features().get("amx-bf16"))


class Writer:
    """Writes vector instructions at its builder's position. Addresses are int64."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def pointer_to(self, address: Any, index: Any = None, step: int = 1, first: int = 0) -> Any:
        """A pointer to `address` + `index` × `step` + `first`."""
        if index is not None:
            address = self.builder.add(address, self.builder.mul(index, I64(step)))
        return self.builder.inttoptr(self.builder.add(address, I64(first)), POINTER)

    def offset(self, address: Any, step: Any, count: Any) -> Any:
        """The address `address` + `count` × `step`."""
        return self.builder.add(address, self.builder.mul(step, count))

    def load_pairs(self, pointer: Any, align: int = 2) -> Any:
        """Load 32 bfloat16."""
        return self.builder.bitcast(self.builder.load(pointer, typ=WORDS, align=align), PAIRS)

    def load_as_float32(self, pointer: Any) -> Any:
        """Load 16 bfloat16 as float32: their bits are the upper half of a float32's."""
        halves = self.builder.load(pointer, typ=_HALVES, align=2)
        words = self.builder.shl(self.builder.zext(halves, WORDS), ir.Constant(WORDS, [16] * WIDTH))
        return self.builder.bitcast(words, SUMS)

    def broadcast(self, number: Any, vector: Any) -> Any:
        """A vector of type `vector` with one number in all elements."""
        undefined = ir.Constant(vector, ir.Undefined)
        one = self.builder.insert_element(undefined, number, I32(0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(WORDS, [0] * WIDTH))

    def add_dot(self, sums: Any, pairs: Any, others: Any) -> Any:
        """Add to each float32 sum the dot product of two pairs of bfloat16."""
        return self._call(SUMS, "llvm.x86.avx512bf16.dpbf16ps.512", [SUMS, PAIRS, PAIRS], sums, pairs, others)

    def add_product(self, sums: Any, factors: Any, others: Any) -> Any:
        """Add to each float32 sum a product of two float32."""
        return self._call(SUMS, "llvm.fma.v16f32", [SUMS] * 3, factors, others, sums)

    def to_bfloat16(self, sums: Any) -> Any:
        """Round 16 float32 to bfloat16."""
        return self._call(ROUNDED, "llvm.x86.avx512bf16.cvtneps2bf16.512", [SUMS], sums)

    def prefetch(self, pointer: Any) -> None:
        """Prefetch the cache line of a pointer into the L2 cache; any address may be given."""
        arguments = map(I32, _READ_INTO_L2)
        self._call(ir.VoidType(), "llvm.prefetch.p0", [POINTER, I32, I32, I32], pointer, *arguments)

    def loop(self, count: Any, sums: list[Any], body: Any) -> list[Any]:
        """Sums after `body(index, sums)` → sums for each index below `count`, at least once; a new block stays open."""
        builder, before = self.builder, self.builder.block
        inside, after = builder.append_basic_block("inside"), builder.append_basic_block("after")
        builder.branch(inside)
        builder.position_at_end(inside)
        index, carried = builder.phi(I64), [builder.phi(SUMS) for _ in sums]
        summed = body(index, carried)
        following = builder.add(index, I64(1))
        index.add_incoming(I64(0), before)
        index.add_incoming(following, inside)
        for phi, first, next_one in zip(carried, sums, summed, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(next_one, inside)
        builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
        builder.position_at_end(after)
        return list(summed)

    def horizontal_sums(self, vectors: list[Any]) -> Any:
        """The sums of each of 16 vectors' elements, as one vector: pairs of vectors are added until one is left."""
        size = 1
        while len(vectors) > 1:
            # Runs of `size` elements of either vector in turn, and as the other summand the runs behind them
            starts = range(0, WIDTH, 2 * size)
            indices = [first + i for start in starts for first in (start, WIDTH + start) for i in range(size)]
            vectors = [
                self.builder.fadd(self._shuffle(a, b, indices), self._shuffle(a, b, [i + size for i in indices]))
                for a, b in zip(vectors[::2], vectors[1::2], strict=True)
            ]
            size *= 2
        return vectors[0]

    def _shuffle(self, a: Any, b: Any, indices: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(WORDS, indices))

    def _call(self, result: Any, name: str, kinds: list[Any], *arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, kinds), name)
        return self.builder.call(function, list(arguments))
