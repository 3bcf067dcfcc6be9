"""The methods and their variants by name: what the config, the pipeline, the report and saved files know of each."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.methods import __path__ as _FOLDER
from pipeline.methods.method import REGISTRY, Method, Variant

if TYPE_CHECKING:
    from pipeline.config import Config, TrainingConfig

_IMPORT_TORCH = ("classifier", "adapter_file")
"""The modules of the folder that are no methods, and import torch at once."""
for _module in pkgutil.iter_modules(_FOLDER):
    if _module.name not in _IMPORT_TORCH:
        import_module(f"pipeline.methods.{_module.name}")

_ORDER = (
    *("zero_shot", "coop", "vpt", "maple", "clip_adapter", "joint_prompts", "mlp_prompts", "linear_probe", "lamm"),
    *(
        "promptsrc",
        "bitfit",
        "full_finetune",
        "clip_lora",
        "any other",
        "mvlpt",
        "softcpt",
        "hipro",
        "mmap_shared",
        "mmap",
    ),
)
"""Of methods in reports and lists. A method need not be here: all others are by their names."""
METHODS: dict[str, type[Method]] = {
    name: REGISTRY[name]
    for name in sorted(REGISTRY, key=lambda name: (_ORDER.index(name if name in _ORDER else "any other"), name))
}
_single_and_multi_task = {name: method.title for name, method in METHODS.items() if method.variants is None}
_declared = {name: variant for method in METHODS.values() for name, variant in (method.variants or {}).items()}
VARIANTS = {
    "zero_shot": _declared.pop("zero_shot"),
    **{name: Variant(title, name, "single-task") for name, title in _single_and_multi_task.items()},
    **{f"{name}_mt": Variant(f"{title}-MT", name, "multi-task") for name, title in _single_and_multi_task.items()},
    **_declared,
}
"""The columns of a report, in its order."""
DEFAULT_VARIANTS = ("all_in_one", "grouped")
"""What is trained beside the variants of config.baselines."""


def get_method(name: str) -> type[Method]:
    """Raises: UserError: a saved file names a method that this version does not have."""
    if name not in METHODS:
        raise UserError(f"method {name!r} is not known; methods: {', '.join(METHODS)}")
    return METHODS[name]


def method_options(method: str, config: Config) -> dict[str, Any]:
    """The method's section of the config, by its name, without its training."""
    section = get_method(method).section
    return {} if section is None else {section: getattr(config, section).model_dump(mode="json", exclude={"training"})}


def training_config(method: str, config: Config) -> TrainingConfig:
    """How a method is trained: config.training, with what its own section has instead."""
    own = getattr(getattr(config, get_method(method).section or "", None), "training", None)
    changes = own.model_dump(exclude_none=True) if own else {}
    return config.training.model_copy(update=changes)
