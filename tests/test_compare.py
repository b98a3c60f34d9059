"""Models side by side: what may share a column, what stands in the dense row, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus import strict_json, write_every_format
from llmprune_eval.result import RESULT, SCHEMA, Part, Result

from llmprune import PruneConfig, checkpoint, prune
from llmprune.pages.candidates import Candidate
from llmprune.pages.comparison import compare

Ok = Callable[..., str]
Refused = Callable[..., str]
TEXT = {"dataset": "val.jsonl", "joiner": "\n", "seqlen": 24, "windows": 4, "dtype": "float32"}
MACHINE = {"cores": 2, "cpu": "AVX2"}


def speed(value: float, *, against: object, batch: int = 1, hardware: dict[str, Any] | None = None) -> Part:
    values = {"tokens_per_second": value, "p10": value - 1, "p90": value + 2, "speedup": value / 100,
              "peak_memory": 5e8, "dense_tokens_per_second": 100.0}  # fmt: skip
    protocol = {"batch_size": batch, "prompt": 32, "device": "cpu", "against": str(against)}
    return Part("speed", "prefill", protocol, values, hardware=hardware or MACHINE)


def perplexity(value: float | None, against: object = None, **protocol: object) -> Part:
    values: dict[str, float | None] = {"perplexity": value}
    if against is not None:
        values |= {"dense_perplexity": 8.5, "kl": 0.25, "top1_agreement": 0.75}
        protocol["against"] = str(against)
    return Part("perplexity", "val.jsonl", {**TEXT, **protocol}, values)


def task(name: str, acc: float, **protocol: object) -> Part:
    return Part("task", name, {"num_fewshot": 0, "limit": None, **protocol}, {"acc": acc, "acc_norm": acc + 0.1},
                {"acc": 0.01, "acc_norm": 0.02})  # fmt: skip


def keep(path: Path, model: object, *parts: Part) -> Path:
    """Write a result file; returns it."""
    result = Result({"name": str(model), "parameters": 1000, "nonzero": 900, "bytes": 4000}, path=path)
    for part in parts:
        result.add(part)
    return path


@pytest.fixture(scope="module")
def _pruned(_complete_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, its text, and two that were pruned from it."""
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(_complete_llama, folder / "dense")
    text = write_every_format(folder / "data") / "a.npy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "prove_reload", lambda model, folder: {"weights": "identical"})
        for name, method in (("half", "wanda"), ("smaller", "obs")):
            config = PruneConfig(method=method, dataset=str(text), num_calibration_samples=9)
            prune(str(folder / "dense"), config).save(folder / name)
    return folder


@pytest.fixture
def pair(_pruned: Path, dense: Path, data: Path, tmp_path: Path, unproved: None) -> tuple[Path, Path]:
    """Two pruned folders, as if they had been pruned where the test is."""
    for name in ("half", "smaller"):
        manifest = shutil.copytree(_pruned / name, tmp_path / name) / "llmprune.json"
        manifest.write_text(manifest.read_text().replace(str(_pruned), str(tmp_path)))
    return tmp_path / "half", tmp_path / "smaller"


def by_heading(facts: dict[str, Any], figure: str) -> list[dict[str, Any]]:
    return [column for column in facts["figures"] if column["figure"] == figure]


def values(column: dict[str, Any]) -> dict[str, Any]:
    return {name: cell["value"] for name, cell in column["values"].items()}


def test_only_one_protocol_shares_a_column(pair: tuple[Path, Path], dense: Path, ok: Ok) -> None:
    half, smaller = pair
    keep(half / RESULT, half, perplexity(12.0, dense), perplexity(13.0, seqlen=12))
    keep(smaller / RESULT, smaller, perplexity(11.0, dense), perplexity(14.0, seqlen=16))
    facts = strict_json(ok("compare", half, smaller, "--json"))
    own = [column for column in by_heading(facts, "perplexity") if column["name"] == "val.jsonl"]
    found = {column["protocol"]["seqlen"]: values(column) for column in own}
    assert found == {24: {"dense": 8.5, "half": 12.0, "smaller": 11.0}, 12: {"half": 13.0}, 16: {"smaller": 14.0}}
    assert [values(column) for column in by_heading(facts, "kl")] == [{"half": 0.25, "smaller": 0.25}]
    told = ok("compare", half, smaller)
    assert "seqlen 12" in told and "seqlen 16" in told and "dense (dense)" not in told
    assert "11*" in told and "12*" not in told and "8.5*" not in told


