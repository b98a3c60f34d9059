"""What every output folder says of itself: a card that the Hub reads, a page, and both kept up with measurements."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from llmprune_eval.result import RESULT, Part, Result
from tiny import make_llama

from llmprune import InputError, PruneConfig, checkpoint, prune
from llmprune.explain import refresh
from llmprune.pages.card import BEGIN, END

Ok = Callable[..., str]
pytestmark = pytest.mark.usefixtures("unproved")


@pytest.fixture
def pruned(dense: Path, data: Path, tmp_path: Path, ok: Ok) -> Path:
    """A folder with 2:4, calibrated on ready windows."""
    (dense / "README.md").write_text("---\nlicense: mit\n---\n# The dense one\n", encoding="utf-8")
    ok("prune", dense, "-o", "out", "--method", "wanda", "--pattern", "2:4", "--dataset", data / "a.npy",
       "--nsamples", 9)  # fmt: skip
    return tmp_path / "out"


def measure(folder: Path, value: float, against: Path) -> None:
    """As `llmprune eval` leaves it."""
    protocol = {"dataset": "val.jsonl", "seqlen": 24, "tokens": 92, "against": str(against)}
    values = {"perplexity": value, "dense_perplexity": 7.125, "kl": 0.375}
    Result({"name": str(folder)}, path=folder / RESULT).add(Part("perplexity", "val.jsonl", protocol, values))


def test_the_card_says_what_was_done(pruned: Path, dense: Path, data: Path) -> None:
    card = ModelCard.load(pruned / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "license": "mit",
        "tags": ["llmprune", "pruned", "wanda", "sparse"]}  # fmt: skip
    manifest = json.loads((pruned / "llmprune.json").read_text())
    for part in (
        f"`{dense}`",
        "2 of every 4 consecutive input weights are kept",
        f"{manifest['pruned']:,} weights were set to zero: 50.00% of those at pruned sites",
        f"9 windows of {manifest['calibration']['seqlen']} tokens, sha256 {manifest['calibration']['sha256']}",
        manifest["command"],
        f"| dense | {manifest['perplexity_before']:.4g} |",
        f"| out | {manifest['perplexity_after']:.4g} |",
        "the file does not shrink",
        'AutoModelForCausalLM.from_pretrained("out", dtype="auto")',
        f"torch {torch.__version__}",
    ):
        assert part in card.content, part
    assert "speed" not in card.content.partition(BEGIN)[2].partition(END)[0], "none was measured"
    assert manifest["command"] == (
        f"llmprune prune {dense} -o OUT --method wanda --pattern 2:4 --dataset {data / 'a.npy'} "
        "--num-calibration-samples 9"
    )


def test_a_smaller_model_says_its_shapes(dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    ok("prune", dense, "-o", "out", "--method", "obs", "--dataset", data / "a.npy", "--nsamples", 9)
    kinds = json.loads((tmp_path / "out" / "llmprune.json").read_text())["widths"]["kinds"]
    card = (tmp_path / "out" / "README.md").read_text()
    for kind in kinds:
        assert f"every block: {kind['before']} to {kind['after']} {kind['units']}" in card
    assert "A smaller ordinary model" in card and "does not shrink" not in card


def test_the_code_of_the_card_loads_the_model(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (pruned / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(pruned.parent)
    names: dict[str, object] = {}
    exec(code, names)
    assert {"model", "tokenizer"} <= set(names)


def test_a_model_of_the_hub_is_named_as_such(windows: torch.Tensor, tmp_path: Path) -> None:
    model = make_llama()
    model.name_or_path = "someone/small-llama"
    result = prune(model, PruneConfig(method="magnitude"), tokens=windows)
    data = ModelCard.load(result.save(tmp_path / "out") / "README.md").data
    assert (data.base_model, data.license) == ("someone/small-llama", None)
    assert "AutoTokenizer" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "head", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "no head", "---\nlicense: [mit, x]\n---\n"]
)
def test_a_license_that_nobody_can_read_is_left_out(head: str, dense: Path, tmp_path: Path, ok: Ok) -> None:
    (dense / "README.md").write_text(head, encoding="utf-8")
    ok("prune", dense, "-o", "out", "--method", "magnitude")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license is None


def test_new_measurements_change_the_results_alone(pruned: Path, dense: Path) -> None:
    path = pruned / "README.md"
    path.write_text(path.read_text().replace("# out\n", "# My own words\n") + "\nAnd an end of mine.\n")
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    for value in (12.375, 12.625):
        measure(pruned, value, dense)
        refresh(pruned)
    text = path.read_text()
    assert text.startswith(before) and text.endswith(after) and text.count(BEGIN) == text.count(END) == 1
    section = text.partition(BEGIN)[2].partition(END)[0]
    for part in ("12.62", "7.125", "0.375", '"seqlen": 24', "held-out calibration text"):
        assert part in section
        assert part in (pruned / "report.html").read_text().replace("&#34;", '"') or part == '"seqlen": 24'
    assert "12.38" not in section
    assert yaml.safe_load(text.split("---")[1])["license"] == "mit"


def test_a_card_that_the_user_made_his_own_is_left_alone(pruned: Path, dense: Path) -> None:
    (pruned / "README.md").write_text("mine")
    measure(pruned, 12.5, dense)
    refresh(pruned)
    assert (pruned / "README.md").read_text() == "mine"
    (pruned / "README.md").unlink()
    refresh(pruned)
    assert not (pruned / "README.md").exists()
    assert "12.5" in (pruned / "report.html").read_text()


def test_a_folder_of_somebody_else_is_left_alone(dense: Path) -> None:
    before = sorted(dense.iterdir())
    refresh(dense)
    assert sorted(dense.iterdir()) == before


def test_damaged_results_change_nothing(pruned: Path) -> None:
    (pruned / RESULT).write_text("[]")
    before = (pruned / "README.md").read_text()
    with pytest.raises(InputError, match="is no result of an evaluation"):
        refresh(pruned)
    assert (pruned / "README.md").read_text() == before


def test_a_folder_appears_with_its_explanation_or_not_at_all(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    result = prune(dense, PruneConfig(method="magnitude"))
    monkeypatch.setattr(checkpoint, "explain", fail)
    with pytest.raises(InputError, match="the disk is full"):
        result.save(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_what_a_user_wrote_stays_to_the_byte(pruned: Path, dense: Path) -> None:
    card = pruned / "README.md"
    own = b"caf\xe9 notes\r\nof mine\r\n"
    card.write_bytes(own + card.read_bytes() + own)
    measure(pruned, 9.0, dense)
    refresh(pruned)
    assert card.read_bytes().startswith(own) and card.read_bytes().endswith(own)
    assert b"| out | 9 |" in card.read_bytes()
