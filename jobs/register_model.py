#!/usr/bin/env python
"""Puts the model of a finished run into its MLflow run, and into MLflow's model registry.

    python jobs/register_model.py --run mmap-runs/runs/<run> --tracking.registered_model digits
    mlflow models serve -m models:/digits/1 --env-manager local

The same command again changes nothing; other options make another version.
"""

import os
from pathlib import Path

from pydantic import Field

from pipeline.command_line import report_user_errors
from pipeline.config import Fraction, Given, JobOptions, JobParser, load_yaml, parse_config
from pipeline.errors import UserError


class Options(JobOptions):
    run: str = Field(description="<storage>/runs/<run>, also in a bucket.")
    method: str = Field("grouped", description="Whose prompts: prompts/<method>.safetensors of the run.")
    temperature: float | None = Field(None, description="Of all tasks; null: as saved with the prompts.")
    threshold: Fraction | None = Field(
        None, description="Probability below which an image is none of the classes; null: as saved with the prompts."
    )
    alias: str | None = Field(None, description="For the version, as models:/<name>@<alias>.")


TAKES = {
    "clip.pretrained": "Tag or file of the CLIP weights where the model is to be served; null: as in training.",
    "tracking.uri": "MLflow of the run; null: as the run's config.yaml says.",
    "tracking.registered_model": "Name of the registered model; null: as the run's config.yaml says.",
}


def main() -> None:
    with report_user_errors():
        register(JobParser(__doc__, Options, TAKES).given())


def register(given: Given[Options]) -> None:
    own, fields = given.own, given.fields
    run_folder, uri, name = located(own.run, fields.get("tracking.uri"), fields.get("tracking.registered_model"))

    from pipeline.prediction.mlflow_model import saved_mlflow_model  # torch and MLflow take seconds to import
    from pipeline.runtime.tracking.mlflow_adapter import find_run, register_version

    client, run_id = find_run(uri, run_folder)
    place, query, options = run_folder.partition("?")
    prompts = f"{place}/adapters/{own.method}.safetensors{query}{options}"
    with saved_mlflow_model(prompts, fields.get("clip.pretrained"), own.temperature, own.threshold) as model:
        try:
            client.log_artifacts(run_id, str(model), model.name)
            version = register_version(client, run_id, name, model.name)
            if own.alias:
                client.set_registered_model_alias(name, own.alias, version)
        except Exception as error:  # of MLflow, or of its store of files
            raise UserError(f"MLflow at {uri} did not take the model {name!r}: {error}") from None
    print(f"models:/{name}/{version}")


def located(run: str, uri: str | None, name: str | None) -> tuple[str, str, str]:
    """The run's folder as its tags have it, its tracking URI, and the registered model's name."""
    from pipeline.runtime.storage import is_uri
    from pipeline.runtime.tracking.mlflow_adapter import resolve_tracking_uri

    if is_uri(run):
        folder, uri = run.rstrip("/"), uri or os.environ.get("MLFLOW_TRACKING_URI")
    else:
        path = Path(run).expanduser().resolve()
        if not (path / "config.yaml").is_file():
            raise UserError(f"--run {run} is no folder of a run: it has no config.yaml")
        tracking = parse_config(load_yaml(path / "config.yaml")).tracking
        folder, name = str(path), name or tracking.registered_model
        uri = uri or resolve_tracking_uri(tracking.uri, path.parent.parent)
    if not uri:
        raise UserError("give --tracking.uri: where a run in a bucket was tracked is not known here")
    if not name:
        raise UserError("give --tracking.registered_model: the run's config has no name for the model")
    return folder, uri, name


if __name__ == "__main__":
    main()
