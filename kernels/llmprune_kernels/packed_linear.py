"""What linear layers whose weight stays packed have in common: torch.nn.Linear's interface, for inference.

The canonical tensors are parameters and buffers like any others, so that loading, saving and moving work by torch's
own means. On a device with kernels the device's layout takes their place; before the module moves, and in its state
dict, the canonical ones come back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llmprune_kernels.defaults import default_layout
from llmprune_kernels.format import FormatError, check_matrix
from llmprune_kernels.layouts import LAYOUTS
from llmprune_kernels.op import nm_linear, refuse_tangent

if TYPE_CHECKING:
    from typing_extensions import Self


class PackedLinear(nn.Module, ABC):
    """y = x W^T + bias with a packed W [out, in]; no gradients.

    Attributes:
        in_features: in.
        out_features: out.
        layout: the layout in memory, a name in LAYOUTS.
    """

    FORMAT: ClassVar[str]
    CANONICAL: ClassVar[str]  # the canonical form's layout
    NAMES: ClassVar[tuple[str, str]]  # the canonical form's tensors

    def __init__(self, in_features: int, out_features: int, tensors: tuple[Tensor, ...], bias: Tensor | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layout = self.CANONICAL
        self._set_canonical(tensors)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Pack a weight [out, in].

        Raises:
            FormatError: it does not fit the format, or the bias does not fit the weight.
        """
        check_matrix(weight)
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise FormatError(
                f"a bias {list(bias.shape)} of {bias.dtype} does not go with a weight {list(weight.shape)} of "
                f"{weight.dtype}: give [{weight.shape[0]}] of {weight.dtype}"
            )
        packed = cls._pack(weight)
        return cls(weight.shape[1], weight.shape[0], tuple(getattr(packed, name) for name in cls.NAMES), bias)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, stored: int, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> Self:
        """A layer whose tensors are yet to be loaded.

        Args:
            stored: values that the packed weight holds.

        Raises:
            FormatError: a matrix of this size cannot hold so many.
        """
        values, marks = cls.shapes(in_features, out_features, stored)
        tensors = (
            torch.empty(values, dtype=dtype, device=device),
            torch.empty(marks, dtype=torch.uint8, device=device),
        )
        own = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        return cls(in_features, out_features, tensors, own)

    @classmethod
    @abstractmethod
    def count_stored(cls, in_features: int, out_features: int, nonzero: int) -> int:
        """How many values a packed matrix [out, in] holds, of which so many are not zero."""

    @classmethod
    @abstractmethod
    def shapes(cls, in_features: int, out_features: int, stored: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the canonical tensors, in the order of NAMES.

        Raises:
            FormatError: a matrix of this size cannot hold so many values.
        """

    @staticmethod
    @abstractmethod
    def _pack(weight: Tensor) -> Any: ...

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The weight [out, in]; exact."""

    @abstractmethod
    def check(self) -> None:
        """The canonical tensors fit each other and hold nothing impossible.

        Raises:
            FormatError: they do not.
        """

    @property
    def packed(self) -> Any:
        """The canonical form, whatever the layout."""
        return LAYOUTS[self.layout].restore(self._tensors(), self.out_features, self.in_features)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weight takes in its layout."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def dtype(self) -> torch.dtype:
        """The weight's dtype, which x must have; a layout may keep the weights' bits as integers."""
        return self._laid_out_dtype if self.layout != self.CANONICAL else getattr(self, self.NAMES[0]).dtype

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], both in the weight's dtype; autocast casts x to it.

        Raises:
            ValueError: x has another width or dtype.
            RuntimeError: under forward-mode differentiation; backward passes raise it, too.
        """
        refuse_tangent(x)
        if x.is_floating_point() and _autocast_is_on(x.device.type):
            x = x.to(self.dtype)
        if x.shape[-1:] != (self.in_features,) or x.dtype != self.dtype:
            raise ValueError(
                f"x is {list(x.shape)} of {x.dtype}: a packed layer {self.in_features} -> {self.out_features} "
                f"takes [..., {self.in_features}] of {self.dtype}"
            )
        y: Tensor = nm_linear(x, self._tensors(), self.bias, self.out_features, self.layout)
        return y

    def use_layout(self, layout: str) -> None:
        """Keep the weight in another layout from now on; the one before it is freed.

        Raises:
            ValueError: there is no such layout for this format, or it does not take this weight; the layout stays.
        """
        if layout == self.layout:
            return
        if layout not in LAYOUTS or LAYOUTS[layout].form is not LAYOUTS[self.CANONICAL].form:
            raise ValueError(f"a {self.FORMAT} weight has no layout {layout!r}")
        packed = self.packed
        tensors = LAYOUTS[layout].prepare(packed)
        self._drop()
        self.layout = layout
        if layout == self.CANONICAL:
            self._set_canonical(tuple(tensors))
            return
        self._laid_out_dtype: torch.dtype = packed.values.dtype
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"laid_out_{i}", tensor, persistent=False)

    def use_default_layout(self) -> None:
        """Keep the weight in the layout that its device runs best."""
        self.use_layout(self.CANONICAL)
        self.use_layout(default_layout(self.CANONICAL, getattr(self, self.NAMES[0])))

    def _tensors(self) -> list[Tensor]:
        """The layout's tensors."""
        if self.layout == self.CANONICAL:
            return [getattr(self, name) for name in self.NAMES]
        return [buffer for name, buffer in self._buffers.items() if name.startswith("laid_out_") and buffer is not None]

    def _drop(self) -> None:
        """Let go of the tensors of the present layout."""
        if self.layout == self.CANONICAL:
            for name in self.NAMES:
                setattr(self, name, None)
        else:
            for name in [name for name in self._buffers if name.startswith("laid_out_")]:
                delattr(self, name)

    def _set_canonical(self, tensors: tuple[Tensor, ...]) -> None:
        values, marks = tensors
        self.register_parameter(self.NAMES[0], nn.Parameter(values, requires_grad=False))
        self.register_buffer(self.NAMES[1], marks)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Layouts belong to a device and a dtype: move the canonical form, and lay it out anew where it arrives."""
        layout = self.layout
        self.use_layout(self.CANONICAL)
        before = self._kind()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._kind() == before:
            self.use_layout(layout)
        else:
            self.use_default_layout()
        return self

    def _kind(self) -> tuple[str, torch.dtype]:
        """What a layout is chosen for."""
        values: Tensor = getattr(self, self.NAMES[0])
        return values.device.type, values.dtype

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As if the weight lay in its canonical form."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != self.CANONICAL:
            packed = self.packed
            destination.update({prefix + name: getattr(packed, name) for name in self.NAMES})

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        """Into the canonical form, which is then laid out as the weight was before."""
        layout = self.layout
        self.use_layout(self.CANONICAL)
        super()._load_from_state_dict(*arguments, **options)
        self.use_layout(layout)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, layout={self.layout}"


def _autocast_is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
