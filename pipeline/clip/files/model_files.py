"""Folders with the files of a model: on this machine, or a repository of the Hugging Face Hub at one commit."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pipeline.config import FOLDER_PREFIX, HUB_PREFIX
from pipeline.errors import UserError

log = logging.getLogger(__name__)
PROBE_TIMEOUT_S = 10
ANNOUNCED_BYTES = 10**7
"""Size from which a download is announced: it takes more than a moment."""
_announce: ContextVar[Callable[[str], None]] = ContextVar("announce", default=log.warning)
WEIGHT_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}


class ModelFiles:
    """A folder with the files of a model.

    Args:
        option: the option with its value, which messages begin with.
        folder: the folder; None: not known before the first file.
    """

    path: Path | None = None
    """The user's folder, absolute."""
    repository: str | None = None
    """hf-hub:ORG/NAME@COMMIT of a repository on the Hub, known after the first file."""

    def __init__(self, option: str, folder: Path | None):
        self.option = option
        self.folder = folder

    def find(self, *names: str) -> Path | None:
        """Return the first of the files that it has, or None."""
        raise NotImplementedError

    def missing(self, files: str) -> UserError:
        """Return the error that it has none of these files."""
        raise NotImplementedError


class LocalFolder(ModelFiles):
    """A folder of this machine, also one in the cache of huggingface_hub."""

    folder: Path

    def __init__(self, option: str, folder: Path):
        super().__init__(option, folder)
        self.path = folder.absolute()
        if not folder.is_dir():
            raise no_such_path(option, folder, "folder")

    def find(self, *names: str) -> Path | None:
        return next((path for name in names if (path := self.folder / name).is_file()), None)

    def missing(self, files: str) -> UserError:
        snapshots = sorted(self.folder.glob("snapshots/*/"))
        remedy = f"use its {snapshots[-1]}" if snapshots else "give the folder of a downloaded model"
        return UserError(f"{self.option} has no {files}: {remedy}")


class HubRepository(ModelFiles):
    """A repository of the Hugging Face Hub; its files come from the cache of huggingface_hub, downloaded if needed.

    Args:
        option: as in ModelFiles.
        name: ORG/NAME, or ORG/NAME@REVISION with a branch, tag or commit.
        prefers_cache: take a file in the cache without asking whether the Hub has a newer one, as for a commit.
    """

    unreachable: str = ""
    """Why the Hub cannot be reached."""

    def __init__(self, option: str, name: str, prefers_cache: bool = False):
        super().__init__(option, None)
        self._prefers_cache = prefers_cache or is_commit(f"{HUB_PREFIX}{name}")
        self._name, _, revision = name.partition("@")
        self._revision = revision or None

    def find(self, *names: str) -> Path | None:
        """Return the first of the files that it has; of a known commit first those in the cache.

        None: it has none, or the Hub cannot be reached and none is in the cache.

        Raises:
            UserError: the repository does not exist, or the download fails.
        """
        from huggingface_hub import try_to_load_from_cache

        if self._prefers_cache or is_commit(f"{HUB_PREFIX}{self._name}@{self._revision}"):
            for name in names:
                if isinstance(path := try_to_load_from_cache(self._name, name, revision=self._revision), str):
                    return self._found(Path(path))
        return next((path for name in names if (path := self._download(name))), None)

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        if not self.unreachable:  # else no further wait for each of the other files
            self.unreachable = announce_download(self._name, name, self._revision)
        try:
            path = Path(
                hf_hub_download(self._name, name, revision=self._revision, local_files_only=bool(self.unreachable))
            )
        except LocalEntryNotFoundError as error:
            self.unreachable = self.unreachable or first_line(error)
            return None
        except EntryNotFoundError:
            self.unreachable = ""  # it has answered
            return None
        except RepositoryNotFoundError:
            raise UserError(
                f"{self.option} is not on the Hugging Face Hub, or is private or gated: correct the name, or log in "
                "with `hf auth login`"
            ) from None
        except HFValidationError:
            raise UserError(
                f"{self.option} is not the name of a repository: expected {HUB_PREFIX}ORG/NAME or "
                f"{HUB_PREFIX}ORG/NAME@REVISION"
            ) from None
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"{self.option}: {name} cannot be downloaded ({first_line(error)}): try again") from None
        return self._found(path)

    def _found(self, path: Path) -> Path:
        self.folder, self._revision = path.parent, path.parent.name  # in the cache: snapshots/<commit>/<file>
        self.repository = f"{HUB_PREFIX}{self._name}@{self._revision}"
        return path

    def missing(self, files: str) -> UserError:
        if not self.unreachable:
            return UserError(f"{self.option} has no {files}: use the repository of a CLIP")
        return UserError(
            f"{self.option} has no {files} in the cache, and the Hugging Face Hub cannot be reached "
            f"({self.unreachable}): run `hf download {self._name}` where it can, and give the folder that it prints"
        )


