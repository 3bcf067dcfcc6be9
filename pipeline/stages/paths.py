"""Check of the paths and the cluster in a config, before its full check, whose imports take seconds."""

from __future__ import annotations

from pathlib import Path

from pipeline.clip.files.model_files import check_weights_exist
from pipeline.config import BUILTIN_DIGITS, Config
from pipeline.errors import UserError
from pipeline.files import is_uri
from pipeline.runtime.ray_start import check_ray


def check_paths(config: Config) -> None:
    """Check that the data and the weights that a config names are on this machine, unless they are in a bucket, and
    that its Ray can be reached or started.

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
    check_ray(config.cluster)
