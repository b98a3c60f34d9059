"""All that one evaluation was asked for, one measurement after the other; what is finished is kept at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from accelerate import PartialState

from llmprune_eval.catalogue import Catalogue
from llmprune_eval.generation import Generation
from llmprune_eval.perplexity import Perplexity
from llmprune_eval.result import Part, Result, check_place, describe_model, own_file
from llmprune_eval.wanted import Opened, Reference, Wanted
from llmprune_eval.zeroshot import Examinee, ZeroShot


class Measurement(Protocol):
    """Something that can be measured of a model."""

    @property
    def kind(self) -> str:
        """One of result.KINDS."""

    @property
    def name(self) -> str:
        """Within its kind."""

    @property
    def asked(self) -> dict[str, Any]:
        """By what a finished part is recognised: the protocol as far as it is known beforehand."""

    def measure(self) -> list[Part]:
        """What was found; nothing on a process that only helped."""


class Evaluation:
    """A model, what is to be measured of it, and the result that is filled.

    Args:
        output: the result file; None for the one in the model's folder, if a pruner wrote it, else for none.

    Raises:
        InputError: an unknown task, a text that is not there, a model that does not load.
    """

    def __init__(self, wanted: Wanted, output: Path | None = None) -> None:
        output = output or own_file(wanted.model)
        check_place(output)
        catalogue = Catalogue(wanted.tasks, wanted.include_path) if wanted.tasks else None
        self.names: list[str] = catalogue.names if catalogue else []
        opened, dense = Opened.of(wanted.model, wanted), Reference(wanted)
        self.measurements: list[Measurement] = [Perplexity(opened, wanted, dense)] if wanted.dataset else []
        if catalogue is not None:
            examinee = Examinee(opened, wanted.batch_size)
            self.measurements += [ZeroShot(name, examinee, catalogue, wanted) for name in self.names]
        self.measurements += [Generation(opened, wanted, dense)] if wanted.prompts else []
        self.result = Result.open(output, describe_model(wanted.model, opened.model))
        PartialState().wait_for_everyone()  # all have read the file before the first one writes to it
        if not PartialState().is_main_process:
            self.result.path = None
        self.parts: list[Part] = []

    def run(self) -> Iterator[Part]:
        """Every part as soon as it is there; those that the result holds are not measured again.

        Raises:
            InputError: one of them fails; those before it are kept.
        """
        for measurement in self.measurements:
            found = self.result.find(measurement.kind, measurement.name, measurement.asked)
            for part in [found] if found is not None else measurement.measure():
                self.parts.append(part)
                if part is not found:
                    self.result.add(part)
                yield part

    def as_dict(self) -> dict[str, Any]:
        """What was asked for, without what else the result file holds."""
        return Result(self.result.model, self.parts).as_dict()
