"""The page: whole, escaped, sufficient to itself, and legible in a browser from 360 pixels on, in both themes."""

from __future__ import annotations

import base64
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from llmprune_eval.result import Part
from PIL import Image

from llmprune.pages.candidates import Candidate
from llmprune.pages.comparison import Comparison, compare
from llmprune.pages.page import render
from llmprune.pages.plots import _apart

VOID = {"meta", "img", "source", "br", "link", "input", "hr"}
EVIL = '<script>alert("x")</script>&<b>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def manifest(blocks: int, error: float, *, learned: bool = False) -> dict[str, Any]:
    """What a run over a model of so many blocks leaves."""
    sites = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj")
    widths = {"kinds": [{"projection": "mlp.down_proj", "units": "channels", "before": 64, "after": 48}]}
    row = {"loss": 0.5, "kept_share": 0.8, "budget": 0.75, "overlap": None, "widths": {"mlp.down_proj": 60}}
    return {
        "model": "dense", "pattern": "2:4", "sparsity": 0.5, "decoder_share": 0.45, "pruned": 512,
        "config": {"method": EVIL, "compensation": "none", "refine": "none", "sequential": "block", "target": "own",
                   "seed": 0},
        "model_parameters": 4000, "removed": None, "calibration": None, "loss_before": None, "warnings": [EVIL],
        "versions": {"torch": "2"}, "command": f"llmprune prune '{EVIL}'", "widths": widths if learned else None,
        "curves": [{"step": i, **row} for i in (1, 2, 3)] if learned else [],
        "saved": {"bytes": 16_000, "parameters": 4000, "nonzero": 2000, "dense_bytes": 16_000},
        "blocks": [{"name": f"model.layers.{i}", "relative_error": error, "sites": [
            {"name": f"model.layers.{i}.{site}", "shape": [8, 8], "pruned": 16 * (k + 1), "relative_error": error / 2}
            for k, site in enumerate(sites)]} for i in range(blocks)],
    }  # fmt: skip