def test_what_the_runs_measured_themselves(pair: tuple[Path, Path], dense: Path, ok: Ok) -> None:
    facts = strict_json(ok("compare", *pair, "--json"))
    manifests = {path.name: json.loads((path / "llmprune.json").read_text()) for path in pair}
    (column,) = by_heading(facts, "perplexity")
    assert values(column) == {
        "dense": manifests["half"]["perplexity_before"],
        **{name: manifest["perplexity_after"] for name, manifest in manifests.items()},
    }
    assert column["protocol"]["holdout_sha256"] == manifests["half"]["calibration"]["holdout_sha256"]
    models = {row["name"]: row for row in facts["models"]}
    assert [row["dense"] for row in facts["models"]] == [True, False, False]
    for path in (dense, *pair):
        assert models[path.name]["bytes"] == (path / "model.safetensors").stat().st_size
    assert models["half"]["nonzero"] < models["half"]["parameters"] == models["dense"]["parameters"]
    assert models["smaller"]["parameters"] < models["dense"]["parameters"]


def test_other_text_held_out_is_another_column(
    pair: tuple[Path, Path], dense: Path, data: Path, ok: Ok, refused: Refused
) -> None:
    ok("prune", dense, "-o", "other", "--dataset", data / "a.npy", "--nsamples", 8, "--method", "wanda")
    line = refused("compare", pair[0], "other")
    assert "nothing was measured of two of them in the same way" in line and "llmprune eval" in line


def test_a_dense_model_without_a_manifest_comes_as_a_file(
    pair: tuple[Path, Path], dense: Path, tmp_path: Path, ok: Ok
) -> None:
    half, smaller = pair
    file = keep(tmp_path / "before.json", dense, perplexity(8.25), task("arc", 0.5), task("rte", 0.75))
    keep(half / RESULT, half, perplexity(12.0, dense), task("arc", 0.25), task("rte", 0.5))
    keep(smaller / RESULT, smaller, perplexity(11.0, dense), task("arc", 0.4), task("rte", 0.5, num_fewshot=5))
    facts = strict_json(ok("compare", half, file, smaller, "--json"))
    assert [(row["name"], row["dense"]) for row in facts["models"]] == [
        ("before", True), ("half", False), ("smaller", False)]  # fmt: skip
    (own,) = [column for column in by_heading(facts, "perplexity") if column["name"] == "val.jsonl"]
    assert values(own) == {"before": 8.25, "half": 12.0, "smaller": 11.0}, "its own figure, not the one beside"
    tasks = [(c["name"], values(c)) for c in by_heading(facts, "acc")]
    assert tasks == [("arc", {"before": 0.5, "half": 0.25, "smaller": 0.4}), ("rte", {"before": 0.75, "half": 0.5}),
                     ("rte", {"smaller": 0.5})]  # fmt: skip
    keep(smaller / RESULT, smaller, task("arc", 0.4), task("rte", 0.1))
    mean = by_heading(strict_json(ok("compare", half, file, smaller, "--json")), "acc")[-1]
    assert mean["name"] == "mean of tasks" and mean["protocol"]["tasks"] == ["arc", "rte"]
    assert values(mean) == pytest.approx({"before": 0.625, "half": 0.375, "smaller": 0.25})
    assert "0.25 ± 0.01" in ok("compare", half, file, smaller)


