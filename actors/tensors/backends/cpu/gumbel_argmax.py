"""The Gumbel arg-max on CPU, in one pass over the logits: as `sampling.gumbel`, but for the last bits of logarithms.

R rows to sample · V vocabulary rows of this shard.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from actors.tensors.backends.cpu.compile import kernel
from actors.tensors.sampling.noise import FRACTION_BITS, LAST_SHIFT, STEPS, WEYL
from actors.tensors.sampling.ranking import MAGNITUDE
from cluster.collectives.elements import DTYPE_TAGS, bits_of, float_of, pointer, to_float32

# No reordering: 1 - w must be computed as written, and NaN must stay.
_exact_kernel = kernel(fastmath={"contract"})
_TILE = 512  # scores at a time: they stay in the L1 cache
_LN_2 = np.float32(math.log(2))
_UNIT, _LARGEST = np.float32(2.0**-FRACTION_BITS), np.float32(1 - 2**-24)
_NAN, _MAGNITUDE = np.int32(0x7FC00000), np.int32(MAGNITUDE)
_TWO_THIRDS = np.int32(0x3F2AAAAB)  # the bits of 2 / 3
(_SHIFT_1, _FACTOR_1), (_SHIFT_2, _FACTOR_2) = ((np.uint64(shift), np.uint64(factor)) for shift, factor in STEPS)
_SHIFT_3, _UNUSED_BITS, _STEP = np.uint64(LAST_SHIFT), np.uint64(64 - FRACTION_BITS), np.uint64(WEYL)


class _Logits(NamedTuple):
    """Logits [R, V], each row contiguous."""

    address: int
    stride: int  # elements from row to row
    num_ids: int  # V
    first_id: int  # the token id of the first column


def gumbel_argmax(
    logits_RV: torch.Tensor, first_id: int, temperatures_R1: torch.Tensor | None, keys_R1: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `sampling.gumbel.gumbel_argmax`; logits in bfloat16 or float32."""
    num_rows, num_ids = logits_RV.shape
    logits_RV = logits_RV if logits_RV.stride(1) == 1 else logits_RV.contiguous()
    scores_R, ids_R = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.int64)
    if temperatures_R1 is None or keys_R1 is None:
        temperatures_R1, keys_R1 = torch.zeros(num_rows, 1), torch.zeros(num_rows, 1, dtype=torch.int64)
    arrays = temperatures_R1.flatten().numpy(), keys_R1.flatten().numpy(), scores_R.numpy(), ids_R.numpy()
    logits = _Logits(logits_RV.data_ptr(), logits_RV.stride(0), num_ids, first_id)
    _argmax_rows(logits, *arrays, DTYPE_TAGS[logits_RV.dtype])
    return scores_R, ids_R


@_exact_kernel
def _log_of_ratio(above: Any, below: Any) -> Any:
    """log((below + above) / (below - above)) for above / below up to 0.2, by the series of 2 artanh."""
    z = above / below
    y = z * z
    series = y * np.float32(1 / 11) + np.float32(1 / 9)
    series = series * y + np.float32(1 / 7)
    series = series * y + np.float32(1 / 5)
    series = series * y + np.float32(1 / 3)
    return np.float32(2) * (z + z * y * series)


@_exact_kernel
def _log(x: Any) -> Any:
    """The natural logarithm of a positive, normal float32: of its power of two, and of the rest, from 2/3 to 4/3."""
    bits = bits_of(x)
    exponent = (bits - _TWO_THIRDS) >> np.int32(23)
    rest = float_of(bits - (exponent << np.int32(23)))
    return np.float32(exponent) * _LN_2 + _log_of_ratio(rest - np.float32(1), rest + np.float32(1))


@_exact_kernel
def _minus_log1p_of_minus(w: Any) -> Any:
    """-log(1 - w) for w from 2**-54 to 1 - 2**-24, precise also where 1 - w rounds to 1."""
    near = -_log_of_ratio(-w, np.float32(2) - w)
    far = -_log(np.float32(1) - w)
    return near if w < np.float32(1 / 3) else far


@_exact_kernel
def _noise(key: Any, token: Any) -> Any:
    """Exp(1) noise, as `noise.exponential`."""
    x = key + token * _STEP
    x = (x ^ (x >> _SHIFT_1)) * _FACTOR_1
    x = (x ^ (x >> _SHIFT_2)) * _FACTOR_2
    x = x ^ (x >> _SHIFT_3)
    w = (np.float32(np.int64(x >> _UNUSED_BITS)) + np.float32(0.5)) * _UNIT
    return _minus_log1p_of_minus(min(w, _LARGEST))


@_exact_kernel
def _order_of(score: Any) -> Any:
    """An int32 that grows with the score (see `ranking.sort_keys_of`); -0.0 equals 0.0, and NaN is above all."""
    bits = bits_of(score)
    bits = bits if score == score else _NAN
    bits = bits if score != np.float32(0) else np.int32(0)
    return bits ^ ((bits >> np.int32(31)) & _MAGNITUDE)


@_exact_kernel
def _argmax_rows(logits: _Logits, temperatures_R: Any, keys_R: Any, scores_R: Any, ids_R: Any, dtype_tag: Any) -> None:
    """Fill `scores_R` and `ids_R`."""
    num_ids, first_id = logits.num_ids, logits.first_id
    logits_p = pointer(logits.address, dtype_tag)
    orders = np.empty(_TILE, np.int32)
    for row in range(len(scores_R)):
        temperature, key = temperatures_R[row], np.uint64(keys_R[row])
        highest, winner = np.int32(-0x7FFFFFFF), 0
        for start in range(0, num_ids, _TILE):
            count, first = min(_TILE, num_ids - start), row * logits.stride + start
            if temperature > 0:
                token = np.uint64(first_id + start)
                for i in range(count):
                    score = to_float32(logits_p[first + i]) / temperature - _log(_noise(key, token + np.uint64(i)))
                    orders[i] = _order_of(score)
            else:
                for i in range(count):
                    orders[i] = _order_of(to_float32(logits_p[first + i]))
            best = orders[0]
            for i in range(count):
                best = max(best, orders[i])
            if best > highest or start == 0:
                highest, i = best, 0
                while orders[i] != best:
                    i += 1
                winner = start + i
        scores_R[row] = float_of(highest ^ ((highest >> np.int32(31)) & _MAGNITUDE))
        ids_R[row] = first_id + winner
