"""Registry of all methods and their variants, by name."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.methods import __path__ as _FOLDER
from pipeline.methods.method import REGISTRY, Method, Variant

if TYPE_CHECKING:
    from pipeline.config import Config, TrainingConfig

_NOT_METHODS = ("classifier", "adapter_file")
"""Modules of the folder that are not methods, and import torch immediately."""
for _module in pkgutil.iter_modules(_FOLDER):
    if _module.name not in _NOT_METHODS:
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
"""Order of methods in reports and lists; methods not listed are sorted by name."""
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
"""Columns of a report, in its order."""
DEFAULT_VARIANTS = ("each_alone", "all_in_one", "grouped")
"""Variants that are always trained, in addition to config.baselines."""


def with_sources(names: Iterable[str]) -> list[str]:
    """Return variants with those whose trainings they start from or are merged from, each once."""
    variants: dict[str, None] = {}
    for name in names:
        init_from = VARIANTS[name].init_from
        variants |= dict.fromkeys([*(with_sources([init_from]) if init_from else ()), name])
    return list(variants)


def get_method(name: str) -> type[Method]:
    """Return the method of this name. Raises: UserError: this version has no such method."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}; methods: {', '.join(METHODS)}")
    return METHODS[name]


def method_options(method: str, config: Config) -> dict[str, Any]:
    """Return {section name: options} of the method, without its training overrides."""
    section = get_method(method).section
    return {} if section is None else {section: getattr(config, section).model_dump(mode="json", exclude={"training"})}


def training_config(method: str, config: Config) -> TrainingConfig:
    """Return config.training with the overrides of the method's section; 0 epochs if it takes no steps."""
    kind = get_method(method)
    if not kind.takes_steps:
        return config.training.model_copy(update={"epochs": 0})
    overrides = getattr(getattr(config, kind.section or "", None), "training", None)
    return config.training.model_copy(update=overrides.model_dump(exclude_none=True) if overrides else {})
