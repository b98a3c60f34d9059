"""Which weights of a folder can be packed, in which format, and why the others cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmprune_kernels.checkpoint_format import FLOATING, guard, known_as
from llmprune_kernels.huggingface import is_plain_linear
from llmprune_kernels.linear import MODULES
from llmprune_kernels.pack24 import violation24
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from llmprune.blocks import find_blocks
from llmprune.errors import InputError
from llmprune.shards import Header, Weights
from llmprune.unprunable import find_routers, is_matrix, why_not

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = ("auto", *MODULES)
PRUNE = "`llmprune prune MODEL -o OUT --pattern 2:4` makes weights that can be packed"


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer, as a folder holds it.

    Attributes:
        name: of the layer, in the model.
        key: of the tensor, in the folder.
        transposed: True if it is stored as [in, out].
        header: of the stored tensor.
        zeros: how many of its weights are zeros.
        broken: the first row and column at which it is not 2:4, or None.
    """

    name: str
    key: str
    transposed: bool
    header: Header
    zeros: int
    broken: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.header.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def parts(self, kind: str) -> dict[str, Header]:
        """The packed tensors in a format, by the last part of their names."""
        layer, (rows, columns) = MODULES[kind], self.shape
        stored = layer.count_stored(columns, rows, rows * columns - self.zeros)
        shapes = layer.shapes(columns, rows, stored)
        return {
            name: Header(dtype, shape)
            for name, dtype, shape in zip(layer.NAMES, (self.header.dtype, "U8"), shapes, strict=True)
        }

    def packed_bytes(self, kind: str) -> int:
        """Of the packed tensors."""
        return sum(header.nbytes for header in self.parts(kind).values())

    def stored(self, kind: str) -> int:
        """Values that the packed weight holds."""
        return math.prod(self.parts(kind)["values"].shape)

    def why_dense(self, kind: str) -> str | None:
        """Why it is not packed in a format, or None if it is."""
        if kind == "2:4" and self.broken is not None:
            return f"not 2:4, first at row {self.broken[0]}, column {self.broken[1]}"
        if self.packed_bytes(kind) >= self.header.nbytes:
            return f"{self.zeros / max(self.shape[0] * self.shape[1], 1):.0%} zeros: would not be smaller"
        return None


@dataclass(frozen=True)
class Choice:
    """What is packed.

    Attributes:
        kind: the format.
        packed: the layers that are.
        dense: matrices of the decoder's blocks that stay as they are, with the reason.
        decoder_parameters: all parameters of the blocks.
    """

    kind: str
    packed: list[Matrix]
    dense: dict[str, str]
    decoder_parameters: int

    @property
    def dense_bytes(self) -> int:
        """Of the packed layers' weights before."""
        return sum(one.header.nbytes for one in self.packed)

    @property
    def packed_bytes(self) -> int:
        """Of the same weights after."""
        return sum(one.packed_bytes(self.kind) for one in self.packed)

    def files_parts(self, one: Matrix) -> dict[str, Header]:
        """What the files hold in the place of a packed layer's weight, by the last part of the names."""
        first = guard(matrix.name for matrix in self.packed) == f"{one.name}.weight"
        return {**one.parts(self.kind), **({"weight": Header(one.header.dtype, (0,))} if first else {})}

    @property
    def share(self) -> float:
        """Of the decoder's parameters that are packed."""
        return sum(one.shape[0] * one.shape[1] for one in self.packed) / self.decoder_parameters


def choose(model: PreTrainedModel, weights: Weights, kind: str) -> Choice:
    """Look at every weight of the decoder's linear layers, one after the other.

    Args:
        model: built from the folder's config; it needs no weights.
        kind: a format, or auto.

    Raises:
        InputError: nothing can be packed.
    """
    candidates, dense = _linears(model)
    keys = {name: key for key in weights.headers
            if (name := known_as(key, model.base_model_prefix, candidates)) is not None}  # fmt: skip
    matrices = []
    for name, transposed in tqdm(candidates.items(), desc="looking", disable=None, leave=False):
        key = keys.get(name)
        if key is None or weights.headers[key].dtype not in FLOATING:
            stored = "stored under another name" if key is None else f"stored as {weights.headers[key].dtype}"
            dense = {name.removesuffix(".weight"): stored, **dense}
            continue
        if weights.headers[key].shape != tuple(model.get_parameter(name).shape):
            raise InputError(
                f"{key} does not have the shape that the config asks for: the checkpoint is incomplete, or its config "
                "belongs to another model"
            )
        matrices.append(_look(name.removesuffix(".weight"), key, transposed, weights))
    asked, kind = kind, _preferred(matrices) if kind == "auto" else kind
    packed = [one for one in matrices if one.why_dense(kind) is None]
    if not packed and asked == "auto":
        raise InputError(f"nothing can be packed: {_nothing(matrices, dense, '2:4')}")
    if not packed:
        raise InputError(f"no weight can be packed as {kind}: {_nothing(matrices, dense, kind)}")
    dense |= {one.name: reason for one in matrices if (reason := one.why_dense(kind)) is not None}
    blocks = find_blocks(model)
    return Choice(kind, packed, dense, sum(p.numel() for _, block in blocks for p in block.parameters()))


def _preferred(matrices: Sequence[Matrix]) -> str:
    """2:4, which many tokens at a time gain by as well, unless the bitmap packs more than twice as much."""
    fit = {kind: sum(one.header.nbytes for one in matrices if one.why_dense(kind) is None) for kind in MODULES}
    return "2:4" if fit["2:4"] and 2 * fit["2:4"] >= fit["bitmap"] else "bitmap"


def _linears(model: PreTrainedModel) -> tuple[dict[str, bool], dict[str, str]]:
    """The weights of the blocks' linear layers, True if stored as [in, out]; and what else is a matrix, and why not."""
    linears: dict[str, bool] = {}
    others: dict[str, str] = {}
    for prefix, block in find_blocks(model):
        routers = find_routers(block)
        for path, owner in block.named_modules():
            for key, parameter in owner.named_parameters(recurse=False):
                if not is_matrix(key, parameter):
                    continue
                name = ".".join(part for part in (prefix, path, key) if part)
                reason = why_not(owner, parameter, routers) or _why_not_packed(owner, key)
                if reason is None:
                    linears[name] = isinstance(owner, Conv1D)
                else:
                    others[name.removesuffix(".weight")] = reason
    return linears, others


def _why_not_packed(owner: nn.Module, key: str) -> str | None:
    """Why a matrix cannot be packed whatever its zeros, or None."""
    if not isinstance(owner, (nn.Linear, Conv1D)) or key != "weight":
        return "no linear layer"
    return None if is_plain_linear(owner) else f"{type(owner).__name__} computes in its own way"


def _look(name: str, key: str, transposed: bool, weights: Weights) -> Matrix:
    weight: Tensor = weights.read(key)
    oriented = weight.T if transposed else weight
    zeros = weight.numel() - int(weight.count_nonzero())
    return Matrix(name, key, transposed, weights.headers[key], zeros, violation24(oriented))


def _nothing(matrices: Sequence[Matrix], others: Mapping[str, str], kind: str) -> str:
    """Why the first matrix stays dense, and what to do about it where pruning helps."""
    if not matrices:
        first = next((f"{name}: {reason}" for name, reason in others.items()), "the decoder has no matrices")
        return f"{first}; pruning does not change that" if others else first
    share = sum(one.zeros for one in matrices) / max(sum(one.shape[0] * one.shape[1] for one in matrices), 1)
    return f"{matrices[0].name}: {matrices[0].why_dense(kind)}, and {share:.2%} of the weights are zeros; {PRUNE}"
