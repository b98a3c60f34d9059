"""Linear layers of the models that people run, with q/k/v and gate/up fused as serving engines fuse them."""

from __future__ import annotations

from dataclasses import dataclass

BYTES = 2  # of a 16-bit weight


@dataclass(frozen=True)
class Layer:
    """A weight [outputs, inputs]; its name is model:layer."""

    name: str
    outputs: int
    inputs: int

    @property
    def megabytes(self) -> float:
        """Of the dense weight in 16 bits."""
        return self.outputs * self.inputs * BYTES / 1e6


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model's config that its linear layers follow from; heads are `head` wide."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    head: int = 128

    @property
    def layers(self) -> tuple[Layer, ...]:
        """qkv, o, gate_up and down of one decoder block."""
        attention = self.heads * self.head
        sides = {
            "qkv": (attention + 2 * self.kv_heads * self.head, self.hidden),
            "o": (self.hidden, attention),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }
        return tuple(Layer(f"{self.name}:{name}", *side) for name, side in sides.items())


MODELS = (
    Architecture("Llama-3-8B", 4096, 32, 8, 14336),
    Architecture("Llama-2-7B", 4096, 32, 32, 11008),
    Architecture("Llama-3-70B", 8192, 64, 8, 28672),
    Architecture("Qwen2.5-7B", 3584, 28, 4, 18944),
)
LAYERS = {layer.name: layer for model in MODELS for layer in model.layers}
QUICK = ("Llama-3-8B:o", "Llama-2-7B:down", "Llama-3-8B:gate_up")  # one of each size that has a target


def chosen(names: list[str] | None) -> list[Layer]:
    """Layers by the names of layers or of whole models, each shape once; all of them for None.

    Raises:
        ValueError: no layer and no model has that name.
    """
    layers = list(LAYERS.values())
    if names is not None:
        for name in names:
            if not any(name in (layer.name, layer.name.split(":")[0]) for layer in layers):
                known = ", ".join(model.name for model in MODELS)
                raise ValueError(f"no layer or model {name!r}: the models are {known}, a layer is {layers[0].name}")
        layers = [layer for name in names for layer in layers if name in (layer.name, layer.name.split(":")[0])]
    shapes = {(layer.outputs, layer.inputs): layer for layer in reversed(layers)}
    return sorted(shapes.values(), key=layers.index)
