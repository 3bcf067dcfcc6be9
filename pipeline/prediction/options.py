"""Inference options of an adapter, as JSON in the same folder: <name>.options.json for <name>.safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pipeline.config import MAX_YAML_BYTES, Precision, read_text
from pipeline.config.messages import value_message
from pipeline.errors import UserError, escape_controls
from pipeline.files import write_json

GROUPED_ADAPTER = "adapters/grouped.safetensors"
"""The adapter of grouped MmAP in a run directory."""
HUB_ADAPTER = "adapter.safetensors"
"""The adapter in a repository of the Hugging Face Hub."""


def _number(value: object) -> float:
    """Refuse what pydantic would take as a number: true and text."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError("must be a number")
    return float(value)


Number = Annotated[float, BeforeValidator(_number)]
Temperature = Annotated[Number, Field(gt=0, le=1e6)]


class ModelOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    temperatures: dict[str, Temperature] = {}
    """Task → temperature; 1 for tasks that are absent."""
    threshold: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Confidence threshold; below it the label is None. None: no threshold, or 0.5 where images may have several
    labels."""
    pretrained: str | None = None
    """Path or open_clip tag of the CLIP weights; None: as in training."""
    precision: Precision | None = None
    """Precision of the towers, as clip.precision; None: as in training."""

    def check_tasks(self, tasks: Iterable[str]) -> None:
        """Raises: UserError: a temperature of an unknown task."""
        if unknown := [task for task in self.temperatures if task not in set(tasks)]:
            raise UserError(f"temperature of unknown task {unknown[0]!r}; the model has the tasks {', '.join(tasks)}")

    def updated(self, **values: object) -> ModelOptions:
        """Return the options with the values that are not None. Raises: UserError: a value out of range."""
        values = {name: value for name, value in values.items() if value is not None}
        try:
            return ModelOptions.model_validate({**self.model_dump(), **values})
        except ValidationError as error:
            details = error.errors()[0]
            name = ".".join(map(str, details["loc"])).replace("temperatures", "temperature")
            raise UserError(f"{name}={details['input']!r}: {value_message(details)}") from None


class _File(ModelOptions):
    format: Literal[1] = 1
    adapter_sha256: str


def options_file(adapter_file: Path) -> Path:
    return adapter_file.with_suffix(".options.json")


def write_options(adapter_file: Path, options: ModelOptions) -> Path:
    """Write the JSON file and return its path. Raises: UserError: it cannot be written."""
    file = options_file(adapter_file)
    write_json(file, _File(**options.model_dump(), adapter_sha256=_sha256(adapter_file)).model_dump())
    return file


def read_options(adapter_file: Path) -> ModelOptions:
    """Return the options saved with an adapter file, or the defaults if there are none.

    Raises:
        UserError: invalid JSON, or the options of another adapter.
    """
    file = options_file(adapter_file)
    if not file.exists():
        return ModelOptions()
    try:
        content = _File.model_validate(json.loads(read_text(file, f"options file {file}", limit=MAX_YAML_BYTES)))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        reason = value_message(error.errors()[0]) if isinstance(error, ValidationError) else error
        raise UserError(f"{file} is not a valid options file: {escape_controls(str(reason))}; remove it") from None
    if content.adapter_sha256 != _sha256(adapter_file):
        raise UserError(f"{file} belongs to another adapter than {adapter_file.name}; calibrate again, or remove it")
    return ModelOptions(**content.model_dump(exclude={"format", "adapter_sha256"}))


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
