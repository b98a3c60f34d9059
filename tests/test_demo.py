"""The embedded default: everything the demo shows, measured on the spot."""

from __future__ import annotations

import json
import time
from pathlib import Path

from llmprune.demo.run import HERE, METHODS, UNIT_METHODS, run_demo, stories

UNITS = "uniform 0.25"


def test_the_demo_measures_what_it_shows(tmp_path: Path) -> None:
    start = time.perf_counter()
    facts = json.loads(run_demo(as_json=True, html=tmp_path / "demo.html"))
    assert time.perf_counter() - start < 300
    rows = {(row["method"], row["pattern"]): row for row in facts["rows"]}
    dense = rows.pop(("dense", ""))
    assert set(rows) == {(m, p) for p in ("0.5", "2:4") for m in METHODS} | {(m, UNITS) for m in UNIT_METHODS}
    assert abs(dense["kl"]) < 1e-6
    for pattern in ("0.5", "2:4"):
        ppl = {method: rows[method, pattern]["perplexity"] for method in METHODS}
        order = [ppl[method] for method in ("regress", "sparsegpt", "wanda", "magnitude", "random")]
        assert dense["perplexity"] < order[0] and order == sorted(order)
    ppl = {method: rows[method, UNITS]["perplexity"] for method in UNIT_METHODS}
    assert dense["perplexity"] < ppl["regress"] < min(ppl["wanda"], ppl["obs"], ppl["maskprune"])
    assert max(ppl["wanda"], ppl["obs"], ppl["maskprune"]) < ppl["random"]
    assert all(row["bytes"] < 0.8 * dense["bytes"] for (_, pattern), row in rows.items() if pattern == UNITS)
    for (_, pattern), row in rows.items():
        assert 0.25 <= row["sparsity"] < 0.26 if pattern == UNITS else row["sparsity"] == 0.5
        assert row["kl"] > 0
        assert row["continuation"]
    assert facts["reload"]["weights"] == "identical"
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert all(f"{method} {pattern}" in page for method, pattern in rows)
    assert f"{rows['regress', '2:4']['perplexity']:.4g}" in page


def test_the_embedded_files_are_small_and_ours() -> None:
    assert sum(file.stat().st_size for file in (HERE / "model").iterdir()) < 2_000_000
    told = stories()
    assert len(told) == 60
    assert len({story[:40] for story in told}) == 60
