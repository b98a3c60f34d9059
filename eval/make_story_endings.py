"""Make the documents of the task `story_endings` from the demo's stories: one for each story, by a fixed seed.

Usage: python eval/make_story_endings.py
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT / "llmprune" / "demo" / "stories.txt"
DOCUMENTS = ROOT / "eval" / "llmprune_eval" / "tasks" / "story_endings.jsonl"
SENTENCES = 3
"""Of an ending."""
CHOICES = 4


def documents(text: str) -> list[dict[str, object]]:
    """Every story in two, with the numbers of those that are shown: its own and three others in random order."""
    cut = [re.split(r'(?<=[.!?"]) (?=[A-Z"])', story) for story in text.split("\n\n") if story.strip()]
    order = random.Random(0)
    rows: list[dict[str, object]] = []
    for own, sentences in enumerate(cut):
        shown = [own, *order.sample([i for i in range(len(cut)) if i != own], CHOICES - 1)]
        order.shuffle(shown)
        beginning, ending = " ".join(sentences[:-SENTENCES]), " ".join(sentences[-SENTENCES:])
        rows.append({"beginning": beginning, "ending": ending, "shown": shown})
    return rows


if __name__ == "__main__":
    rows = documents(STORIES.read_text(encoding="utf-8"))
    DOCUMENTS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
