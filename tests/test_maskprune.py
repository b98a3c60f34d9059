"""Learned masks on a tiny model: the result, what is left as it was, and runs that are cut short."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import assert_same, bits
from families import restored_state
from safetensors.torch import save_file
from tiny import make_llama
from torch import Tensor
from transformers import PreTrainedModel

from llmprune import InputError, PruneConfig, PruneResult, prune
from llmprune.config import LearningOptions
from llmprune.planning import make_plan
from llmprune.structured import learning

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 30
OUTPUTS = {"self_attn.o_proj": 16, "mlp.down_proj": 1}
"""Columns of a unit."""
Failure = Callable[[Any], Any]


def learned(model: PreTrainedModel, windows: Tensor, sparsity: float = 0.4, seed: int = 0, state: Path | None = None,
            resume: bool = False, **options: Any) -> PruneResult:  # fmt: skip
    """A short run; `options` are those of learning."""
    settings = LearningOptions(**{"steps": STEPS, "passes": 5, **options})
    config = PruneConfig(
        method="maskprune", sparsity=sparsity, seed=seed, learning=settings, device="cpu", batch_size=4
    )
    return prune(model, config, tokens=windows, state=state, resume=resume)


def killed(result: Any) -> Any:
    raise KeyboardInterrupt


def not_a_number(result: Any) -> Any:
    return (math.nan, *result[1:])


def infinite_gradient(result: Any) -> Any:
    result[1]["mlp.down_proj"][0, 0] = math.inf
    return result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Counts how often a gradient is asked for; after "until" calls its result becomes that of "failure"."""
    counted: dict[str, Any] = {"count": 0, "until": math.inf, "failure": killed}
    real = learning.gradients

    def gradients(*args: Any, **kwargs: Any) -> Any:
        counted["count"] += 1
        result = real(*args, **kwargs)
        return result if counted["count"] <= counted["until"] else counted["failure"](result)

    monkeypatch.setattr(learning, "gradients", gradients)
    return counted


def widths(model: PreTrainedModel) -> set[tuple[int, int, int]]:
    """Query and key features and channels, of all blocks."""
    return {
        (b.self_attn.q_proj.out_features, b.self_attn.k_proj.out_features, b.mlp.down_proj.in_features)
        for b in model.model.layers
    }


