"""The pipeline called from Python: the settings of a call become a config, as the options of a command line do."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pipeline import interrupts
from pipeline.config import (
    Config,
    JobArguments,
    JobOptions,
    did_you_mean,
    explain_unavailable,
    fields,
    find_option,
    value_types,
)
from pipeline.errors import UserError
from pipeline.stages.flow import check_stage, needs_weights, run_stages
from pipeline.stages.paths import check_paths

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.data.findings import Finding
    from pipeline.runtime.session import Session
    from pipeline.stages.plan import Plan
    from pipeline.workflows.runs import Run

# Of libraries whose progress bars are not used here; in a notebook without ipywidgets, their imports say so.
logging.getLogger("ray.widgets").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message="IProgress not found")

OWN_ARGUMENTS = ("root", "config", "until", "verbose")
NOTEBOOK_WIDTH = 110

ConfigSource = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Any] | Config
"""YAML files, as of --config, or values, as of options."""


class InterruptedCall(KeyboardInterrupt):
    """Ctrl-C, or the stop button of a notebook, which shows only the message."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def fit(arguments: Mapping[str, Any], config: ConfigSource | None, last_stage: str, verbose: bool) -> Run:
    """Run the stages up to `last_stage`, using cached artifacts. Arguments and errors are those of `pipeline.fit`."""
    check_stage("until", last_stage)
    with _opened_run("fit", arguments, config, verbose, needs_weights(last_stage)) as (plan, session):
        run_stages(plan, session, last_stage)

    from pipeline.workflows.runs import Run

    return Run(plan.storage, plan.folder)


def check(arguments: Mapping[str, Any], config: ConfigSource | None, verbose: bool) -> list[Finding]:
    """Check the images. Arguments and errors are those of `pipeline.check`."""
    with _opened_run("check", arguments, config, verbose, fetches_weights=False) as (plan, session):
        from pipeline.stages.data_check import check_data

        return check_data(plan, session, verbose)


@contextmanager
def _opened_run(
    function: str,
    arguments: Mapping[str, Any],
    config: ConfigSource | None,
    verbose: bool,
    fetches_weights: bool = True,
) -> Iterator[tuple[Plan, Session]]:
    run_config, console = make_config(config, arguments, function), _console(verbose)
    check_paths(run_config)
    if "ray" not in sys.modules:
        console.print("importing PyTorch and Ray ...", highlight=False)

    from pipeline.runtime.environment import called_from_python
    from pipeline.stages.run import open_run

    interrupts.forget_signals()
    try:
        with (
            called_from_python(_format_call(function, config, arguments)),
            open_run(run_config, console, fetches_weights) as opened,
        ):
            yield opened
    except KeyboardInterrupt:
        point = interrupts.resume_point()
        raise InterruptedCall("interrupted: the same call resumes" + (f" at {point}" if point else "")) from None


def _format_call(function: str, config: ConfigSource | None, arguments: Mapping[str, Any]) -> str:
    """Return the call as Python code, to repeat the run with."""
    values = {"config": config, **arguments}
    plain = {name: _to_plain(value) for name, value in values.items() if value is not None}
    named = [f"{name}={value!r}" for name, value in plain.items() if name.isidentifier()]
    dotted = {name: value for name, value in plain.items() if not name.isidentifier()}
    return f"pipeline.{function}({', '.join([*named, *([f'**{dotted!r}'] if dotted else [])])})"


def make_config(config: ConfigSource | None, arguments: Mapping[str, Any], function: str) -> Config:
    """Return the config of a call, by the rules of the command line.

    Args:
        config: YAML files as of --config, or values, which the arguments override.
        arguments: name → value, or None: not given. A name is a section of the config, whose value is a mapping, or a
            field, by any name that the command line takes.
        function: how error messages call the function.

    Raises:
        UserError: an unknown name, a field that is given twice, or an invalid value.
    """
    values: dict[str, Any] = {}
    files: list[Path] = []
    if isinstance(config, Config | Mapping):
        values = _flatten(_to_plain(config))
    elif config is not None:
        files = [Path(file).expanduser() for file in ([config] if isinstance(config, str | os.PathLike) else config)]
    settings: dict[str, Any] = {}
    for name, value in arguments.items():
        if value is None:
            continue
        if name == "root" and not isinstance(value, str | os.PathLike):
            raise UserError(
                f"{function}() takes a path as root, not {type(value).__name__}: give a folder of images or a table "
                "(a data frame with the columns path and label, and task: save it with to_parquet)"
            )
        fields_given = _flatten({_resolve_name(name, value, function): _to_plain(value)})
        if twice := [field for field in fields_given if field in settings]:
            raise UserError(f"{function}() gets {twice[0]} twice, once as {name}: give it once")
        settings |= fields_given
    return JobArguments(JobOptions(), files, values | settings).config()


def _resolve_name(name: str, value: Any, function: str) -> str:
    """Return the section or dotted field that an argument sets."""
    if name in Config.model_fields and isinstance(value, Mapping | BaseModel):
        return name
    valid = {f"--{field}": field for field, _, _ in fields()}
    if option := find_option(name, valid):
        return valid[option]
    if name.partition(".")[0] in Config.model_fields:
        return name  # validation reports what is wrong
    if reason := explain_unavailable(name, valid):
        raise UserError(f"{function}() has no argument {name!r}: {reason.replace('--', '')}")
    raise UserError(
        f"{function}() has no argument {name!r}{did_you_mean(name, [*OWN_ARGUMENTS, *valid.values()])} "
        "A field of a section is given as grouping={'objective': 'mean'}"
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted name of a field → value, from mappings nested by section; a text for a list is its element."""
    sections = {field.rpartition(".")[0] for field, _, _ in fields()}
    lists = {name for name, field, _ in fields() if tuple in value_types(field.annotation)}
    flat: dict[str, Any] = {}
    for name, value in values.items():
        is_section = isinstance(value, Mapping) and f"{prefix}{name}" in sections
        if f"{prefix}{name}" in lists and isinstance(value, str):
            value = [value]
        flat |= _flatten(value, f"{prefix}{name}.") if is_section else {f"{prefix}{name}": value}
    return flat


def _to_plain(value: Any) -> Any:
    """Convert paths, sections, collections, and numbers and arrays of NumPy to what YAML has."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return [_to_plain(item) for item in value]
    return value


def _console(verbose: bool) -> Console:
    """Return a console for a terminal, a log or a notebook; a notebook gets colors, but no bars that are redrawn."""
    from rich.console import Console

    options: dict[str, Any] = {"soft_wrap": True, "quiet": not verbose}
    if (console := Console(**options)).is_jupyter:
        return Console(
            **options, force_jupyter=False, force_terminal=False, color_system="standard", width=NOTEBOOK_WIDTH
        )
    return console
