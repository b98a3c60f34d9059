"""Evaluation of causal language models: perplexity by the papers' protocol and divergence from a dense model.

A leaf: it needs torch and transformers, and knows nothing of how a model was pruned.
"""

from llmprune_eval.errors import InputError
from llmprune_eval.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "InputError", "evaluate"]