@contextmanager
def announcing_downloads(say: Callable[[str], None]) -> Iterator[None]:
    """Tell `say` of the block's downloads; elsewhere, as on a worker whose machine lacks a file, they are logged."""
    token = _announce.set(say)
    try:
        yield
    finally:
        _announce.reset(token)


def announce_download(repository: str, name: str, revision: str | None) -> str:
    """Announce a large file that is not in the cache; return why the Hub cannot be reached, or an empty text.

    To find out by a download would take half a minute, with a line for each attempt.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        metadata = get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=PROBE_TIMEOUT_S)
    except (HfHubHTTPError, EntryNotFoundError, HFValidationError):  # the download reports them
        return ""
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except Exception as error:  # of the HTTP library
        return first_line(error)
    if (metadata.size or 0) >= ANNOUNCED_BYTES and not isinstance(
        try_to_load_from_cache(repository, name, revision=metadata.commit_hash), str
    ):
        _announce.get()(
            f"downloading {name} of {repository} ({(metadata.size or 0) / 1e6:,.0f} MB) from the Hugging Face Hub to "
            f"{HF_HUB_CACHE} ..."
        )
    return ""


def first_line(error: Exception) -> str:
    return f"{str(error).strip().partition(chr(10))[0]:.100}" or type(error).__name__


def open_model_files(option: str, source: str) -> LocalFolder | HubRepository:
    """Open what `local-dir:PATH`, the path of a folder, or `hf-hub:ORG/NAME` names.

    Args:
        option: name of the option, for messages.
        source: its value.

    Raises:
        UserError: the folder does not exist.
    """
    if source.startswith(HUB_PREFIX):
        return HubRepository(f"{option}={source}", source.removeprefix(HUB_PREFIX))
    return LocalFolder(f"{option}={source}", folder_path(source))


def no_such_path(option: str, path: Path, kind: str) -> UserError:
    """Return the error that a path does not exist; it may have been meant as the name of a repository."""
    is_name = len(path.parts) == 2 and not path.is_absolute()
    return UserError(
        f"{option}: no such {kind}"
        + (f"; a repository of the Hugging Face Hub is {HUB_PREFIX}{path}" if is_name else "")
    )


def check_weights_exist(pretrained: str) -> None:
    """Check a value of clip.pretrained that looks like a path.

    Raises:
        UserError: there is no such file or folder.
    """
    path = folder_path(pretrained)
    is_file = path.suffix.lower() in WEIGHT_SUFFIXES
    looks_like_path = (is_file or len(path.parts) > 1) and not pretrained.startswith(HUB_PREFIX)
    if looks_like_path and not path.exists():
        raise no_such_path(f"clip.pretrained={pretrained}", path, "file" if is_file else "file or folder")


def is_commit(source: str) -> bool:
    """Return whether a source is a repository at a commit, which never changes."""
    return re.fullmatch(rf"{HUB_PREFIX}.+@[0-9a-f]{{40}}", source) is not None


def folder_path(source: str) -> Path:
    """Return the path that `local-dir:PATH` or a plain path names."""
    return Path(source.removeprefix(FOLDER_PREFIX)).expanduser()
