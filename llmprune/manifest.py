"""The account of a run that lies beside the weights: where it is, and how it is read back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llmprune_eval.result import MANIFEST

from llmprune.errors import InputError


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What was written beside the weights, or None if nothing was.

    Raises:
        InputError: the file is damaged, or of something else.
    """
    path = folder / MANIFEST
    try:
        if not os.path.isfile(path):  # False for a name that cannot be
            return None
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it to inspect the weights alone") from error
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(k), dict) for k in ("config", "versions")):
        raise InputError(f"{path} is no manifest of llmprune: delete it to inspect the weights alone")
    return manifest
