"""All layouts by name.

A model holds its weights in one of them and can always go back to the canonical form, so that what runs on a GPU
still saves the checkpoint it was loaded from.
"""

from __future__ import annotations

from typing import Any

from llmprune_kernels.bitmap_kernel import BITMAP_ROWS
from llmprune_kernels.both import both
from llmprune_kernels.decode import DECODE
from llmprune_kernels.layout import Layout
from llmprune_kernels.portable import PORTABLE
from llmprune_kernels.prefill import PREFILL
from llmprune_kernels.reference import BITMAP, VALUES

LAYOUTS: dict[str, Layout[Any]] = {
    "values": VALUES,
    "decode": DECODE,
    "portable": PORTABLE,
    "prefill": PREFILL,
    "both": both(DECODE, PREFILL),
    "bitmap": BITMAP,
    "bitmap-rows": BITMAP_ROWS,
}
