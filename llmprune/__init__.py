"""One-shot pruning of Hugging Face causal language models.

from llmprune import prune, PruneConfig
result = prune("folder", PruneConfig(method="wanda", pattern="2:4", dataset="text.jsonl"))
result.save("pruned")
"""

from llmprune_kernels.huggingface import register

from llmprune.config import PruneConfig
from llmprune.errors import InputError
from llmprune.prune import PruneResult, prune

__all__ = ["InputError", "PruneConfig", "PruneResult", "prune"]
__version__ = "0.1.0"

register()  # from now on transformers opens packed checkpoints
