#!/usr/bin/env python
"""Upload the trained model of a finished run to the Hugging Face Hub, with a model card.

    mmap-clip push mmap-runs/runs/<run> OWNER/NAME --license mit
    mmap-clip predict hf-hub:OWNER/NAME photos/ --task ink_left

The repository gets the adapter, its options and a README.md with the tasks, their classes and test accuracies; it is
created if it does not exist. The CLIP weights stay where they are. Log in with `hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

from typing import ClassVar

from pipeline.command_line import Field, importing, print_status, report_user_errors
from pipeline.config import JobArguments, JobOptions, JobParser


class Options(JobOptions):
    positional: ClassVar[tuple[str, ...]] = ("run", "repository")

    run: str = Field(description="Run directory, <storage>/runs/<run>; local or s3://.")
    repository: str = Field(description="Repository on the Hub, OWNER/NAME.")
    method: str = Field("grouped", description="Method whose adapter is uploaded: adapters/<method>.safetensors.")
    license: str | None = Field(
        None, description="License of the model, an identifier of the Hub such as mit; null: the card names none."
    )
    private: bool = Field(False, description="Make a new repository private; an existing one stays as it is.")


FIELD_HELP = {
    "clip.pretrained": "CLIP weights that the model is loaded with: an open_clip tag or hf-hub:ORG/NAME; null: as in "
    "training.",
}


def main() -> None:
    with report_user_errors():
        push(JobParser(__doc__, Options, FIELD_HELP).parse())


def push(arguments: JobArguments[Options]) -> None:
    job = arguments.options
    with importing("PyTorch"):
        from pipeline.workflows.runs import open_run
        from pipeline.workflows.upload import check_repository, is_path, repository_folder, upload

    check_repository(job.repository)
    pretrained = arguments.fields.get("clip.pretrained")
    with repository_folder(open_run(job.run), job.method, job.repository, job.license, pretrained) as (folder, clip):
        if job.license is None:
            print_status("no --license: the card names none, and others may not know whether they may use the model")
        if is_path(clip.pretrained):
            print_status(
                f"warning: the model is loaded with the CLIP weights {clip.pretrained} of this machine, a path that is "
                "in the adapter: others need a copy and pretrained=FILE. Weights on the Hub: --clip.pretrained "
                "hf-hub:ORG/NAME"
            )
        print(upload(folder, job.repository, job.private))


if __name__ == "__main__":
    main()
