"""A site: one prunable weight matrix, always seen as [out, in].

It is an nn.Linear, a Conv1D (stored [in, out]), or one expert's slice of a fused 3-D parameter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from llmprune.errors import InputError
from llmprune.inputs import InputStatistics
from llmprune.patterns import Pattern


@dataclass(frozen=True)
class Target:
    """The linear map that pruning approximates.

    Attributes:
        weight: [out, in] float32.
        mean: [out] float32, of its output over the calibration tokens, the site's present bias left out.
    """

    weight: Tensor
    mean: Tensor


@dataclass(eq=False)
class Site:
    """One prunable weight matrix.

    Attributes:
        name: dotted path of the module (or of the fused parameter, then the expert's number).
        module: the module that owns the parameter.
        parameter: the parameter's name in the module.
        index: the expert's number in a fused 3-D parameter, else None.
        transposed: True if the storage is [in, out].
        statistics: what was seen of the inputs; None before collecting, or without calibration data.
        fed_by_norm: True if the input is the output of a norm of the same block; None if not observed.
        target: what the site is to return instead of its own weights' output; None means that.
        pattern: what may be pruned here, where that is not the whole run's pattern.
        pooled: True if too few tokens came and the statistics are those of all its sibling experts.
    """

    name: str
    module: nn.Module
    parameter: str
    index: int | None = None
    transposed: bool = False
    statistics: InputStatistics | None = None
    fed_by_norm: bool | None = None
    target: Target | None = None
    pattern: Pattern | None = None
    pooled: bool = False

    @property
    def stored(self) -> nn.Parameter:
        """The parameter that holds the weight, possibly among other experts' weights."""
        parameter = getattr(self.module, self.parameter)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def weight(self) -> Tensor:
        """[out, in], a view: what is written to it is written to the model."""
        data = self.stored.data
        if self.index is not None:
            data = data[self.index]
        return data.T if self.transposed else data

    @property
    def goal(self) -> Tensor:
        """[out, in] float32: the weights that pruning approximates, the site's own unless it has a target."""
        return self.weight.float() if self.target is None else self.target.weight

    def bias_shift(self, weight: Tensor) -> Tensor:
        """[out] float32: what the bias must gain for `weight` [out, in] to return the wanted mean."""
        assert self.statistics is not None
        if self.target is None:
            return (self.weight.float() - weight) @ self.statistics.mean
        return self.target.mean - weight @ self.statistics.mean

    def without_tokens(self) -> InputError:
        """The error of a site that calibration has not reached."""
        return InputError(
            f"{self.name} received no calibration token: use more calibration text, or leave it unpruned with "
            f"--ignore {self.name}"
        )

    def forget(self) -> None:
        """Let go of what was measured."""
        self.statistics = self.target = None

    @property
    def bias(self) -> Tensor | None:
        """[out], a view of the bias that is added to this site's output, or None."""
        name = "bias" if self.index is None else f"{self.parameter}_bias"
        bias = getattr(self.module, name, None)
        if not isinstance(bias, nn.Parameter):
            return None
        return bias.data if self.index is None else bias.data[self.index]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        shape = self.stored.shape[-2:]
        return (shape[1], shape[0]) if self.transposed else (shape[0], shape[1])

    @property
    def role(self) -> str:
        """The last part of the name that is no number: q_proj, c_fc, down_proj."""
        return [part for part in self.name.split(".") if not part.isdigit()][-1]

    @property
    def family(self) -> str:
        """The name with numbers starred: experts of one block that play the same part share it."""
        return re.sub(r"\.\d+(?=\.|$)", ".*", self.name)

    def write_(self, weight: Tensor, keep: Tensor, bias_shift: Tensor | None = None) -> None:
        """Store the pruned weight [out, in] (True in `keep` [out, in] survives) and move the bias [out].

        Casts to the stored dtype once. No negative zero is left behind: packed 2:4 formats and bitwise
        comparisons would take it for a weight.
        """
        target = self.weight
        target.copy_(weight.masked_fill(~keep, 0.0))
        target.masked_fill_(target == 0, 0.0)
        if bias_shift is not None:
            bias = self.bias
            assert bias is not None, f"{self.name} has no bias to move"
            bias.copy_(bias.float() + bias_shift)
