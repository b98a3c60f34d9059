"""Run in a fresh process, without this package: load a checkpoint plainly and say what it computes.

Usage: python - DIR TOKENS.safetensors ANSWER.safetensors DEVICE. Imports transformers alone, so that what it proves
holds on a machine where nothing else is installed.
"""

import hashlib
import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the names and bytes of all parameters, by name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def main(directory: str, tokens: str, answer: str, device: str) -> None:
    """Write logits, fingerprint and missing or unexpected keys to the answer file."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    model, info = loaded[0].to(device).eval(), loaded[1]
    with torch.no_grad():
        logits = model(input_ids=load_file(tokens)["tokens"].to(device)).logits
    keys = [str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    facts = {"fingerprint": fingerprint(model), "keys": json.dumps(keys)}
    save_file({"logits": logits.float().cpu().contiguous()}, answer, metadata=facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
