"""Files of Hugging Face that a model needs besides its weights: its tokenizer, and the config of its text tower.

They come from the model's folder, or else from the cache of huggingface_hub, or else from the Hub. Both are read with
`transformers`, an optional dependency.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.clip.files.model_files import announce_download, first_line
from pipeline.errors import UserError

TEXT_CONFIG = "config.json"
"""Config of transformers' text tower."""
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = "tokenizer.json", "vocab.txt", "vocab.json", "*.model"
TOKENIZER_FILES = (
    *VOCABULARIES,
    TOKENIZER_CONFIG,
    TEXT_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)


def needs_transformers(text_config: Mapping[str, Any]) -> bool:
    """Return whether a model with open_clip's text_cfg needs the package."""
    return bool(text_config.get("hf_tokenizer_name") or text_config.get("hf_model_name"))


def tokenizer_folder(text_config: Mapping[str, Any], folder: Path | None) -> Path | None:
    """Return the folder with the tokenizer of Hugging Face, or None if the model has CLIP's.

    Args:
        text_config: open_clip's text_cfg.
        folder: folder of the model, if it has one.

    Raises:
        UserError: transformers is not installed, or the tokenizer is nowhere.
    """
    name = text_config.get("hf_tokenizer_name")
    if not name:
        return None
    _check_transformers("tokenizer")
    if folder and _has_any(folder, VOCABULARIES):
        return folder.absolute()
    return _cached_or_downloaded(name, "tokenizer", TOKENIZER_FILES, (VOCABULARIES, (TOKENIZER_CONFIG,)), folder)


def text_config_folder(text_config: Mapping[str, Any], folder: Path | None) -> Path | None:
    """Return the folder with the config of transformers' text tower, or None if the model has open_clip's.

    Args, Raises: as `tokenizer_folder`.
    """
    name = text_config.get("hf_model_name")
    if not name:
        return None
    _check_transformers("text tower")
    if folder and (folder / TEXT_CONFIG).is_file():
        return folder.absolute()
    return _cached_or_downloaded(name, "text tower", (TEXT_CONFIG,), ((TEXT_CONFIG,),), folder)


def text_files_hash(text_config: Mapping[str, Any], folder: Path | None) -> str | None:
    """Return the SHA-256 of these files by name and content; None: the model needs none.

    Args, Raises: as `tokenizer_folder`.
    """
    folders = (
        (tokenizer_folder(text_config, folder), TOKENIZER_FILES),
        (text_config_folder(text_config, folder), (TEXT_CONFIG,)),
    )
    files = [file for path, names in folders if path for name in names for file in sorted(path.glob(name))]
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _check_transformers(part: str) -> None:
    if find_spec("transformers") is None:
        raise UserError(
            f"its {part} is one of Hugging Face, and transformers is not installed:\n"
            "pip install 'mmap-clip[hugging-face]'"
        )


def _cached_or_downloaded(
    name: str, part: str, files: Sequence[str], needed: Sequence[Sequence[str]], folder: Path | None
) -> Path:
    """Return the folder with files of a repository of the Hub, which is not asked if the cache has those needed.

    Args:
        name: the repository, or the absolute path of a folder.
        needed: of each the alternatives; without all but the first it is complete if the Hub has no more.
        folder: folder of the model.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    if Path(name).is_absolute():
        return Path(name)
    reason = "the Hub cannot be reached"
    for is_local in (True, False):
        if not is_local and (unreachable := announce_download(name, TEXT_CONFIG, None)):
            reason = f"the Hub cannot be reached ({unreachable})"
            break
        try:
            found = Path(snapshot_download(name, allow_patterns=list(files), local_files_only=is_local))
        except LocalEntryNotFoundError:
            continue
        except RepositoryNotFoundError:
            reason = "the Hub has none of this name, or it is private"
        except Exception as error:  # of the HTTP library, too
            reason = first_line(error)
        else:
            if all(_has_any(found, alternatives) for alternatives in (needed if is_local else needed[:1])):
                return found
            reason = "what is there is incomplete"
    remedy = f"copy its folder in the cache there to {HF_HUB_CACHE} here"
    if folder:
        remedy = f"copy {' and '.join(alternatives[0] for alternatives in needed)} to {folder}"
    raise UserError(
        f"its {part} {name} is not in the cache of the Hugging Face Hub, and {reason}: run `hf download {name}` where "
        f"it can be downloaded, and {remedy}"
    )


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any(file.is_file() for name in names for file in folder.glob(name))