def parts(value: float, speed: float | None = None) -> list[Part]:
    text = {"dataset": f"a/long/way/to/{EVIL}", "seqlen": 64, "against": "dense"}
    told = [{"prompt": f"Once {EVIL}", "text": "and then " * 12, "dense_text": "A" * 200}]
    found = [
        Part("perplexity", "val", text, {"perplexity": value, "dense_perplexity": 4.0, "kl": 0.5}),
        Part("generation", "stories", {"new_tokens": 12, "against": "dense"}, {"repetition": 0.5}, samples=told),
        *(Part("task", name, {"num_fewshot": 0}, {"acc": value / 30, "acc_norm": value / 30}) for name in "abcdefg"),
    ]
    if speed is not None:
        timing = {"tokens_per_second": speed, "speedup": speed / 100}
        found.append(Part("speed", "decode", {"batch_size": 1, "against": "dense"}, timing, hardware={}))
    return found


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Two candidates with everything, names that are too long, 40 blocks, and markup where it can hide."""
    first = Candidate.from_manifest(EVIL, "one", manifest(40, 0.7), parts(12.0, 110.0))
    second = Candidate.from_manifest("a-very-long-name" * 4, "two", manifest(40, 0.3, learned=True), parts(15.0, 150.0))
    return compare([first, second])


@pytest.fixture(scope="module")
def page(comparison: Comparison) -> str:
    return render(comparison, f"Title {EVIL}")


class Reader(HTMLParser):
    """Every tag with its attributes, all text, and whether tags close as they open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_markup_is_escaped_and_nothing_is_fetched(read: Reader) -> None:
    tags = {tag for tag, _ in read.tags}
    assert not tags & {"script", "link", "iframe", "object", "form", "base"}
    assert read.text.count(EVIL) > 10
    for _, attributes in read.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    policy = next(a["content"] for tag, a in read.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_figure_is_there(read: Reader) -> None:
    for text in ("12", "15", "1.10x", "1.50x", "110", "0.350", "0.150", "0.700", "0.250", "0.875",
                 "and then and then", "64 to 48 channels", "16.00 kB", "seqlen"):  # fmt: skip
        assert text in read.text, text
    assert "self_attn.q_proj" not in read.text and "q_proj" in read.text, "short where short is clear"


def test_plots_come_in_two_themes_without_anything_from_outside(read: Reader) -> None:
    dark = [a["srcset"] or "" for tag, a in read.tags if tag == "source"]
    light = [a["src"] or "" for tag, a in read.tags if tag == "img"]
    # perplexity and mean accuracy against two sizes and one speed; one learning run
    assert len(dark) == len(light) == 2 * 3 + 1
    for one, other in zip(dark, light, strict=True):
        drawings = [base64.b64decode(uri.partition("base64,")[2]).decode() for uri in (one, other)]
        assert drawings[0] != drawings[1]
        for drawing in drawings:
            assert "<image" not in drawing and not re.findall(r'href="(?!#)', drawing)


def test_what_was_not_measured_is_left_out_in_words() -> None:
    one = Candidate.from_manifest("one", "one", manifest(0, 0.0))
    reader = Reader()
    reader.feed(render(compare([one]), "Report"))
    assert "img" not in {tag for tag, _ in reader.tags}
    assert reader.text.count("Nothing was measured.") == 2
    assert "Layer by layer" not in reader.text and "Learning" not in reader.text


@pytest.mark.parametrize("heights", [[0.5], [0.1, 0.1, 0.1], [0.9, 0.95, 1.0, 1.0], [0.0, 0.02, 0.5, 0.99, 1.0]])
def test_labels_lie_apart_in_order_and_within_the_plot(heights: list[float]) -> None:
    placed = _apart(heights, 0.2)
    assert all(b - a > 0.2 - 1e-9 for a, b in pairwise(placed))
    assert placed[0] > -1e-9 and placed[-1] <= 1.0


SCRIPT = """
addEventListener("load", () => setTimeout(() => {
  const inner = document.querySelector("iframe").contentWindow, root = inner.document.documentElement;
  const boxes = [...inner.document.querySelectorAll("img")].map(i => [i.naturalWidth, i.getBoundingClientRect().width]);
  document.title = JSON.stringify({wide: root.scrollWidth, shown: root.clientWidth, images: boxes,
    ground: inner.getComputedStyle(inner.document.body).backgroundColor,
    fetched: inner.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))});
}, 300));
"""


def browse(page: str, width: int, scheme: int, folder: Path) -> tuple[dict[str, Any], Image.Image]:
    """Show a page in a frame of `width` pixels (a window has no less than 500); what it measures, and a picture."""
    outer = folder / "outer.html"
    frame = f'<iframe style="border:0;width:{width}px;height:1500px" srcdoc="{html.escape(page)}"></iframe>'
    outer.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frame}<script>{SCRIPT}</script>')
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
               f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=5000",
               f"--window-size={max(width, 500)},1500"]  # fmt: skip
    shot = folder / "shot.png"
    environment = {**os.environ, "HOME": str(folder)}
    for what in (["--dump-dom"], [f"--screenshot={shot}"]):
        done = subprocess.run([*command, *what, outer.as_uri()], capture_output=True, text=True, timeout=120,
                              env=environment)  # fmt: skip
        if what == ["--dump-dom"]:
            found = re.search(r"<title>(.*?)</title>", done.stdout)
            assert found, done.stderr[-1000:]
            facts: dict[str, Any] = json.loads(html.unescape(found[1]))
    return facts, Image.open(shot).convert("RGB").crop((0, 0, width, 1500))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme", "ground"), [(360, 0, "rgb(22, 24, 28)"), (1280, 1, "rgb(255, 255, 255)")])
def test_a_browser_shows_it(page: str, width: int, scheme: int, ground: str, tmp_path: Path) -> None:
    facts, picture = browse(page, width, scheme, tmp_path)
    assert facts["wide"] <= facts["shown"] == width, "nothing sticks out to the right"
    assert facts["ground"] == ground
    assert facts["fetched"] == []
    assert len(facts["images"]) == 7 and all(natural > 0 and shown > 250 for natural, shown in facts["images"])
    shades = {shade for _, shade in picture.getcolors(1 << 24) or []}
    assert len(shades) > 50, "text and figures are drawn"
    background = tuple(map(int, re.findall(r"\d+", ground)))
    assert picture.getpixel((2, 2)) == background
