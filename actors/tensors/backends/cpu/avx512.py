"""AVX-512 in kernels: the vectors that LLVM computes with, the instructions that it is told to use, who has them."""

import functools
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils

WIDTH = 16  # float32 of a vector
I32, I64, F32, POINTER = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.PointerType()
_READ_INTO_SECOND_CACHE = 0, 2, 1  # arguments of LLVM's prefetch


class _Bfloat(ir.Type):  # type: ignore[misc]
    """LLVM's type, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bfloat)

    def __hash__(self) -> int:
        return hash(_Bfloat)


SUMS, WORDS = ir.VectorType(F32, WIDTH), ir.VectorType(I32, WIDTH)
PAIRS, ROUNDED = ir.VectorType(_Bfloat(), 2 * WIDTH), ir.VectorType(_Bfloat(), WIDTH)
_HALVES = ir.VectorType(ir.IntType(16), WIDTH)


@functools.cache  # each layer asks, and reading the features takes a tenth of a millisecond
def has_dot_product() -> bool:
    """Whether this CPU multiplies pairs of bfloat16 and adds them up in float32."""
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16"))


@functools.cache
def has_matrix_tiles() -> bool:
    """Whether this CPU multiplies whole tiles of bfloat16 (AMX)."""
    return bool(llvmlite.binding.get_host_cpu_features().get("amx-bf16"))


class Writer:
    """Writes vector instructions where its builder stands. Addresses are int64."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def at(self, address: Any, index: Any = None, step: int = 1, first: int = 0) -> Any:
        """A pointer to `address` + `index` × `step` + `first`."""
        if index is not None:
            address = self.builder.add(address, self.builder.mul(index, I64(step)))
        return self.builder.inttoptr(self.builder.add(address, I64(first)), POINTER)

    def moved(self, address: Any, step: Any, times: Any) -> Any:
        """The address `times` steps further."""
        return self.builder.add(address, self.builder.mul(step, times))

    def load_pairs(self, pointer: Any, align: int = 2) -> Any:
        """32 bfloat16."""
        return self.builder.bitcast(self.builder.load(pointer, typ=WORDS, align=align), PAIRS)

    def load_wide(self, pointer: Any) -> Any:
        """16 bfloat16 as float32: their bits are the upper half of a float32's."""
        halves = self.builder.load(pointer, typ=_HALVES, align=2)
        words = self.builder.shl(self.builder.zext(halves, WORDS), ir.Constant(WORDS, [16] * WIDTH))
        return self.builder.bitcast(words, SUMS)

    def everywhere(self, number: Any, vector: Any) -> Any:
        """One number in all places of a vector of its kind."""
        nothing = ir.Constant(vector, ir.Undefined)
        one = self.builder.insert_element(nothing, number, I32(0))
        return self.builder.shuffle_vector(one, nothing, ir.Constant(WORDS, [0] * WIDTH))

    def add_dot(self, sums: Any, pairs: Any, others: Any) -> Any:
        """Float32 sums, and to each the products of one pair with another."""
        return self._call(SUMS, "llvm.x86.avx512bf16.dpbf16ps.512", [SUMS, PAIRS, PAIRS], sums, pairs, others)

    def add_product(self, sums: Any, factors: Any, others: Any) -> Any:
        """Float32 sums, and to each a product."""
        return self._call(SUMS, "llvm.fma.v16f32", [SUMS] * 3, factors, others, sums)

    def rounded(self, sums: Any) -> Any:
        """Float32 as bfloat16."""
        return self._call(ROUNDED, "llvm.x86.avx512bf16.cvtneps2bf16.512", [SUMS], sums)

    def ask_for(self, pointer: Any) -> None:
        """Let the line of a pointer come into the core's second cache; a hint that never faults."""
        arguments = map(I32, _READ_INTO_SECOND_CACHE)
        self._call(ir.VoidType(), "llvm.prefetch.p0", [POINTER, I32, I32, I32], pointer, *arguments)

    def loop(self, count: Any, sums: list[Any], body: Any) -> list[Any]:
        """`body(index, sums)` → sums, for each index below `count`, at least once; ends in a block that is open."""
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

    def sums_within(self, vectors: list[Any]) -> Any:
        """The sum of the numbers of each of 16 vectors, as one vector: neighbours are added until one is left."""
        size = 1
        while len(vectors) > 1:
            starts = range(0, WIDTH, 2 * size)  # of two vectors in turn: a run of `size` numbers and, apart, the next
            places = [first + i for start in starts for first in (start, WIDTH + start) for i in range(size)]
            vectors = [
                self.builder.fadd(self._shuffled(a, b, places), self._shuffled(a, b, [i + size for i in places]))
                for a, b in zip(vectors[::2], vectors[1::2], strict=True)
            ]
            size *= 2
        return vectors[0]

    def _shuffled(self, a: Any, b: Any, places: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(WORDS, places))

    def _call(self, result: Any, name: str, kinds: list[Any], *arguments: Any) -> Any:
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, kinds), name)
        return self.builder.call(function, list(arguments))
