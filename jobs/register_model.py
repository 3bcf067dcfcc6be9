#!/usr/bin/env python
"""Log the model of a finished run to its MLflow run, and register it in MLflow's model registry.

    mmap-clip register-model --run mmap-runs/runs/<run> --tracking.registered_model digits
    mlflow models serve -m models:/digits/1 --env-manager local

Running the same command again changes nothing; other options create a new version.
"""

from pathlib import Path

from pipeline.command_line import Field, importing, report_user_errors
from pipeline.config import Config, Fraction, JobArguments, JobOptions, JobParser, Precision, load_yaml, parse_config
from pipeline.errors import UserError


class Options(JobOptions):
    run: str = Field(description="Run directory, <storage>/runs/<run>; local or s3://.")
    method: str = Field("grouped", description="Method whose adapter is registered: adapters/<method>.safetensors.")
    temperature: float | None = Field(None, description="Softmax temperature of all tasks; null: as saved.")
    threshold: Fraction | None = Field(None, description="Confidence threshold; null: as saved.")
    precision: Precision | None = Field(
        None, description="Precision of the towers: float32, bfloat16 or auto (as clip.precision); null: as saved."
    )
    alias: str | None = Field(None, description="Alias of the version: models:/<name>@<alias>.")


FIELD_HELP = {
    "clip.pretrained": "CLIP weights where the model is served: an open_clip tag, a file, a folder or hf-hub:ORG/NAME; "
    "null: as in training.",
    "tracking.uri": "MLflow tracking URI; null: the one that the run was sent to.",
    "tracking.registered_model": "Name of the registered model; null: that of the run's config.yaml.",
}


def main() -> None:
    with report_user_errors():
        register(JobParser(__doc__, Options, FIELD_HELP).parse())


def register(arguments: JobArguments[Options]) -> None:
    job, fields = arguments.options, arguments.fields
    uri, name = fields.get("tracking.uri"), fields.get("tracking.registered_model")
    folder, run_key, uri, name = resolve_run(job.run, uri, name)

    with importing("PyTorch and MLflow"):
        from pipeline.prediction.mlflow_model import saved_mlflow_model
        from pipeline.runtime.tracking.mlflow_adapter import find_run, register_version

    client, run_id = find_run(uri, run_key)
    adapter = folder / "adapters" / f"{job.method}.safetensors"
    with saved_mlflow_model(
        adapter, fields.get("clip.pretrained"), job.temperature, job.threshold, job.precision
    ) as model:
        try:
            client.log_artifacts(run_id, str(model), model.name)
            version = register_version(client, run_id, name, model.name)
            if job.alias:
                client.set_registered_model_alias(name, job.alias, version)
        except Exception as error:  # of MLflow or its artifact store
            raise UserError(f"cannot register the model {name!r} in MLflow at {uri}: {error}") from None
    print(f"models:/{name}/{version}")


def resolve_run(run: str, uri: str | None, name: str | None) -> tuple[Path, str, str, str]:
    """Return the run folder, the key of its MLflow run, its tracking URI, and the name of the registered model."""
    from pipeline.runtime.session import PARENT
    from pipeline.runtime.tracking.delivery import read_journal_id
    from pipeline.runtime.tracking.journal import run_key
    from pipeline.runtime.tracking.mlflow_adapter import resolve_tracking_uri
    from pipeline.runtime.tracking.tracker import read_target
    from pipeline.stages import finished_run

    storage, folder = finished_run.resolve_run(run, Config().cache)
    storage.download(folder)
    journals = sorted(folder.glob("tracking-*"))
    if not (folder / "config.yaml").is_file() or not journals:
        raise UserError(f"--run {run} is not a run directory (it has no config.yaml): give <storage>/runs/<run>")
    name = name or parse_config(load_yaml(finished_run.run_config_file(folder))).tracking.registered_model
    if not name:
        raise UserError("--tracking.registered_model NAME is required: the config of the run does not set it")
    key = run_key(read_journal_id(journals[0]), PARENT)
    uri = uri or resolve_tracking_uri(read_target(storage.folder, journals[0]).uri, storage.folder)
    return folder, key, uri, name


if __name__ == "__main__":
    main()
