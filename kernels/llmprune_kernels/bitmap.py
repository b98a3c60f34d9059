"""Unstructured weights as a bitmap and the values it marks: at 50 % also 0.5625 of the 16-bit bytes.

The form has no rule about which weights are kept, so every matrix fits; it is smaller than the dense one wherever
more than 1/16 of the weights are zeros (16 bits). Bit by bit exact but for the sign of negative zeros, which are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune_kernels.format import DTYPES, FormatError, check_matrix

BITS = 8


@dataclass(frozen=True)
class PackedBitmap:
    """A matrix [out, in] with any zeros.

    Attributes:
        values: [stored], the weights that are not zero, row by row.
        bitmap: uint8 [out, ceil(in / 8)]; bit i of byte j, the lowest first, says that input 8j + i is stored.
        columns: in.
    """

    values: Tensor
    bitmap: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that is packed."""
        return self.bitmap.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of values and bitmap."""
        return self.values.nbytes + self.bitmap.nbytes


def pack_bitmap(weight: Tensor) -> PackedBitmap:
    """Pack a matrix [out, in], floating point.

    Raises:
        FormatError: `weight` is no such matrix.
    """
    check_matrix(weight)
    weight = weight.detach()  # a packed form has no gradients and must not keep a graph alive
    present = weight != 0
    padded = torch.nn.functional.pad(present, (0, -weight.shape[1] % BITS)).unflatten(1, (-1, BITS))
    weights = (1 << torch.arange(BITS, device=weight.device)).to(torch.uint8)
    bitmap = (padded * weights).sum(2, dtype=torch.uint8)
    return PackedBitmap(weight[present], bitmap, weight.shape[1])


def unpack_bitmap(packed: PackedBitmap) -> Tensor:
    """The matrix [out, in] that was packed, in the values' dtype.

    Raises:
        FormatError: bitmap and values do not fit each other.
    """
    return spread(packed, _checked_marks(packed))


def spread(packed: PackedBitmap, marks: Tensor) -> Tensor:
    """The matrix [out, in] with the values where the bitmap's marks are; unchecked, so that no GPU is waited for."""
    return packed.values.new_zeros(packed.shape).masked_scatter_(marks[:, : packed.columns], packed.values)


def check_bitmap(packed: PackedBitmap) -> None:
    """As many values as marks, all marks inside the matrix.

    Raises:
        FormatError: it is not so.
    """
    _checked_marks(packed)


def _checked_marks(packed: PackedBitmap) -> Tensor:
    """The marks, bool [out, 8 * bytes], of a bitmap that passes check_bitmap."""
    bitmap, columns = packed.bitmap, packed.columns
    if bitmap.dtype != torch.uint8 or bitmap.dim() != 2 or bitmap.shape[1] != -(-columns // BITS):
        raise FormatError(
            f"bitmap {bitmap.dtype} {tuple(bitmap.shape)} does not fit a weight of {columns} columns: "
            f"torch.uint8 (rows, {-(-columns // BITS)}) does"
        )
    if packed.values.dim() != 1 or packed.values.dtype not in DTYPES:
        raise FormatError(
            f"values {packed.values.dtype} {tuple(packed.values.shape)} are no list of the stored weights, row by row"
        )
    marks = marked(bitmap)
    if bool(marks[:, columns:].any()):
        raise FormatError(f"bitmap marks weights beyond the last of its {columns} columns")
    if int(marks.sum()) != packed.values.numel():
        raise FormatError(f"bitmap marks {int(marks.sum())} weights, but {packed.values.numel()} are stored")
    return marks


def marked(bitmap: Tensor) -> Tensor:
    """Bitmap [out, bytes] as bool [out, 8 * bytes]."""
    shifts = torch.arange(BITS, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap.unsqueeze(2) >> shifts) & 1).flatten(1).bool()