def test_speed_is_ranked_within_one_run_and_one_machine(pair: tuple[Path, Path], dense: Path, ok: Ok) -> None:
    half, smaller = pair
    other = {"cores": 64, "cpu": "AVX512"}
    keep(half / RESULT, half, speed(90.0, against=dense), speed(95.0, against=dense, batch=8, hardware=other))
    keep(smaller / RESULT, smaller, speed(150.0, against=dense), speed(160.0, against=dense, batch=8))
    told = ok("compare", half, smaller)
    assert "1.50x*" in told and "150 (149 to 152)" in told and "150 (149 to 152)*" not in told
    facts = strict_json(ok("compare", half, smaller, "--json"))
    speedups = [values(column) for column in by_heading(facts, "speedup")]
    assert speedups == [{"dense": 1.0, "half": 0.9, "smaller": 1.5}, {"dense": 1.0, "half": 0.95},
                        {"dense": 1.0, "smaller": 1.6}]  # fmt: skip


def test_a_ruined_model_is_shown_as_ruined(pair: tuple[Path, Path], dense: Path, ok: Ok) -> None:
    half, smaller = pair
    keep(half / RESULT, half, perplexity(None, dense))
    keep(smaller / RESULT, smaller, perplexity(11.0, dense))
    assert "not finite" in ok("compare", half, smaller)
    ok("compare", half, smaller, "--html", "page.html")


def test_a_file_whose_model_has_gone(pair: tuple[Path, Path], tmp_path: Path, ok: Ok) -> None:
    first = keep(tmp_path / "first.json", "gone/one", perplexity(8.0))
    second = keep(tmp_path / "second.json", "gone/two", perplexity(9.0))
    told = ok("compare", first, second, "--html", "page.html")
    assert "not said" in told and "8*" in told
    assert (tmp_path / "page.html").is_file()


def test_folders_of_one_name_are_told_apart(pair: tuple[Path, Path], tmp_path: Path, ok: Ok) -> None:
    shutil.copytree(pair[0], tmp_path / "again" / "half")
    told = ok("compare", "half", "again/half")
    assert "again/half" in told


def test_bad_input(pair: tuple[Path, Path], dense: Path, tmp_path: Path, refused: Refused) -> None:
    half, smaller = pair
    assert "holds neither llmprune.json nor evaluation.json: measure it by" in refused("compare", half, dense)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nowhere", "x" * 300, "loop"):
        assert "does not exist" in refused("compare", half, name)
    assert "is given twice" in refused("compare", half, "half/llmprune.json")
    for name in ("page.txt", "page"):
        assert "name ends in .html" in refused("compare", half, smaller, "--html", name)
    (tmp_path / "folder.html").mkdir()
    for name in ("nowhere/page.html", "folder.html", "x" * 300 + ".html"):
        assert "cannot be written" in refused("compare", half, smaller, "--html", name)
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps({"schema": SCHEMA, "model": {}, "parts": []}))
    assert "does not name the model" in refused("compare", half, bare)


def test_damaged_files(pair: tuple[Path, Path], refused: Refused) -> None:
    half, smaller = pair
    (half / RESULT).write_text("{")
    assert "is no result of an evaluation" in refused("compare", half, smaller)
    (half / RESULT).unlink()
    manifest = json.loads((half / "llmprune.json").read_text())
    for broken in ({**manifest, "blocks": [{"name": 1}]}, {k: v for k, v in manifest.items() if k != "pattern"},
                   {**manifest, "sparsity": None}, {**manifest, "saved": {}}, {**manifest, "config": {}}):  # fmt: skip
        (half / "llmprune.json").write_text(json.dumps(broken))
        assert "the manifest" in (line := refused("compare", half, smaller)) and "damaged" in line
    (half / "llmprune.json").write_text("[")
    assert "llmprune.json is damaged" in refused("compare", half, smaller)


