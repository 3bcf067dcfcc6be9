"""Table and JSON of open_clip's models, and which methods each takes."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.clip.model_list import ModelDescription, Prompts, Tag
from pipeline.methods.registry import METHODS, VARIANTS

_MAX_WIDTH = 120
_STANDARDIZATIONS = {
    "OpenAI": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of R, G, B."""


def takes_method(prompts: Prompts, method: str) -> bool:
    """Return whether a model whose towers take these prompts takes this method of registry.METHODS."""
    return prompts == "both" or (prompts == "text" and not METHODS[method].needs_image_layers())


def to_json(model: ModelDescription) -> dict[str, Any]:
    """Return the model as an object of JSON; `methods` are values of `mmap-clip benchmark --methods`."""
    values = asdict(model)
    shapes, tags = values.pop("shapes"), values.pop("tags")
    methods = [name for name, variant in VARIANTS.items() if takes_method(model.prompts, variant.method)]
    return {**values, "methods": methods, **shapes, "tags": tags}


class ModelTable:
    """A table whose lines are made as the models are described, 80 columns wide."""

    def __init__(self, names: Sequence[str]):
        """
        Args:
            names: names of all models that may be in the table.
        """
        self._name_width = max(map(len, ["model", *names]))
        self._number_by_reason: dict[str, int] = {}
        self._counts = Counter[str]()
        self._needs_transformers = False

    def header(self) -> str:
        return self._line("model", "prompts", "params", "px", "image", "text", "dim")

    def row(self, model: ModelDescription) -> str:
        """Return the line of a model."""
        shapes, prompts = model.shapes, str(model.prompts)
        self._counts[prompts] += 1
        if model.needs and model.prompts != "refused":
            self._needs_transformers = True
            prompts += "*"
        if model.reason:
            prompts += f" {self._number_by_reason.setdefault(model.reason, len(self._number_by_reason) + 1)}"
        if model.prompts == "refused":
            return f"{model.name:<{self._name_width}}  {prompts}"
        return self._line(
            model.name,
            prompts,
            _count(shapes.parameters),
            str(shapes.image_size),
            _layers(shapes.image_layers, shapes.image_width),
            _layers(shapes.text_layers, shapes.text_width),
            str(shapes.embed_dim),
        )

    def legend(self, width: int) -> str:
        """Return the legend of all rows so far."""
        if not (number := self._counts.total()):
            return "no model fits"
        text_methods = [name for name in METHODS if takes_method("text", name)]
        entries = [
            ("both", "image and text tower take prompts: all methods"),
            ("text", f"only the text tower takes prompts: {', '.join(text_methods)}"),
            ("refused", "cannot be used"),
        ]
        marks = (
            [("*", "needs transformers (pip install 'mmap-clip[hugging-face]'), which downloads the tokenizer")]
            if self._needs_transformers
            else []
        )
        marks += [(str(number), reason) for reason, number in self._number_by_reason.items()]
        columns = "image and text are layers x width of the towers, px the side of an image, dim the width of features"
        counts = ", ".join(f"{self._counts[name]} {name}" for name, _ in entries if self._counts[name])
        label_width, width = max(len(name) for name, _ in entries), min(width, _MAX_WIDTH)
        lines = [f"{number} model{'s' * (number > 1)} of open_clip: {counts}", *textwrap.wrap(columns, width)]
        for label, text in [*((name, text) for name, text in entries if self._counts[name]), *marks]:
            indent = " " * (label_width + 2)
            lines += textwrap.wrap(f"{label:<{label_width}}  {text}", width, subsequent_indent=indent)
        return "\n".join(lines)

    def _line(self, name: str, prompts: str, parameters: str, size: str, image: str, text: str, dim: str) -> str:
        return f"{name:<{self._name_width}}  {prompts:<7}  {parameters:>6}  {size:>4}  {image:>7}  {text:>7}  {dim:>4}"


def tag_lines(tags: Sequence[Tag]) -> list[str]:
    """Return a line per tag of a model: resize mode, interpolation, mean and standard deviation."""
    width = max((len(tag.tag) for tag in tags), default=0)
    return [f"    {tag.tag:<{width}}  {tag.resize_mode}, {tag.interpolation}, {_standardization(tag)}" for tag in tags]


def _standardization(tag: Tag) -> str:
    for name, values in _STANDARDIZATIONS.items():
        if (tag.mean, tag.std) == values:
            return f"{name}'s mean and std"
    mean, std = (" ".join(f"{value:g}" for value in sorted(set(values))) for values in (tag.mean, tag.std))
    return f"mean {mean}, std {std}"


def _count(parameters: int | None) -> str:
    if parameters is None:
        return "-"
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def _layers(layers: int | None, width: int | None) -> str:
    return "-" if layers is None else f"{layers}x{width}"
