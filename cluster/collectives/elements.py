"""The primitives of CPU kernels: addresses as typed pointers, bfloat16 as bits, prefetching, a vectorized exponential.

`dtype_tag` is a scalar that stands for an element type: a uint16 for bfloat16, a float32 for float32.
Words are int64. A process that loads a word with acquire sees all that another stored before it stored it with release.
"""

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cluster.collectives.compile import kernel

DTYPE_TAGS = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}  # element types of the kernels
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_LOG2_E = np.float32(math.log2(math.e))


@intrinsic
def pointer(typing_context: Any, address: Any, dtype_tag: Any) -> Any:
    """An address as a pointer to elements of the type of `dtype_tag`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype_tag)(address, dtype_tag), generate


@intrinsic
def to_float32(typing_context: Any, element: Any) -> Any:
    """An element as float32: the bits of a bfloat16 are the upper half of a float32's."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.args[0] == types.float32:
            return arguments[0]
        bits = builder.shl(builder.zext(arguments[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(bits, _F32)

    return types.float32(element), generate


@intrinsic
def round_to(typing_context: Any, number: Any, dtype_tag: Any) -> Any:
    """A float32 as an element, rounded to nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if signature.return_type == types.float32:
            return arguments[0]
        bits = builder.bitcast(arguments[0], _I32)
        last = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(last, ir.Constant(_I32, 0x7FFF)))
        quiet = builder.or_(bits, ir.Constant(_I32, 0x400000))  # rounding could turn a NaN into a number
        is_nan = builder.icmp_unsigned(
            ">", builder.and_(bits, ir.Constant(_I32, 0x7FFFFFFF)), ir.Constant(_I32, 0x7F800000)
        )
        return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), ir.Constant(_I32, 16)), _I16)

    return dtype_tag(types.float32, dtype_tag), generate


@intrinsic
def bits_of(typing_context: Any, number: Any) -> Any:
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], _I32
    )


@intrinsic
def float_of(typing_context: Any, bits: Any) -> Any:
    """The float32 of these bits, an int32."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], _F32
    )


@intrinsic
def power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2 ** exponent as float32, for an int32 from -126 to 127."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.int32), generate


@intrinsic
def prefetch(typing_context: Any, pointer: Any, index: Any) -> Any:
    """Prefetch the cache line of an element; any address may be given."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.bitcast(builder.gep(arguments[0], [arguments[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)
        builder.call(function, [address, read, keep, data])
        return context.get_dummy_value()

    return types.void(pointer, index), generate


@intrinsic
def load_acquire(typing_context: Any, words: Any, index: Any) -> Any:
    """Load element `index` of int64 words with acquire order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(arguments[0], [arguments[1]], source_etype=_I64)
        return builder.load_atomic(place, "acquire", 8, typ=_I64)

    return types.int64(words, index), generate


@intrinsic
def store_release(typing_context: Any, words: Any, index: Any, value: Any) -> Any:
    """Store element `index` of int64 words with release order."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.gep(arguments[0], [arguments[1]], source_etype=_I64)
        builder.store_atomic(arguments[2], place, "release", 8)
        return context.get_dummy_value()

    return types.void(words, index, types.int64), generate


@intrinsic
def pause(typing_context: Any) -> Any:
    """The x86 instruction for a loop that waits (PAUSE)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@kernel()
def exp(x: Any) -> Any:
    """The exponential in float32's precision for x from -87 to 87, in a form that the compiler vectorizes.

    It is 2 ** n times the Taylor series of the rest, which is at most ln(2) / 2. NaN stays NaN.
    """
    given, x = x, min(max(x, np.float32(-87)), np.float32(87))
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    y = np.float32(1 / 5040)
    y = y * r + np.float32(1 / 720)
    y = y * r + np.float32(1 / 120)
    y = y * r + np.float32(1 / 24)
    y = y * r + np.float32(1 / 6)
    y = y * r + np.float32(0.5)
    y = y * r + np.float32(1)
    y = y * r + np.float32(1)
    return y * power_of_two(np.int32(n)) + (given - given)  # NaN where it was given
