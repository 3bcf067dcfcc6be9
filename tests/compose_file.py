"""docker-compose.yml as compose reads it: anchors merged, variables filled in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml
from pipelines import REPOSITORY

COMPOSE_FILE = REPOSITORY / "docker-compose.yml"
# Innermost first, so that variables within variables are filled in before what is around them.
VARIABLE = re.compile(r"\$\{([A-Z_]+)(?:(:[-?+])([^${}]*))?\}")


class VariableUnset(Exception):
    """Compose ends with this message."""


def read_compose_file(variables: Mapping[str, str]) -> dict[str, Any]:
    return _filled(yaml.safe_load(COMPOSE_FILE.read_text()), variables)


def words(command: str | list[str] | None) -> list[str]:
    """A command or entrypoint, as its process gets it."""
    return shlex.split(command) if isinstance(command, str) else list(command or [])


def read_env_file(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(part, variables) for key, part in value.items()}
    if isinstance(value, list):
        return [_filled(part, variables) for part in value]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match) -> str:
        name, operator, fallback = match.groups()
        current = variables.get(name, "")
        if operator == ":?" and not current:
            raise VariableUnset(f"{name} is not set: {fallback}")
        if operator == ":+":
            return fallback if current else ""
        return current or (fallback if operator == ":-" else "")

    while (filled := VARIABLE.sub(substitute, value)) != value:
        value = filled
    return value
