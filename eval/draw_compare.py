"""Take the README's picture of a page of comparison: python eval/draw_compare.py

Runs the commands that stand beside the picture on a model of ../shared, and takes the page's picture with Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
DENSE = SHARED / "models/stories260k-llama"
TRAIN, OTHER = (SHARED / f"text/tinystories-{part}.jsonl" for part in ("train", "val"))
RUNS = {
    "half": "--method wanda --sparsity 0.5",
    "2of4": "--method regress --pattern 2:4",
    "smaller": "--method obs --pattern uniform --sparsity 0.2 --compensation least-squares",
}
CALIBRATION = "--num-calibration-samples 32 --max-seq-length 256"
EVALUATION = "--max-seq-length 256 --num-samples 60 --tasks story_endings --generate"
TIMING = "--batch-sizes 1 --turns 9"
WIDTH, HEIGHT = 1200, 1720
"""Of the picture: the page goes on below."""


def main() -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("the picture needs Chromium: install it")
    with tempfile.TemporaryDirectory() as scratch:
        for name, options in RUNS.items():
            run(scratch, f"prune {DENSE} -o {name} {options} --dataset {TRAIN} {CALIBRATION}")
            run(scratch, f"eval {name} --against {DENSE} --dataset {OTHER} {EVALUATION}")
            run(scratch, f"bench {name} --against {DENSE} {TIMING}")
        run(scratch, f"compare {' '.join(RUNS)} --html compare.html")
        take(browser, Path(scratch), ROOT / "eval/results/compare.png")


def run(folder: str, command: str) -> None:
    subprocess.run([sys.executable, "-m", "llmprune", *command.split()], cwd=folder, check=True)


def take(browser: str, folder: Path, target: Path) -> None:
    """The page as it looks at the top."""
    from PIL import Image

    shot = folder / "shot.png"
    subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                    "--disable-background-networking", "--disable-component-update", "--disable-sync",
                    "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", f"--window-size={WIDTH},{HEIGHT}",
                    "--blink-settings=preferredColorScheme=1", f"--screenshot={shot}",
                    (folder / "compare.html").as_uri()], check=True, capture_output=True)  # fmt: skip
    Image.open(shot).convert("RGB").quantize(255).save(target, optimize=True)


if __name__ == "__main__":
    main()
