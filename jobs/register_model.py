#!/usr/bin/env python
"""Puts the model of a finished run into its MLflow run, and into MLflow's model registry.

    python jobs/register_model.py --run mmap-runs/runs/<run> --name digits
    mlflow models serve -m models:/digits/1 --env-manager local

The same command again changes nothing; other options make another version.
"""

import argparse
import os
import sys
from pathlib import Path

from pipeline.config import load_yaml, parse_config
from pipeline.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, metavar="FOLDER", help="<storage>/runs/<run>, also in a bucket")
    parser.add_argument("--name", required=True, help="of the registered model")
    parser.add_argument(
        "--prompts", default="grouped", metavar="METHOD", help="prompts/<METHOD>.safetensors of the run"
    )
    parser.add_argument("--pretrained", metavar="TAG_OR_FILE", help="CLIP weights where the model is to be served")
    parser.add_argument("--temperature", type=float, help="of all tasks, instead of what was saved with the prompts")
    parser.add_argument("--threshold", type=float, help="probability below which an image is none of the classes")
    parser.add_argument("--alias", help="for the version, as models:/<name>@<alias>")
    parser.add_argument("--tracking-uri", metavar="URI", help="MLflow of the run (default: as its config.yaml says)")
    arguments = parser.parse_args()
    try:
        return register(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def register(arguments: argparse.Namespace) -> int:
    run_folder, uri = located(arguments.run, arguments.tracking_uri)

    from pipeline.prediction.mlflow_model import saved_mlflow_model  # torch and MLflow take seconds to import
    from pipeline.runtime.tracking.mlflow_adapter import find_run, register_version

    client, run_id = find_run(uri, run_folder)
    place, query, options = run_folder.partition("?")
    prompts = f"{place}/prompts/{arguments.prompts}.safetensors{query}{options}"
    with saved_mlflow_model(prompts, arguments.pretrained, arguments.temperature, arguments.threshold) as model:
        try:
            client.log_artifacts(run_id, str(model), model.name)
            version = register_version(client, run_id, arguments.name, model.name)
            if arguments.alias:
                client.set_registered_model_alias(arguments.name, arguments.alias, version)
        except Exception as error:  # of MLflow, or of its store of files
            raise UserError(f"MLflow at {uri} did not take the model {arguments.name!r}: {error}") from None
    print(f"models:/{arguments.name}/{version}")
    return 0


def located(run: str, tracking_uri: str | None) -> tuple[str, str]:
    """The run's folder as its tags have it, and its tracking URI."""
    from pipeline.runtime.storage import is_uri
    from pipeline.runtime.tracking.mlflow_adapter import resolve_tracking_uri

    if is_uri(run):
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            raise UserError("give --tracking-uri: where a run in a bucket was tracked is not known here")
        return run.rstrip("/"), uri
    folder = Path(run).expanduser().resolve()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--run {run} is no folder of a run: it has no config.yaml")
    config = parse_config(load_yaml(folder / "config.yaml"))
    return str(folder), tracking_uri or resolve_tracking_uri(config.tracking.uri, folder.parent.parent)


if __name__ == "__main__":
    sys.exit(main())