def test_a_mean_needs_one_way_of_asking(pair: tuple[Path, Path], dense: Path, ok: Ok) -> None:
    half, smaller = pair
    for folder in pair:
        keep(folder / RESULT, folder, task("a", 0.5), task("b", 0.25))
    (mean,) = (
        c for c in strict_json(ok("compare", half, smaller, "--json"))["figures"] if c["name"] == "mean of tasks"
    )
    assert values(mean) == {"half": 0.375, "smaller": 0.375}
    for again in (task("a", 0.75, limit=4), task("c", 0.5, num_fewshot=5)):
        for folder in pair:
            (folder / RESULT).unlink()
            keep(folder / RESULT, folder, task("a", 0.5), task("b", 0.25), again)
        names = [c["name"] for c in strict_json(ok("compare", half, smaller, "--json"))["figures"]]
        assert "mean of tasks" not in names


def test_a_text_is_the_same_wherever_it_lies(pair: tuple[Path, Path], dense: Path, ok: Ok) -> None:
    for folder, place in zip(pair, ("/a/val.jsonl", "b/val.jsonl"), strict=True):
        protocol = {**TEXT, "dataset": place, "revision": "1" * 64}
        keep(folder / RESULT, folder, Part("perplexity", place, protocol, {"perplexity": 3.0}))
    facts = strict_json(ok("compare", *pair, "--json"))
    shared = [values(c) for c in by_heading(facts, "perplexity") if c["name"].endswith("val.jsonl")]
    assert shared == [{"half": 3.0, "smaller": 3.0}]


def test_the_result_of_another_model_is_not_believed(pair: tuple[Path, Path], ok: Ok, refused: Refused) -> None:
    half, smaller = pair
    ok("eval", half, "--prompt", "w1 w2", "--max-new-tokens", 4)
    shutil.copy(half / RESULT, smaller / RESULT)
    assert "holds measurements of another model: delete it" in refused("compare", half, smaller)


def test_timings_whose_spreads_overlap_have_no_best(pair: tuple[Path, Path], dense: Path, ok: Ok) -> None:
    for limits, starred in (((0.9, 1.3), 0), ((1.15, 1.3), 1)):
        for folder, values_ in zip(pair, ((1.0, 0.8, 1.1), (1.2, *limits)), strict=True):
            (folder / RESULT).unlink(missing_ok=True)
            part = speed(100.0, against=dense)
            timed = dict(zip(("speedup", "speedup_p10", "speedup_p90"), values_, strict=True))
            keep(folder / RESULT, folder, Part("speed", part.name, part.protocol, timed, hardware=part.hardware))
        told = ok("compare", *pair).partition("Speed")[2].partition("Protocols")[0]
        assert told.count("*") == starred * 2  # in the title, and at the figure


@pytest.mark.usefixtures("unproved")
def test_a_pruned_model_of_its_base_s_name_is_told_from_it(dense: Path, data: Path, tmp_path: Path, ok: Ok) -> None:
    ok("prune", dense, "-o", "other/dense", "--method", "wanda", "--dataset", data / "a.npy", "--nsamples", 9)
    facts = strict_json(ok("compare", "other/dense", "--json"))
    assert {one["name"]: one["dense"] for one in facts["models"]} == {str(dense): True, "dense": False}
    (held_out,) = by_heading(facts, "perplexity")
    assert values(held_out).keys() == {str(dense), "dense"}


def test_beside_another_model_than_the_dense_one_that_model_is_named() -> None:
    manifest = {"saved": {"dense_bytes": 10}, "model_parameters": 5}
    for against, stands in (("/models/base", "dense"), ("/models/pruned", "pruned")):
        parts = (perplexity(9.0, against), speed(90.0, against=against))
        one = Candidate("packed", "/models/packed", "/models/base", parts, manifest)
        headings = {column.figure: column.heading for column in compare([one]).columns}
        assert headings["kl"] == f"KL to {stands}, val.jsonl"
        assert headings["top1_agreement"] == f"same top token as {stands}, val.jsonl"
        assert headings["speedup"] == f"speed relative to {stands}, prefill"
