"""2:4 weights in 0.5625 of their 16-bit bytes: the two kept values of every group of four, and where they stood.

This is the canonical form: what a checkpoint stores, what the reference reads, and what every other layout is
made from. It holds the weights bit by bit. A zero takes a slot only where a group has fewer than two weights, and
-0.0 is a zero: its sign is kept where its group has room for all of its negative zeros, and lost otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune_kernels.format import DTYPES, FormatError, check_matrix, violation

GROUP, KEPT = 4, 2
ROWS_AT_ONCE = 1 << 22  # elements; bounds the memory of temporary indices


def _code(present: int) -> int:
    """The 4-bit code i0 | i1 << 2, i0 < i1, of a group whose bits `present` say which of its four slots are filled."""
    filled = [i for i in range(GROUP) if present >> i & 1]
    spare = [i for i in range(GROUP) if not present >> i & 1]
    first, second = sorted((filled + spare)[:KEPT])
    return first | second << 2


CODES = tuple(_code(present) for present in range(16))
VALID = frozenset(CODES)


@dataclass(frozen=True)
class Packed24:
    """A 2:4 matrix [out, in].

    Attributes:
        values: [out, 2 * groups], the weights' dtype; groups = ceil(in / 4).
        positions: uint8 [out, ceil(groups / 2)]; group 2i in the low four bits of byte i, group 2i + 1 in the high
            four, each as i0 | i1 << 2 with i0 < i1, the slots of its two values.
        columns: in.
    """

    values: Tensor
    positions: Tensor
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that is packed."""
        return self.values.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of values and positions."""
        return self.values.nbytes + self.positions.nbytes


def packed_shapes(out_features: int, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of values and positions for a matrix [out, in]."""
    groups = -(-in_features // GROUP)
    return (out_features, KEPT * groups), (out_features, -(-groups // 2))


def pack24(weight: Tensor) -> Packed24:
    """Pack a matrix in which every group of four consecutive inputs holds at most two weights.

    Args:
        weight: [out, in], floating point; the last group may be short.

    Raises:
        FormatError: a group holds more (the first row and column are named), or `weight` is no such matrix.
    """
    check_matrix(weight)
    broken = violation24(weight)
    if broken is not None:
        row, column = broken
        group = weight[row, column : column + GROUP].tolist()
        raise FormatError(
            f"not 2:4 at row {row}, column {column}: {group} holds {sum(w != 0 for w in group)} weights, 2 are allowed"
        )
    values_shape, positions_shape = packed_shapes(*weight.shape)
    values = weight.new_empty(values_shape)
    positions = torch.empty(positions_shape, dtype=torch.uint8, device=weight.device)
    for rows in _row_slices(weight):
        groups = _padded(weight[rows], GROUP).unflatten(1, (-1, GROUP))
        present = _present(groups)
        codes = _codes(present)
        kept = as_integers(groups.masked_fill(~present, 0)).gather(2, _slots(codes))
        values[rows] = kept.flatten(1).view(weight.dtype)
        positions[rows] = positions24(codes)
    return Packed24(values, positions, weight.shape[1])


def violation24(weight: Tensor) -> tuple[int, int] | None:
    """The first row and column at which a group of four inputs of [out, in] holds three weights or four, or None."""
    return violation(_padded(weight, GROUP), KEPT, GROUP)


def unpack24(packed: Packed24) -> Tensor:
    """The matrix [out, in] that was packed; exact, in the values' dtype.

    Raises:
        FormatError: the tensors do not fit each other, or a position is none.
    """
    check24(packed)
    values = as_integers(packed.values).unflatten(1, (packed.values.shape[1] // KEPT, KEPT))
    out = values.new_zeros(*values.shape[:2], GROUP)
    for rows in _row_slices(out.flatten(1)):
        slots = _slots(codes24(packed.positions[rows], out.shape[1]))
        out[rows].scatter_(2, slots, values[rows])
    matrix: Tensor = out.flatten(1)[:, : packed.columns].contiguous().view(packed.values.dtype)
    return matrix


def codes24(positions: Tensor, groups: int) -> Tensor:
    """Positions [out, bytes] as one code i0 | i1 << 2 per group, uint8 [out, groups]."""
    return torch.stack((positions & 15, positions >> 4), dim=-1).flatten(1)[:, :groups]


def positions24(codes: Tensor) -> Tensor:
    """One code per group, uint8 [out, groups], as positions [out, ceil(groups / 2)]; codes24 backwards."""
    codes = _padded(codes, 2, CODES[0])
    return codes[:, 0::2] | codes[:, 1::2] << 4


def check24(packed: Packed24) -> None:
    """Shapes that fit, and positions that exist.

    Raises:
        FormatError: they do not.
    """
    shapes = tuple(packed.values.shape), tuple(packed.positions.shape)
    wanted = packed_shapes(*packed.shape)
    if shapes != wanted:
        raise FormatError(f"values {shapes[0]} and positions {shapes[1]} do not fit: {wanted[0]} and {wanted[1]} do")
    if packed.values.dtype not in DTYPES or packed.positions.dtype != torch.uint8:
        raise FormatError(
            f"values are {packed.values.dtype} and positions {packed.positions.dtype}: "
            "they must be 16, 32 or 64 bit floats and torch.uint8"
        )
    known = torch.zeros(256, dtype=torch.bool)
    known[[low | high << 4 for low in VALID for high in VALID]] = True
    good = known.to(packed.positions.device)[packed.positions.int()]
    if not bool(good.all()):
        row, byte = (int(i) for i in (~good).nonzero()[0])
        raise FormatError(f"position byte {int(packed.positions[row, byte]):#04x} at row {row}, byte {byte} is damaged")


def _present(groups: Tensor) -> Tensor:
    """What takes a slot in groups [rows, groups, 4]: all weights, and the negative zeros where all have room."""
    weight = groups != 0
    signed = weight | torch.signbit(groups)
    return torch.where((signed.sum(2) <= KEPT).unsqueeze(2), signed, weight)


def _codes(present: Tensor) -> Tensor:
    """One code per group of bool [rows, groups, 4]."""
    bits = (present << torch.arange(GROUP, device=present.device)).sum(2)
    return torch.tensor(CODES, dtype=torch.uint8, device=present.device)[bits]


def as_integers(values: Tensor) -> Tensor:
    """The same memory as integers: torch's gather of bfloat16 on a CPU gives NaN other bits."""
    return values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _slots(codes: Tensor) -> Tensor:
    """[rows, groups] codes as int64 [rows, groups, 2] slots."""
    return torch.stack((codes & 3, codes >> 2), dim=-1).long()


def _padded(matrix: Tensor, multiple: int, fill: float = 0) -> Tensor:
    """[rows, columns] with columns up to the next multiple."""
    short = -matrix.shape[1] % multiple
    return torch.nn.functional.pad(matrix, (0, short), value=fill) if short else matrix


def _row_slices(matrix: Tensor) -> list[slice]:
    """Rows cut so that no part holds many more than ROWS_AT_ONCE elements."""
    rows = max(1, ROWS_AT_ONCE // max(1, matrix.shape[1]))
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]
