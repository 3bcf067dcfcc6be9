"""What a method trained as one safetensors file: the numbers, and in its header all that is needed to use them.

Header field `prompts` (JSON): the method and its options, the CLIP with the fingerprint of its weights, per group its
tasks with their class names by label, and the SHA-256 of all that and of the numbers. Nothing in the file is executed
on loading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.data.names import split_synonyms
from pipeline.errors import UserError, escape_controls
from pipeline.files import atomic_write
from pipeline.methods.classifier import Classifier
from pipeline.methods.registry import get_method, method_options

FORMAT = 3


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    method: str
    config: dict[str, Any]
    weights: str
    groups: list[dict[str, list[str]]] = Field(min_length=1)


@dataclass(frozen=True)
class TrainedAdapter:
    """Of one or several groups. `config`: its CLIP and the method's section count; `weights`: fingerprint of the CLIP
    that they were trained on; `groups`: per group task → class words by label; `states`: each group's state dict."""

    method: str
    config: Config
    weights: str
    groups: tuple[dict[str, list[str]], ...]
    states: tuple[dict[str, torch.Tensor], ...]

    @property
    def class_names(self) -> dict[str, list[str]]:
        """Task → words of its classes, for the tasks of all groups."""
        return {task: class_names for group in self.groups for task, class_names in group.items()}

    @property
    def labels(self) -> dict[str, list[str]]:
        """Task → what its classes are called: the first name of each."""
        return {
            task: [split_synonyms(of_class)[0] for of_class in class_names]
            for task, class_names in self.class_names.items()
        }

    @property
    def num_parameters(self) -> int:
        """Trained numbers; what a method keeps of its structure is no number."""
        return sum(value.numel() for state in self.states for value in state.values() if value.is_floating_point())

    @property
    def digest(self) -> str:
        """SHA-256 of all that a file of it says."""
        return _digest(*_contents(self))

    def select_group(self, task: str) -> TrainedAdapter:
        """The group with this task alone."""
        at = next(at for at, class_names in enumerate(self.groups) if task in class_names)
        return replace(self, groups=(self.groups[at],), states=(self.states[at],))

    def towers(self, device: str = "cpu", pretrained: str | None = None) -> ClipTowers:
        """Loads the CLIP.

        Args:
            pretrained: where the CLIP weights lie here, if not where they lay in training.

        Raises:
            UserError: the CLIP found is not the one that the prompts were trained on.
        """
        config, in_float32 = self.config, get_method(self.method).trains_weights
        clip = config.clip.model_copy(update={"pretrained": pretrained}) if pretrained else config.clip
        towers = load_clip(clip, config.mmap.text_prompt_position, device, in_float32)
        if weights_fingerprint(towers) != self.weights:
            raise UserError(
                f"the weights of clip.pretrained={clip.pretrained!r} are not those that these prompts were "
                "trained on; give the same weights"
            )
        return towers

    def classifier(
        self, device: str = "cpu", pretrained: str | None = None, towers: ClipTowers | None = None
    ) -> Classifier:
        """Gives a classifier for all tasks.

        Args:
            pretrained: as in `towers`.
            towers: what `towers` gave for these prompts, or for others that were trained on the same CLIP; None: it is
                loaded here. Weights that a method trains are its own: the towers stay as they are.

        Raises:
            UserError: as in `towers`; or the numbers do not fit the CLIP.
        """
        config, kind = self.config, get_method(self.method)
        towers = towers or self.towers(device, pretrained)
        groups = []
        for class_names, state in zip(self.groups, self.states):
            try:
                method = kind.build(config, towers, class_names)
                method.load_state_dict(state)
                if any(value.dtype != state[name].dtype for name, value in method.state_dict().items()):
                    raise RuntimeError("numbers of another type")
            except RuntimeError as error:
                raise UserError(
                    f"the prompts of {', '.join(class_names)} do not fit {kind.title} on {config.clip.model}: {error}; "
                    "train them again"
                ) from None
            with torch.no_grad():
                groups.append((class_names, method.to(device)()))
        return Classifier(towers, kind.templates_by_task(config, self.class_names), groups, config.clip.precision)


