"""Noise that is a pure function of (seed, position, token id), so that neither layout nor replay changes an id.

R rows to sample · V vocabulary rows.
"""

import torch

# The finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
WEYL = 0x9E3779B97F4A7C15
STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
LAST_SHIFT = 31
_MASK64 = (1 << 64) - 1
FRACTION_BITS = 53


def noise_key(seed: int, position: int) -> int:
    """The 64-bit key (as a signed integer) of a row's noise: of the seed's low 64 bits and the token's position."""
    return _signed(_mix(_mix(seed & _MASK64) + position * WEYL & _MASK64))


def exponential(keys_R1: torch.Tensor, ids_V: torch.Tensor) -> torch.Tensor:
    """Exp(1) noise [R, V], float32, a pure function of key and id.

    -log(1 - w) with w of 53 bits: near w = 0, where the arg-max is decided, float32 keeps its full relative precision,
    and the largest Gumbel value is 37. w stays below 1, so that noise is always finite.
    """
    # Multiplication of int64 wraps around, as the hash needs; its right shift copies the sign, which the mask removes
    x_RV = keys_R1 + ids_V * _signed(WEYL)
    for shift, multiplier in STEPS:
        x_RV.bitwise_xor_((x_RV >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(multiplier))
    x_RV.bitwise_xor_((x_RV >> LAST_SHIFT).bitwise_and_((1 << (64 - LAST_SHIFT)) - 1))
    bits_RV = x_RV.bitwise_right_shift_(64 - FRACTION_BITS).bitwise_and_((1 << FRACTION_BITS) - 1)
    w_RV = bits_RV.float().add_(0.5).mul_(2.0**-FRACTION_BITS).clamp_(max=1 - 2.0**-24)
    return w_RV.neg_().log1p_().neg_()


def _mix(x: int) -> int:
    """The same finalizer on one unsigned 64-bit number."""
    for shift, multiplier in STEPS:
        x = (x ^ x >> shift) * multiplier & _MASK64
    return x ^ x >> LAST_SHIFT


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
