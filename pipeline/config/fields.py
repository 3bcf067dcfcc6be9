"""What config sections are made of."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from pipeline.errors import escaped

Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
NonNegative = Annotated[float, Field(ge=0)]


def _one_class_field(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("must contain {} exactly once, where the class name goes")
    return template


Template = Annotated[str, AfterValidator(_one_class_field)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    def __hash__(self) -> int:
        return hash(content_hash(self))  # a mapping among the fields has none of its own

    @field_validator("*")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value != escaped(value):
            raise ValueError("holds control characters, or is not UTF-8")
        return value


def content_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON-like value or config section; equal values hash equally."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
