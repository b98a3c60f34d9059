"""The texts of a dataset on the Hub, and the commit that they are of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from llmprune_eval.errors import InputError


class HubTexts:
    """The texts of a dataset on the Hub, streamed.

    Args:
        name: what the user calls it.
        arguments: of datasets.load_dataset.
    """

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        self.name = name
        self.split = arguments["split"]
        self.arguments = {key: value for key, value in arguments.items() if key != "split"}

    @cached_property
    def builder(self) -> Any:
        """The dataset's, at the newest commit."""
        import datasets

        with self._reaching():
            return datasets.load_dataset_builder(**self.arguments)

    @property
    def commit(self) -> str | None:
        """40 hexadecimal digits, or None if the builder's address holds none."""
        found = re.search(r"@([0-9a-f]{40})", str(self.builder.base_path))
        return found and found[1]

    def __iter__(self) -> Iterator[str]:
        """Raises InputError if the dataset cannot be reached or holds no texts."""
        with self._reaching():
            for row in self.builder.as_streaming_dataset(split=self.split):
                if not isinstance(row.get("text"), str):
                    raise InputError(
                        f'{self.name} has no string column "text" but {sorted(row)}: export it to a .jsonl'
                    )
                yield row["text"]

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        import datasets

        try:
            yield
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            if isinstance(error, InputError):
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"cannot get the dataset '{self.name}' from the Hub ({first}): without a network pass a local .txt, "
                ".jsonl, .parquet or .npy file, or 'self'"
            ) from error
