"""Decoding from a recorded step: the same tokens as the plain loop, and no word from the CPU in between."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
import torch
from families import FAMILIES
from llmprune_eval import InputError
from llmprune_eval.captured import captured
from llmprune_eval.speed import Load, greedy
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune import bench_command

# Sliding windows, in some layers at least, or recurrent states; with the sizes that these tests give them.
WINDOWS = "mistral gemma2 gemma3 qwen2 starcoder2 mixtral gpt_oss qwen3_next".split()
# They look at values on the CPU, or a static cache of theirs fails or is another in some versions of transformers.
OTHERS = ["falcon_alibi", "mpt", "opt", "bloom", "gemma4"]
STATIC = [name for name in FAMILIES if name not in WINDOWS + OTHERS]
NEW = 5


class Silence(TorchDispatchMode):
    """Refuses what makes a CPU wait for a GPU: a graph cannot be captured with it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert not any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "masked_select"))
        return function(*args, **(kwargs or {}))


def silently(step: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
    for _ in range(3):
        step()
        rewind()

    def replay() -> None:
        with Silence():
            step()

    return replay


@pytest.mark.parametrize("name", STATIC)
@torch.no_grad()
def test_recorded_steps_write_what_plain_ones_write(name: str) -> None:
    model = FAMILIES[name].build()
    tokens = torch.randint(0, model.config.get_text_config().vocab_size - 1, (2, 9))
    found = [token.clone() for token in islice(captured(model, tokens, NEW, silently), NEW + 1)]
    assert torch.cat(found, 1).equal(torch.cat(list(islice(greedy(model, tokens), NEW + 1)), 1))


@torch.no_grad()
def test_the_last_positions_of_a_model_can_be_timed() -> None:
    model = FAMILIES["gpt2"].build()
    tokens = torch.randint(0, 60, (1, model.config.max_position_embeddings - 1))
    assert len(list(islice(captured(model, tokens, 1, silently), 2))) == 2


@pytest.mark.parametrize("name", WINDOWS)
@torch.no_grad()
def test_what_a_graph_cannot_repeat_is_refused(name: str) -> None:
    model = FAMILIES[name].build()
    with pytest.raises(InputError, match=r"sliding windows or recurrent states: .* pass --no-graph"):
        next(captured(model, torch.ones(1, 3, dtype=torch.long), NEW, silently))


def test_the_protocol_names_the_graph_only_where_there_is_one() -> None:
    plain, graph = Load(1, 8, 4).protocol(), Load(1, 8, 4, graph=True).protocol()
    assert plain == {"batch_size": 1, "prompt": 8, "new_tokens": 4}
    assert graph == plain | {"graph": "one CUDA graph per step, static cache"}


def test_a_graph_is_for_gpus() -> None:
    with pytest.raises(InputError, match="--graph: CUDA graphs run on NVIDIA GPUs, not on cpu: leave it out"):
        bench_command.bench_command("anything", graph=True, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@torch.no_grad()
def test_a_captured_step_writes_what_plain_ones_write() -> None:
    model = FAMILIES["llama"].build().cuda()
    tokens = torch.randint(0, model.config.vocab_size, (2, 9), device="cuda")
    found = [token.clone() for token in islice(captured(model, tokens, NEW), NEW + 1)]
    assert torch.cat(found, 1).equal(torch.cat(list(islice(greedy(model, tokens), NEW + 1)), 1))
