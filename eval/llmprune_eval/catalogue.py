"""The tasks that lm-eval knows by name: its own, those that come with this package, and the user's."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmprune_eval.errors import InputError
from llmprune_eval.hashing import sha256_of_files

TASKS = Path(__file__).parent / "tasks"
"""YAMLs that come with this package."""


class Catalogue:
    """What was asked for, as names that lm-eval's task manager knows.

    Args:
        asked: names of tasks, groups or tags, or patterns of them (`mmlu_*`).
        include_path: folders with the user's YAMLs, which go before others of the same name.

    Attributes:
        names: of the tasks and groups, in the order asked for; tags are replaced by their tasks.

    Raises:
        InputError: lm-eval is not installed, or a name is unknown.
    """

    def __init__(self, asked: Sequence[str], include_path: Sequence[Path] = ()) -> None:
        for folder in include_path:
            if not folder.is_dir():
                raise InputError(f"--include-path {folder} is no folder: give one with task YAMLs")
        try:
            version("lm_eval")
        except PackageNotFoundError as error:
            raise InputError("zero-shot tasks need lm-eval: pip install 'llmprune[eval]'") from error
        from lm_eval.tasks import TaskManager

        folders = [str(folder) for folder in (TASKS, *include_path)]
        self.manager: Any = TaskManager(include_path=folders, include_defaults=False)
        if not set(asked) <= set(self.manager.all_subtasks):  # to read all of lm-eval's own takes many seconds
            self.manager = TaskManager(include_path=folders)
        self.names = list(dict.fromkeys(name for word in asked for name in self._expanded(word)))

    def _expanded(self, word: str) -> Iterable[str]:
        found = self.manager.match_tasks([word])
        if not found:
            near = difflib.get_close_matches(word, self.manager.all_tasks, n=4)
            hint = f"did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists all"
            raise InputError(f"task '{word}' is unknown to lm-eval: {hint} (--include-path adds YAMLs of your own)")
        for name in found:
            yield from sorted(self._entry(name).tags) if name in self.manager.all_tags else [name]

    def _entry(self, name: str) -> Any:
        return self.manager.task_index[name]

    def asked(self, name: str, num_fewshot: int | None) -> dict[str, Any]:
        """What is known of a task's protocol before it is loaded.

        Raises:
            InputError: its data files do not exist.
        """
        entry = self._entry(name)
        config = entry.cfg or {}
        own = config.get("num_fewshot")
        # Functions are named by their files: the folder that the task lies in does not matter.
        text = json.dumps(config, sort_keys=True, default=str).replace(str(entry.yaml_path.resolve().parent), "")
        files = _data_files(config)
        for file in files:
            if not file.is_file():
                raise InputError(f"task {name} reads {file}, which does not exist below {Path.cwd()}: change there")
        return {
            "task": name,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "num_fewshot": (own or 0) if num_fewshot is None or own == 0 else num_fewshot,
            **({"revision": sha256_of_files(files)} if files else {}),
        }

    def load(self, name: str) -> Any:
        """The task or group with its data.

        Raises:
            InputError: its data cannot be had, or its YAML makes no sense.
        """
        try:
            loaded = self.manager.load([name])
        except Exception as error:  # nothing narrower: the libraries below raise whatever they like
            raise InputError(
                f"task {name} cannot be loaded ({reason(error)}): without a network use tasks of local files "
                "(--include-path)"
            ) from error
        return loaded.get("groups", {}).get(name) or loaded["tasks"][name]

    @staticmethod
    def leaves(task: Any) -> list[Any]:
        """A group's tasks, or the task itself."""
        return list(task.get_all_tasks()) if hasattr(task, "get_all_tasks") else [task]


def _data_files(config: dict[str, Any]) -> list[Path]:
    """Local files that a task's YAML names."""
    if config.get("dataset_path") not in ("json", "csv", "parquet", "text"):
        return []
    named = (config.get("dataset_kwargs") or {}).get("data_files") or []
    groups = named.values() if isinstance(named, dict) else [named]
    files = [str(file) for group in groups for file in ([group] if isinstance(group, str) else group)]
    return [Path(file) for file in files if "://" not in file and "*" not in file]


def reason(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    said = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
