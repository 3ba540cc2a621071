"""Dense packing of n-bit codes into int32 words: the order of compressed-tensors' pack_to_int32.

A code c of b bits is stored as the unsigned number c + 2^(b-1). Element i of a row takes bits [i * b, (i + 1) * b) of
the row, bit k being bit k % 32 of word k // 32, so an element may straddle two words; each row ends on a whole word,
its unused bits zero. Eight elements fill exactly b bytes: both directions work on such groups, one byte a lane.
Words are viewed as bytes, so the host must be little-endian, as x86, Arm and CUDA are.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 8  # elements that fill n_bits whole bytes


def packed_words(cols: int, n_bits: int) -> int:
    """Return the int32 words of a packed row, `ceil(cols * n_bits / 32)`."""
    return -(-cols * n_bits // 32)


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Pack int8 codes (rows, cols), each in [-2^(b-1), 2^(b-1) - 1], into int32 (rows, ceil(cols * n_bits / 32)).

    n_bits is 1 to 8. Raises ValueError for another dtype or shape and for a code that n_bits cannot hold.
    """
    _check(codes, torch.int8, n_bits)
    rows, cols = codes.shape
    unsigned = codes.contiguous().view(torch.uint8) + (1 << (n_bits - 1))  # modulo 256, which is what is meant
    if n_bits < 8 and bool((unsigned >> n_bits).any()):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {n_bits} bits")
    lanes = F.pad(unsigned, (0, -cols % GROUP)).view(rows, -1, GROUP)
    packed = torch.zeros(rows, lanes.shape[1], n_bits, dtype=torch.uint8, device=codes.device)
    for lane in range(GROUP):
        byte, shift = divmod(lane * n_bits, 8)
        packed[..., byte] |= lanes[..., lane] << shift
        if shift + n_bits > 8:
            packed[..., byte + 1] |= lanes[..., lane] >> (8 - shift)
    words = packed_words(cols, n_bits)
    row_bytes = _resized(packed.view(rows, lanes.shape[1] * n_bits), 4 * words)
    return row_bytes.view(-1).view(torch.int32).view(rows, words)  # flat in between: a single row may keep odd strides


def unpack(packed: Tensor, n_bits: int, cols: int) -> Tensor:
    """Return the int8 codes (rows, cols) of `pack`. Raises ValueError for another dtype, shape or n_bits."""
    _check(packed, torch.int32, n_bits)
    if packed.shape[1] != packed_words(cols, n_bits):
        expected = packed_words(cols, n_bits)
        raise ValueError(f"{cols} codes of {n_bits} bits take {expected} words a row, not {packed.shape[1]}")
    rows, groups = packed.shape[0], -(-cols // GROUP)
    row_bytes = _resized(packed.contiguous().view(torch.uint8), groups * n_bits).view(rows, groups, n_bits)
    lanes = torch.empty(rows, groups, GROUP, dtype=torch.uint8, device=packed.device)
    for lane in range(GROUP):
        byte, shift = divmod(lane * n_bits, 8)
        value = row_bytes[..., byte] >> shift
        if shift + n_bits > 8:
            value |= row_bytes[..., byte + 1] << (8 - shift)
        lanes[..., lane] = value & (2**n_bits - 1)
    unsigned = lanes.view(rows, groups * GROUP)[:, :cols]
    return (unsigned - (1 << (n_bits - 1))).contiguous().view(torch.int8)


def _check(tensor: Tensor, dtype: torch.dtype, n_bits: int) -> None:
    if not 1 <= n_bits <= 8:
        raise ValueError(f"n_bits is {n_bits}; packing takes 1 to 8 bits")
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise ValueError(f"expected {dtype} of 2 dimensions, not {tensor.dtype} of shape {tuple(tensor.shape)}")


def _resized(row_bytes: Tensor, length: int) -> Tensor:
    """Cut or zero-fill the end of every row; only padding is ever cut."""
    return F.pad(row_bytes, (0, length - row_bytes.shape[1])).contiguous()
