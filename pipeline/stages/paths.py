"""Check of the paths in a config, before the imports that its full check needs: PyTorch takes seconds."""

from __future__ import annotations

from pathlib import Path

from pipeline.clip.files.model_files import check_weights_exist
from pipeline.config import BUILTIN_DIGITS, Config
from pipeline.errors import UserError
from pipeline.files import is_uri


def check_paths(config: Config) -> None:
    """Check that the data and the weights that a config names are on this machine, unless they are in a bucket.

    Raises:
        UserError: one is not.
    """
    root, model = config.data.root, config.clip.model
    if model.endswith(".json") and not Path(model).expanduser().is_file():
        raise UserError(f"clip.model={model}: no such model-config file")
    if root and root != BUILTIN_DIGITS and not is_uri(root) and not Path(root).expanduser().exists():
        raise UserError(f"data.root={root} is not a folder or file on this machine")
    if config.clip.pretrained:
        check_weights_exist(config.clip.pretrained)