@pytest.mark.parametrize("schedule", ["from_above", "paper"])
@pytest.mark.parametrize("sparsity", [0.2, 0.4])
def test_all_blocks_get_the_same_smaller_widths(sparsity: float, schedule: str, windows: Tensor) -> None:
    model = make_llama()
    dense = sum(p.numel() for p in model.model.layers.parameters())
    result = learned(model, windows, sparsity, schedule=schedule)
    ((queries, keys, channels),) = widths(result.model)
    assert queries == 2 * keys and keys in (8, 16) and channels < 68
    gone = 1 - sum(p.numel() for p in result.model.model.layers.parameters()) / dense
    assert sparsity <= gone < sparsity + 3 * 96 / dense
    assert [row["step"] for row in result.report.curves] == list(range(1, STEPS + 1))
    assert result.report.curves[-1]["widths"] == {"self_attn.o_proj": keys // 8, "mlp.down_proj": channels}


def test_the_same_seed_gives_the_same_weights(windows: Tensor) -> None:
    model, results = make_llama(), []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        results.append(learned(copy.deepcopy(model), windows, seed=seed))
    assert_same(results[1].model, bits(results[0].model))
    assert results[1].report.curves == results[0].report.curves != results[2].report.curves


def test_the_groups_that_go_are_those_that_the_others_make_up_for_best(windows: Tensor) -> None:
    model = make_llama()
    small = learned(copy.deepcopy(model), windows).model
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(input_ids=windows)
    for layer, cut, x in zip(model.model.layers, small.model.layers, seen, strict=True):
        weight, ridge = layer.self_attn.o_proj.weight.double(), 0.01 * x.square().sum(0).mean()
        lost = []
        for gone in (slice(0, 16), slice(16, 32)):  # two query heads of 8 each
            kept = x.clone()
            kept[:, gone] = 0.0
            damped = torch.cat([kept, ridge.sqrt() * torch.eye(32).double()])
            own = torch.cat([x, ridge.sqrt() * torch.eye(32).double()]) @ weight.T
            damped[len(x) :, gone] = 0.0
            solved = torch.linalg.lstsq(damped, own, driver="gelsd").solution
            lost.append((damped @ solved - own).square().sum().item())
        stays = 16 if lost[0] < lost[1] else 0
        assert torch.equal(cut.self_attn.q_proj.weight, layer.self_attn.q_proj.weight[stays : stays + 16])


def test_survivors_carry_their_gate_and_all_else_stays(windows: Tensor) -> None:
    model = make_llama()
    dense = bits(model)
    kept = learned(model, windows).report.widths
    assert kept is not None and kept["kept"] == {"self_attn.o_proj": 1, "mlp.down_proj": 43}
    moved = 0.0
    for name, value in model.state_dict().items():
        site = name.removesuffix(".weight").partition("layers.")[2][2:]
        if site not in OUTPUTS:
            assert torch.equal(value, dense[name]), name
            continue
        gates = []
        for now, before in zip(value.split(OUTPUTS[site], 1), dense[name].split(OUTPUTS[site], 1), strict=True):
            gate = (now * before).sum() / before.square().sum()
            torch.testing.assert_close(now, gate * before, rtol=1e-5, atol=1e-7)
            gates.append(gate.item())
        assert sum(gate != 0 for gate in gates) == kept["kept"][site]
        moved += sum(abs(gate - 1) for gate in gates if gate != 0)
    assert moved > 0.01


@pytest.mark.parametrize("options", [{"kl": 1.0}, {"kl": 0.0, "ce": 1.0}, {"kl": 0.0, "hidden": 1.0},
                                     {"kl": 0.5, "ce": 0.5, "hidden": 0.1}])  # fmt: skip
def test_every_loss_can_be_learned_from(options: dict[str, float], windows: Tensor) -> None:
    model = make_llama()
    result = learned(model, windows, **options)
    assert len(widths(result.model)) == 1
    assert all(math.isfinite(row["loss"]) for row in result.report.curves)
    assert all(bool(torch.isfinite(p).all()) for p in result.model.parameters())


def test_checkpointing_runs_blocks_again_and_finds_the_same(windows: Tensor) -> None:
    model, runs, results = make_llama(), [], []
    for checkpointing in (False, True):
        own, count = copy.deepcopy(model), [0]

        def counting(*_: object, count: list[int] = count) -> None:
            count[0] += 1

        own.model.layers[1].mlp.gate_proj.register_forward_hook(counting)
        results.append(learned(own, windows, checkpointing=checkpointing))
        runs.append(count[0])
    assert runs[1] > 1.3 * runs[0]
    assert widths(results[0].model) == widths(results[1].model)
    theirs = bits(results[1].model)
    for name, value in results[0].model.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("shown", "until"), [(100, 3), (100, 8), (100, 9), (100, 20), (100, 37), (10, 20)])
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    shown: int, until: int, windows: Tensor, tmp_path: Path, calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10 rows to be shown of 30 steps, the state is that of every third step."""
    monkeypatch.setattr(learning, "SHOWN", shown)
    model, state = make_llama(), tmp_path / "new" / "state.safetensors"
    dense = bits(model)
    whole = learned(copy.deepcopy(model), windows)
    in_all, calls["count"], calls["until"] = calls["count"], 0, until
    with pytest.raises(KeyboardInterrupt):
        learned(model, windows, state=state)
    assert state.exists() == (until > in_all - STEPS)
    assert_same(model, dense)
    calls.update(count=0, until=math.inf)
    again = learned(model, windows, state=state, resume=True)
    lost = calls["count"] - (in_all - until if until > in_all - STEPS else in_all)
    assert 0 <= lost < max(1, STEPS // shown)
    assert_same(again.model, bits(whole.model))
    assert again.report.curves == whole.report.curves


@pytest.mark.parametrize("failure", [not_a_number, infinite_gradient])
def test_a_loss_that_is_not_finite_leaves_the_last_good_state(
    failure: Failure, windows: Tensor, tmp_path: Path, calls: dict[str, Any]
) -> None:
    model, state = make_llama(), tmp_path / "state.safetensors"
    dense, before = bits(model), restored_state(model)
    whole = learned(copy.deepcopy(model), windows)
    in_all = calls["count"]
    calls.update(count=0, until=in_all - 10, failure=failure)
    with pytest.raises(InputError, match=f"step {STEPS - 9} is not finite") as error:
        learned(model, windows, state=state)
    assert "\n" not in str(error.value)
    assert_same(model, dense)
    assert restored_state(model) == before
    calls.update(count=0, until=math.inf)
    again = learned(model, windows, state=state, resume=True)
    assert calls["count"] == 10
    assert_same(again.model, bits(whole.model))
    assert again.report.curves == whole.report.curves


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "seed": lambda given: given.update(seed=1),
    "steps": lambda given: given.update(steps=STEPS + 1),
    "schedule": lambda given: given.update(schedule="paper"),
    "weights of the loss": lambda given: given.update(ce=0.5),
    "sparsity": lambda given: given.update(sparsity=0.5),
    "other windows": lambda given: given.update(windows=96 - given["windows"]),
    "windows in another order": lambda given: given.update(windows=given["windows"].flip(0)),
    "another model": lambda given: given.update(model=make_llama()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_of_another_run_is_refused(change: str, windows: Tensor, tmp_path: Path, calls: dict[str, Any]) -> None:
    given: dict[str, Any] = {"model": make_llama(), "windows": windows, "state": tmp_path / "state.safetensors"}
    calls["until"] = 20
    with pytest.raises(KeyboardInterrupt):
        learned(**given)
    calls["until"] = math.inf
    CHANGES[change](given)
    with pytest.raises(InputError, match="other settings"):
        learned(**given, resume=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "no metadata"])
def test_a_damaged_state_is_refused(damage: str, windows: Tensor, tmp_path: Path) -> None:
    model, state = make_llama(), tmp_path / "state.safetensors"
    learned(copy.deepcopy(model), windows, state=state)
    whole = state.read_bytes()
    if damage == "no metadata":
        save_file({"gates/mlp.down_proj": torch.ones(3, 68)}, state)
    else:
        state.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "noise": b"\x07" * 999}[damage])
    with pytest.raises(InputError, match="damaged") as error:
        learned(model, windows, state=state, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("resting", [[], [0]])
def test_flags_and_hooks_are_put_back(resting: list[int], windows: Tensor) -> None:
    """Also where some blocks are in evaluation mode and the others are not."""
    model = make_llama().train()
    model.model.embed_tokens.requires_grad_(False)
    for number in resting:
        model.model.layers[number].eval()
    before = [p.requires_grad for p in model.parameters()], restored_state(model)
    learned(model, windows, checkpointing=True)
    assert ([p.requires_grad for p in model.parameters()], restored_state(model)) == before


@pytest.mark.parametrize("failure", [not_a_number, infinite_gradient])
def test_a_model_that_overflows_from_the_start_is_named_as_such(
    failure: Failure, windows: Tensor, calls: dict[str, Any]
) -> None:
    calls.update(until=0, failure=failure)
    with pytest.raises(InputError, match=r"as it is is not finite .*--dtype float32"):
        learned(make_llama(), windows)


def test_the_estimate_counts_what_learning_costs() -> None:
    plans = {
        passes: make_plan(
            make_llama(), PruneConfig(method="maskprune", learning=LearningOptions(passes=passes), dataset="x.txt")
        )
        for passes in (10, 40)
    }
    assert plans[40].passes - plans[10].passes == pytest.approx(4 * 30)
    needed = [size for what, size in plans[40].memory.items() if what.startswith("learning")]
    assert len(needed) == 1 and needed[0] > 3 * 4 * 32**2  # a Gram matrix of each block's output projection
    saving = PruneConfig(method="maskprune", learning=LearningOptions(checkpointing=True), dataset="x.txt")
    assert sum(make_plan(make_llama(), saving).memory.values()) < sum(plans[40].memory.values())
    one_shot = make_plan(make_llama(), PruneConfig(method="wanda", pattern="uniform", dataset="x.txt"))
    assert one_shot.passes < 3 and not [what for what in one_shot.memory if what.startswith("learning")]


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}])
def test_the_best_state_is_kept_not_the_last(
    options: dict[str, int], windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a loss that is told to be least at the second look."""
    seen: list[list[float]] = []
    told = iter([3.0, 1.0, 2.0, 1.5, 4.0, 4.0, 4.0, 4.0])

    def looked(gates: Any, *rest: Any) -> float:
        seen.append(gates.values["mlp.down_proj"].flatten().tolist())
        return next(told)

    monkeypatch.setattr(learning, "mean_loss", looked)
    game: list[Any] = []
    real = learning.learn_gates
    monkeypatch.setattr("llmprune.criteria.maskprune.learn_gates", lambda *a: game.append(real(*a)) or game[0])
    learned(make_llama(), windows, **options)
    assert game[0].gates["mlp.down_proj"].flatten().tolist() == seen[1] != seen[-1]


def test_the_loss_that_decides_is_that_of_all_windows(windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In small batches as in one piece."""
    found: list[tuple[float, float]] = []
    real = learning.mean_loss

    def looked(gates: Any, loss: Any, text: Tensor, batch_size: int) -> float:
        value = real(gates, loss, text, batch_size)
        with torch.no_grad(), gates.applied():
            found.append((value, loss(windows).item()))
        return value

    monkeypatch.setattr(learning, "mean_loss", looked)
    learned(make_llama(), windows)
    for value, whole in found:
        assert value == pytest.approx(whole, rel=1e-4) and value > 1e-4
    assert len({value for value, _ in found}) > 3


def test_resuming_without_a_state_is_said(windows: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_llama()
    plain = learned(copy.deepcopy(model), windows)
    again = learned(model, windows, state=tmp_path / "absent.safetensors", resume=True)
    assert "nothing to resume" in caplog.text and "absent.safetensors" in caplog.text
    assert_same(again.model, bits(plain.model))
