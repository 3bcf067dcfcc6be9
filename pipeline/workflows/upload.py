"""Upload of a run's trained model with its model card to the Hugging Face Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.clip.files.model_files import folder_path
from pipeline.clip.files.weights import base_repository
from pipeline.config import BUILTIN_DIGITS, FOLDER_PREFIX, HUB_PREFIX, ClipConfig
from pipeline.errors import UserError
from pipeline.files import write_file
from pipeline.prediction.load import read_model
from pipeline.prediction.options import HUB_ADAPTER, write_options
from pipeline.report.model_card import model_card
from pipeline.report.summary import Summary
from pipeline.workflows.runs import Run


def is_path(source: str | None) -> bool:
    """Return whether a value of clip.pretrained or clip.model is a file or folder of this machine."""
    if source is None or source.startswith(HUB_PREFIX):
        return False
    return source.startswith(FOLDER_PREFIX) or folder_path(source).is_absolute() or folder_path(source).exists()


@contextmanager
def repository_folder(
    run: Run, method: str, repository: str, license_id: str | None, pretrained: str | None
) -> Iterator[tuple[Path, ClipConfig]]:
    """Provide a temporary folder with the files of the repository, and the CLIP that the model needs.

    Args:
        method: the variant whose adapter is uploaded.
        repository: OWNER/NAME.
        license_id: as of `model_card`.
        pretrained: as of `pipeline.load`.

    Raises:
        UserError: the run is not finished, or has no adapter of this method; its CLIP is a file of this machine.
    """
    adapters = run.adapters
    if method not in adapters:
        raise UserError(f"--method: {run.uri} has no adapter of {method!r}; it has: {', '.join(adapters)}")
    adapter, options, _ = read_model(adapters[method], pretrained)
    clip = adapter.config.clip.with_weights(options.pretrained)
    if clip.model != BUILTIN_DIGITS and is_path(clip.model):
        raise UserError(
            f"clip.model={clip.model} is a file of this machine, without which nobody can load the model: train with a "
            f"name of open_clip or {HUB_PREFIX}ORG/NAME"
        )
    with tempfile.TemporaryDirectory(prefix="upload-") as temporary:
        folder = Path(temporary)
        shutil.copyfile(adapters[method], folder / HUB_ADAPTER)
        write_options(folder / HUB_ADAPTER, options)
        card = model_card(
            Summary(**run.summary),
            method,
            repository,
            adapter.labels,
            clip.model,
            base_repository(clip),
            is_path(clip.pretrained),
            license_id,
        )
        write_file(folder / "README.md", card)
        yield folder, clip


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder as a commit to a repository of the Hub, which is created if it does not exist.

    Returns:
        The source of the uploaded model, hf-hub:OWNER/NAME@COMMIT.

    Raises:
        UserError: the upload failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload model")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        remedy = "try again"
        if status in (401, 403, 404):
            remedy = "log in with `hf auth login` or HF_TOKEN, with a token that may write to this repository"
        raise UserError(f"cannot upload to {repository} ({_reason(error)}): {remedy}") from None
    except Exception as error:  # of the HTTP library; huggingface_hub's own of a card
        raise UserError(f"cannot upload to {repository} ({_reason(error)}): check the network and try again") from None
    return f"{HUB_PREFIX}{repository}@{commit.oid}"


def check_repository(repository: str) -> None:
    """Raises: UserError: not OWNER/NAME, or nobody is logged in at the Hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        is_valid = repository.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(f"{repository!r} is not the name of a repository of the Hugging Face Hub: expected OWNER/NAME")
    if not get_token():
        raise UserError("nobody is logged in at the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
