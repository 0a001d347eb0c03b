"""The recipe as a value: made from mappings or a file, changed, completed, written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field

from zsq_deploy.artifact import atomic_writer, digest_json
from zsq_deploy.errors import UsageError
from zsq_deploy.recipe.mistakes import explained, nearest
from zsq_deploy.recipe.quantization import QuantizationSection
from zsq_deploy.recipe.reading import read_yaml
from zsq_deploy.recipe.sections import CalibrationSection, ModelSection, RunSection, VerificationSection
from zsq_deploy.recipe.values import Names, Section
from zsq_deploy.recipe.words import FieldDescription, sections_of, words_of
from zsq_deploy.recipe.writing import yaml_text

__all__ = ["Recipe", "describe"]


class Recipe(Section):
    """One run of the main job: a network in, verified engines out."""

    model: ModelSection
    calibration: CalibrationSection = CalibrationSection()
    quantization: QuantizationSection = QuantizationSection()
    targets: Annotated[Names, Field(min_length=1)] = Field(
        ("ort-x86-vnni",), validate_default=True, description="Deployment targets; `zsq doctor` lists them."
    )
    verification: VerificationSection = VerificationSection()
    run: RunSection = RunSection()

    @pydantic.model_validator(mode="after")
    def _targets_once(self) -> Recipe:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("a target is named twice")
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], *, where: str = "recipe", _lines: Mapping[str, int] | None = None) -> Recipe:
        """A recipe from nested mappings.

        Args:
            values: ``{"model": {"source": ...}, ...}``.
            where: What to call it in messages.

        Raises:
            UsageError: An unknown word, a missing one, or a value that makes no sense.
        """
        try:
            return cls.model_validate(dict(values))
        except pydantic.ValidationError as error:
            raise explained(error, describe(), tuple(sections_of(cls)), where, _lines or {}) from error

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe; relative paths in it count from its folder.

        Raises:
            UsageError: No such file, no YAML, an unknown word, or a value that makes no sense; with the line.
        """
        file = Path(path)
        values, lines = read_yaml(file)
        return cls.of(values, where=str(file), _lines=lines)._with_paths(
            lambda p: p if p.is_absolute() else file.parent / p
        )

    def dump(self, path: Path | str) -> None:
        """Write the recipe as YAML. What was never given stays out.

        Paths are written as they are; use :meth:`resolved` first when the file goes to another folder.
        """
        with atomic_writer(Path(path)) as out:
            out.write(self.to_yaml().encode())

    def to_yaml(self) -> str:
        """The recipe as YAML text."""
        values = self.model_dump(mode="json")
        for section in self.quantization.unread:  # what no quantizer reads is not written
            del values["quantization"][section]
        return yaml_text(values, Recipe.of({"model": {"source": "-"}}).model_dump(mode="json"))

    def replace(self, changes: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
        """A recipe with some values changed, checked again.

        Args:
            changes: ``{"calibration.method": "genie", "targets": ["ort-arm64"]}``.
            where: What to call it in messages.

        Raises:
            UsageError: No such word, or a value that makes no sense.
        """
        values = self.model_dump()
        for dotted, value in changes.items():
            *sections, key = dotted.split(".")
            place: Any = values
            for section in sections:
                place = place.get(section) if isinstance(place, dict) else None
            if not isinstance(place, dict):
                raise UsageError(
                    f"a recipe has no {dotted!r}", where=where, remedy=nearest(dotted, [f.name for f in describe()])
                )
            place[key] = value
        return Recipe.of(values, where=where)

    def resolved(self) -> Recipe:
        """The recipe with every default that depends on something else filled in, and with absolute paths."""
        seed = self.run.seed if self.calibration.seed is None else self.calibration.seed
        threads = 1 if self.run.threads is None else self.run.threads
        filled = self.replace({"calibration.seed": seed, "run.threads": threads})
        return filled._with_paths(lambda p: Path(os.path.abspath(p)))  # noqa: PTH100 -- links stay as the user wrote them

    @property
    def digest(self) -> str:
        """SHA-256 over everything that the result depends on: not over the output folder and the threads."""
        values = self.model_dump(mode="json")
        values["run"] = {"seed": self.run.seed}
        values["calibration"]["seed"] = self.run.seed if self.calibration.seed is None else self.calibration.seed
        return digest_json(values)

    def _with_paths(self, change: Callable[[Path], Path]) -> Recipe:
        def changed(text: str | None) -> str | None:
            return None if text is None else str(change(Path(text).expanduser()))

        model: dict[str, Any] = {"path": changed(self.model.path), "weights": changed(self.model.weights)}
        if _is_file_source(self.model.source):
            model["source"] = changed(self.model.source)
        quantization = self.quantization
        return self.model_copy(
            update={
                "quantization": quantization.model_copy(
                    update={
                        "validation_data": changed(quantization.validation_data),
                        "pot": quantization.pot.model_copy(
                            update={"config_path": changed(quantization.pot.config_path)}
                        ),
                    }
                ),
                "calibration": self.calibration.model_copy(update={"set": changed(self.calibration.set)}),
                "model": self.model.model_copy(update=model),
                "verification": self.verification.model_copy(
                    update={"eval_data": changed(self.verification.eval_data)}
                ),
                "run": self.run.model_copy(update={"output": changed(self.run.output)}),
            }
        )


def _is_file_source(source: str) -> bool:
    """Whether a model source is a file, rather than ``module:callable`` or ``timm:NAME``."""
    return Path(source).suffix.lower() in (".onnx", ".pt2") or ":" not in source


def describe() -> list[FieldDescription]:
    """Every word of a recipe in the order of the file."""
    return list(words_of(Recipe))
