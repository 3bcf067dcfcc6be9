"""What a method trained as one safetensors file: the numbers, and in its header all that is needed to use them.

Header field `prompts` (JSON): the method and its options, the CLIP with the fingerprint of its weights, and per group
its tasks with their class names by label. Nothing in the file is executed on loading.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.methods.classifier import Classifier
from pipeline.methods.registry import kind_of, options_of

FORMAT = 2


@dataclass(frozen=True)
class TrainedPrompts:
    """Of one or several groups. `config`: its CLIP and the method's section count; `weights`: fingerprint of the CLIP
    that they were trained on; `groups`: per group task → class words by label; `states`: each group's state dict."""

    method: str
    config: Config
    weights: str
    groups: tuple[dict[str, list[str]], ...]
    states: tuple[dict[str, torch.Tensor], ...]

    @property
    def words(self) -> dict[str, list[str]]:
        """Task → words of its classes, for the tasks of all groups."""
        return {task: words for group in self.groups for task, words in group.items()}

    @property
    def num_parameters(self) -> int:
        """Trained numbers; what a method keeps of its structure is no number."""
        return sum(value.numel() for state in self.states for value in state.values() if value.is_floating_point())

    def classifier(self, device: str = "cpu", pretrained: str | None = None) -> Classifier:
        """Loads the CLIP and gives a classifier for all tasks.

        Args:
            pretrained: where the CLIP weights lie here, if not where they lay in training.

        Raises:
            UserError: the CLIP found is not the one that the prompts were trained on.
        """
        config = self.config
        if pretrained:
            config = config.model_copy(update={"clip": config.clip.model_copy(update={"pretrained": pretrained})})
        kind = kind_of(self.method)
        towers = load_clip(config.clip, config.mmap.text_order, device, kind.trains_weights)
        if weights_fingerprint(towers) != self.weights:
            raise UserError(
                f"the weights of clip.pretrained={config.clip.pretrained!r} are not those that these prompts were "
                "trained on; give the same weights"
            )
        groups = []
        for words, state in zip(self.groups, self.states):
            method = kind.build(config, towers, words)
            method.load_state_dict(state)
            with torch.no_grad():
                groups.append((words, method.to(device)()))
        return Classifier(towers, kind.template(config), groups, config.clip.precision)


def save_prompts(path: Path, prompts: TrainedPrompts) -> None:
    header = {
        "format": FORMAT,
        "method": prompts.method,
        "config": {
            "clip": prompts.config.clip.model_dump(mode="json"),
            "mmap": prompts.config.mmap.model_dump(mode="json"),  # the place of text prompts
            **options_of(prompts.method, prompts.config),
        },
        "weights": prompts.weights,
        "groups": prompts.groups,
    }
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, state in enumerate(prompts.states)
        for name, value in state.items()
    }
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"prompts": json.dumps(header, ensure_ascii=False, sort_keys=True)})
    os.replace(partial, path)


def load_prompts(path: Path) -> TrainedPrompts:
    """Raises: UserError: no such file, no safetensors, or none that `save_prompts` wrote."""
    if not path.is_file():
        raise UserError(f"prompts file {path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["prompts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if header["format"] != FORMAT:
            raise UserError(f"prompts file {path} has format {header['format']!r}; this version reads {FORMAT}")
        groups = tuple(header["groups"])
        return TrainedPrompts(
            header["method"],
            Config(**header["config"]),
            header["weights"],
            groups,
            tuple(_state(tensors, number) for number in range(len(groups))),
        )
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, ValidationError) as error:
        raise UserError(f"{path} is no prompts file of this project: {type(error).__name__}: {error}") from None


def merge_prompts(parts: Sequence[TrainedPrompts]) -> TrainedPrompts:
    """The groups of several files, trained on the same CLIP, as one."""
    first = parts[0]
    return TrainedPrompts(
        first.method,
        first.config,
        first.weights,
        tuple(group for part in parts for group in part.groups),
        tuple(state for part in parts for state in part.states),
    )


def _state(tensors: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    prefix = f"{number}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
