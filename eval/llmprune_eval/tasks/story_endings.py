"""The documents of the task, read from beside this file wherever it lies; lm-eval calls this by the YAML."""

import json
from pathlib import Path
from typing import Any


def documents(**metadata: Any) -> Any:
    """{"test": rows of `stories` (four beginnings), `ending`, and `gold`, the index of the beginning it belongs to}."""
    from datasets import Dataset, DatasetDict

    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    stories = [json.loads(line) for line in lines]
    rows = [
        {
            "stories": [stories[i]["beginning"] for i in story["shown"]],
            "ending": story["ending"],
            "gold": story["shown"].index(own),
        }
        for own, story in enumerate(stories)
    ]
    return DatasetDict({"test": Dataset.from_list(rows)})
