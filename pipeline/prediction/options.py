"""How trained prompts are to be used, as a JSON file beside them: <prompts>.options.json for <prompts>.safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import MAX_YAML_BYTES, read_text
from pipeline.errors import UserError, escape_controls
from pipeline.files import write_json

GROUPED = "adapters/grouped.safetensors"
"""Prompts of grouped MmAP, in a run's folder."""

Temperature = Annotated[float, Field(gt=0, le=1e6)]


class ModelOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    temperatures: dict[str, Temperature] = {}
    """Task → what its logits are divided by; 1 for tasks that are not here."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Probability below which an image is none of the classes; None: never."""
    pretrained: str | None = None
    """Where the CLIP weights are; None: where they were in training."""

    def check(self, tasks: Iterable[str]) -> None:
        """Raises: UserError: a temperature for a task that there is not."""
        if unknown := [task for task in self.temperatures if task not in set(tasks)]:
            raise UserError(f"temperature of task {unknown[0]!r}: the model has the tasks {', '.join(tasks)}")

    def changed(self, **values: object) -> ModelOptions:
        """With those values that are not None. Raises: UserError: one out of range."""
        given = {name: value for name, value in values.items() if value is not None}
        try:
            return ModelOptions.model_validate({**self.model_dump(), **given})
        except ValidationError as error:
            fault = error.errors()[0]
            name = ".".join(map(str, fault["loc"])).replace("temperatures", "temperature")
            raise UserError(f"{name}={fault['input']!r}: {fault['msg']}") from None


class _File(ModelOptions):
    format: Literal[1] = 1
    prompts_sha256: str


def options_file(adapter_file: Path) -> Path:
    return adapter_file.with_suffix(".options.json")


def write_options(adapter_file: Path, options: ModelOptions) -> Path:
    """Returns the JSON file. Raises: UserError: it cannot be written."""
    file = options_file(adapter_file)
    write_json(file, _File(**options.model_dump(), prompts_sha256=_sha256(adapter_file)).model_dump())
    return file


def read_options(adapter_file: Path) -> ModelOptions:
    """Those beside a prompts file, or the defaults where there are none.

    Raises:
        UserError: no such JSON, or that of other prompts.
    """
    file = options_file(adapter_file)
    if not file.exists():
        return ModelOptions()
    try:
        found = _File.model_validate(json.loads(read_text(file, f"options file {file}", limit=MAX_YAML_BYTES)))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(
            f"{file} is no options file of this project: {escape_controls(str(reason))}; remove it"
        ) from None
    if found.prompts_sha256 != _sha256(adapter_file):
        raise UserError(f"{file} belongs to other prompts than {adapter_file.name}: calibrate again, or remove it")
    return ModelOptions(**found.model_dump(exclude={"format", "prompts_sha256"}))


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