def save_adapter(path: Path, prompts: TrainedAdapter) -> None:
    header, tensors = _contents(prompts)
    with atomic_write(path) as partial:
        # In one field: safetensors writes several in any order.
        save_file(tensors, partial, metadata={"adapter": _canonical(header | {"sha256": _digest(header, tensors)})})


def load_adapter(path: Path) -> TrainedAdapter:
    """Raises: UserError: no such file, no safetensors, none that `save_adapter` wrote, or not as it wrote it."""
    if not path.is_file():
        raise UserError(f"prompts file {path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {})["adapter"])
            if values["format"] != FORMAT:
                raise UserError(
                    f"prompts file {path} has format {values['format']!r:.80}; this version reads {FORMAT}: train the "
                    "prompts again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        digest = values.pop("sha256")
        header, config = _Header(**values), Config(**values["config"])
        if digest != _digest(values, tensors):
            raise ValueError("its numbers are not those that were written; copy it again")
        states: dict[str, dict[str, torch.Tensor]] = {str(number): {} for number in range(len(header.groups))}
        for name, value in tensors.items():
            number, _, parameter = name.partition(".")
            states[number][parameter] = value
        prompts = TrainedAdapter(header.method, config, header.weights, tuple(header.groups), tuple(states.values()))
        _check(prompts)
        return prompts
    except UserError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UserError(f"{path} is no prompts file of this project: {type(error).__name__}: {reason}") from None


def merge_adapters(parts: Sequence[TrainedAdapter]) -> TrainedAdapter:
    """The groups of several files, trained on the same CLIP, as one."""
    first = parts[0]
    own = {task: text for part in parts for task, text in _own_templates(part).items()}
    clip = first.config.clip.model_copy(update={"task_templates": own})
    return TrainedAdapter(
        first.method,
        first.config.model_copy(update={"clip": clip}),
        first.weights,
        tuple(group for part in parts for group in part.groups),
        tuple(state for part in parts for state in part.states),
    )


def _own_templates(prompts: TrainedAdapter) -> dict[str, str]:
    """Of its tasks alone."""
    return {task: text for task, text in prompts.config.clip.task_templates.items() if task in prompts.class_names}


def _contents(prompts: TrainedAdapter) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the numbers of a file."""
    header = {
        "format": FORMAT,
        "method": prompts.method,
        "config": {
            "clip": prompts.config.clip.model_dump(mode="json", exclude={"task_templates"})
            | ({"task_templates": own} if (own := _own_templates(prompts)) else {}),
            "mmap": prompts.config.mmap.model_dump(mode="json"),  # the place of text prompts
            **method_options(prompts.method, prompts.config),
        },
        "weights": prompts.weights,
        "groups": prompts.groups,
    }
    tensors = {
        f"{number}.{name}": value.detach().cpu().contiguous()
        for number, state in enumerate(prompts.states)
        for name, value in state.items()
    }
    return header, tensors


def _canonical(header: dict[str, Any]) -> str:
    return json.dumps(header, ensure_ascii=False, sort_keys=True)


def _digest(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(_canonical(header).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _check(prompts: TrainedAdapter) -> None:
    """Raises: ValueError: numbers that are none, options that ask for more than there are, odd names, a task twice."""
    trained, options = get_method(prompts.method).trainable, method_options(prompts.method, prompts.config)
    sizes = [value for section in options.values() for value in section.values() if type(value) is int]
    if len(prompts.class_names) != sum(map(len, prompts.groups)):
        raise ValueError("a task is in two groups")
    if any(
        text != escape_controls(text)
        for task, class_names in prompts.class_names.items()
        for text in (task, *class_names)
    ):
        raise ValueError("a name holds control characters")
    for group, state in zip(prompts.groups, prompts.states):
        if any(value.is_floating_point() and not value.isfinite().all() for value in state.values()):
            raise ValueError(f"the prompts of {', '.join(group)} are not finite")
        count = sum(value.numel() for value in state.values())
        if trained and any(size > count for size in (1, *sizes)):
            raise ValueError(f"{prompts.method} of {options} has more numbers than the {count} for {', '.join(group)}")
        if not group or not all(group.values()):
            raise ValueError("a group has no task, or a task no class")
