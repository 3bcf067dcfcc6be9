#!/usr/bin/env python
"""Log the model of a finished run to its MLflow run, and register it in MLflow's model registry.

    mmap-clip register-model --run mmap-runs/runs/<run> --tracking.registered_model digits
    mlflow models serve -m models:/digits/1 --env-manager local

Running the same command again changes nothing; other options create a new version.
"""

import os
from pathlib import Path

from pipeline.command_line import Field, importing, report_user_errors
from pipeline.config import Fraction, JobArguments, JobOptions, JobParser, load_yaml, parse_config
from pipeline.errors import UserError


class Options(JobOptions):
    run: str = Field(description="Run directory, <storage>/runs/<run>; local or s3://.")
    method: str = Field("grouped", description="Method whose adapter is registered: adapters/<method>.safetensors.")
    temperature: float | None = Field(None, description="Softmax temperature of all tasks; null: as saved.")
    threshold: Fraction | None = Field(None, description="Confidence threshold; null: as saved.")
    alias: str | None = Field(None, description="Alias of the version: models:/<name>@<alias>.")


FIELD_HELP = {
    "clip.pretrained": "CLIP weights where the model is served: an open_clip tag, a file, a folder or hf-hub:ORG/NAME; "
    "null: as in training.",
    "tracking.uri": "MLflow tracking URI; null: that of the run's config.yaml.",
    "tracking.registered_model": "Name of the registered model; null: that of the run's config.yaml.",
}


def main() -> None:
    with report_user_errors():
        register(JobParser(__doc__, Options, FIELD_HELP).parse())


def register(arguments: JobArguments[Options]) -> None:
    job, fields = arguments.options, arguments.fields
    run_folder, uri, name = resolve_run(job.run, fields.get("tracking.uri"), fields.get("tracking.registered_model"))

    with importing("PyTorch and MLflow"):
        from pipeline.prediction.mlflow_model import saved_mlflow_model
        from pipeline.runtime.tracking.mlflow_adapter import find_run, register_version

    client, run_id = find_run(uri, run_folder)
    folder, separator, query = run_folder.partition("?") if "://" in run_folder else (run_folder, "", "")
    adapter = f"{folder}/adapters/{job.method}.safetensors{separator}{query}"
    with saved_mlflow_model(adapter, fields.get("clip.pretrained"), job.temperature, job.threshold) as model:
        try:
            client.log_artifacts(run_id, str(model), model.name)
            version = register_version(client, run_id, name, model.name)
            if job.alias:
                client.set_registered_model_alias(name, job.alias, version)
        except Exception as error:  # of MLflow or its artifact store
            raise UserError(f"cannot register the model {name!r} in MLflow at {uri}: {error}") from None
    print(f"models:/{name}/{version}")


def resolve_run(run: str, uri: str | None, name: str | None) -> tuple[str, str, str]:
    """Return the run folder as in the tags of the run, its tracking URI, and the name of the registered model."""
    from pipeline.files import is_uri
    from pipeline.runtime.tracking.mlflow_adapter import resolve_tracking_uri

    if is_uri(run):
        folder, uri = run.rstrip("/"), uri or os.environ.get("MLFLOW_TRACKING_URI")
    else:
        path = Path(run).expanduser().resolve()
        if not (path / "config.yaml").is_file():
            raise UserError(f"--run {run} is not a run directory (it has no config.yaml): give <storage>/runs/<run>")
        tracking = parse_config(load_yaml(path / "config.yaml")).tracking
        folder, name = str(path), name or tracking.registered_model
        uri = uri or resolve_tracking_uri(tracking.uri, path.parent.parent)
    if not uri:
        raise UserError("--tracking.uri http://HOST:PORT is required for a run in a bucket: the server of the run")
    if not name:
        raise UserError("--tracking.registered_model NAME is required: the config of the run does not set it")
    return folder, uri, name


if __name__ == "__main__":
    main()
