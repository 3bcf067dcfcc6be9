#!/usr/bin/env python
"""List the models of open_clip, and what each can do: which towers take prompts, which methods, its size.

    mmap-clip list-models                          all
    mmap-clip list-models SigLIP 'ViT-B*' --tags   by parts of names or wildcards, with their weights
    mmap-clip list-models --method maple --json    those that take a method; as JSON, for scripts

A name is a value of clip.model, a tag one of clip.pretrained. Nothing is downloaded, and no weights are loaded.
"""

from __future__ import annotations

import json
import os
import sys
from typing import ClassVar

from pipeline.command_line import Field, importing, report_user_errors
from pipeline.config import JobOptions, JobParser, did_you_mean
from pipeline.errors import UserError
from pipeline.methods.registry import METHODS, VARIANTS


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("patterns",)

    patterns: tuple[str, ...] = Field(
        (), description="Parts of names (SigLIP) or names with wildcards ('ViT-B*'), in any case; none: all models."
    )
    method: str | None = Field(
        None, description="Only models that take this method (docs/methods.md); null: all.", examples=list(METHODS)
    )
    tags: bool = Field(False, description="Also the tags of each model, with the preprocessing of their images.")
    as_json: bool = Field(False, alias="json", description="Print a list of JSON objects; tags are in it in any case.")


def select_method(name: str | None) -> str | None:
    """Return the method of this name, or of its variant."""
    if name is None or name in METHODS:
        return name
    if name not in VARIANTS:
        valid = list(dict.fromkeys([*METHODS, *VARIANTS]))
        raise UserError(f"--method: unknown method {name}{did_you_mean(name, valid)} Valid: {', '.join(valid)}")
    return VARIANTS[name].method


def main() -> None:
    with report_user_errors("rerun the same command to start over") as console:
        options = JobParser(__doc__, Options, field_help={}).parse().options
        method = select_method(options.method)
        with importing("PyTorch and open_clip"):
            from pipeline.clip.model_list import describe_model, find_models
            from pipeline.report.model_table import ModelTable, tag_lines, takes_method, to_json

        names = find_models(options.patterns)
        table, objects = ModelTable(names), []
        if not options.as_json:
            console.print(table.header(), style="bold", highlight=False)
        for count, name in enumerate(names, 1):
            if options.as_json and sys.stderr.isatty():
                print(f"\r{count} of {len(names)} models", end="\n" * (count == len(names)), file=sys.stderr)
            model = describe_model(name)
            if method and not takes_method(model.prompts, method):
                continue
            if options.as_json:
                objects.append(to_json(model))
                continue
            style = "dim" if model.prompts == "refused" else None
            console.print(table.row(model), style=style, markup=False, highlight=False)
            for line in tag_lines(model.tags) if options.tags and model.prompts != "refused" else []:
                console.print(line, style="dim", markup=False, highlight=False)
        if options.as_json:
            print(json.dumps(objects, indent=2))
        else:
            console.print(f"\n{table.legend(console.width)}", markup=False, highlight=False)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # the reader, such as `head`, needs no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
