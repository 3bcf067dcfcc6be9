"""A trained adapter as one safetensors file: its tensors, and in the header all that is needed to use them.

Header field `adapter` (JSON): the method and its options, the CLIP with the fingerprint of its weights, the tasks of
each group with their class names by label, the biases of multi-label tasks, and the SHA-256 of all that and of the
tensors. Loading executes no code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pipeline.clip.load import load_clip, weights_fingerprint
from pipeline.clip.towers import ClipTowers
from pipeline.config import Config
from pipeline.config.messages import value_message
from pipeline.data.names import split_synonyms
from pipeline.errors import UserError, escape_controls
from pipeline.files import atomic_write
from pipeline.methods.classifier import Classifier
from pipeline.methods.method import FittedMethod
from pipeline.methods.registry import get_method, method_options

FORMAT = 4


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    method: str
    config: dict[str, Any]
    weights: str
    groups: list[dict[str, list[str]]] = Field(min_length=1)
    logit_biases: dict[str, float] = {}


@dataclass(frozen=True)
class TrainedAdapter:
    """Trained adapter of one or several groups. `config`: only its CLIP, with preprocessing, and the method's section
    matter; `weights`: fingerprint of the CLIP it was trained on; `groups`: task → class names by label; `states`: their
    state dicts; `logit_biases`: task → what is added to its logits, of multi-label tasks."""

    method: str
    config: Config
    weights: str
    groups: tuple[dict[str, list[str]], ...]
    states: tuple[dict[str, torch.Tensor], ...]
    logit_biases: dict[str, float] = field(default_factory=dict)

    @classmethod
    def on_towers(
        cls,
        towers: ClipTowers,
        method: str,
        config: Config,
        groups: tuple[dict[str, list[str]], ...],
        states: tuple[dict[str, torch.Tensor], ...],
        logit_biases: dict[str, float] | None = None,
    ) -> TrainedAdapter:
        """Return an adapter trained on `towers`, of which it records the weights and the preprocessing."""
        clip = config.clip.model_copy(update=asdict(towers.preprocessing))
        config = config.model_copy(update={"clip": clip})
        return cls(method, config, weights_fingerprint(towers), groups, states, logit_biases or {})

    @property
    def class_names(self) -> dict[str, list[str]]:
        """Task → names of its classes, for the tasks of all groups."""
        return {task: class_names for group in self.groups for task, class_names in group.items()}

    @property
    def labels(self) -> dict[str, list[str]]:
        """Task → the first name of each of its classes."""
        return {task: [split_synonyms(c)[0] for c in class_names] for task, class_names in self.class_names.items()}

    @property
    def num_parameters(self) -> int:
        """Number of trained parameters; buffers of integers or booleans do not count."""
        return sum(value.numel() for state in self.states for value in state.values() if value.is_floating_point())

    @property
    def digest(self) -> str:
        """SHA-256 of the content of its file."""
        return _digest(*_contents(self))

    def select_group(self, task: str) -> TrainedAdapter:
        """Return the adapter of only the group with this task."""
        index = next(index for index, class_names in enumerate(self.groups) if task in class_names)
        group = self.groups[index]
        biases = {task: bias for task, bias in self.logit_biases.items() if task in group}
        return replace(self, groups=(group,), states=(self.states[index],), logit_biases=biases)

    def towers(self, device: str = "cpu", pretrained: str | None = None, precision: str | None = None) -> ClipTowers:
        """Load the CLIP, for inference.

        Args:
            pretrained, precision: values of clip.pretrained and clip.precision, if different from training.

        Raises:
            UserError: the CLIP is not the one that the adapter was trained on.
        """
        config, float32 = self.config, get_method(self.method).trains_weights
        clip = config.clip.with_weights(pretrained).with_precision(precision)
        towers = load_clip(clip, config.mmap.text_prompt_position, device, float32, inference=True)
        if weights_fingerprint(towers) != self.weights:
            raise UserError(
                f"the weights of clip.pretrained={clip.pretrained!r} are not those that this adapter was "
                "trained on: give the same weights with --clip.pretrained FILE"
            )
        return towers

    def classifier(
        self,
        device: str = "cpu",
        pretrained: str | None = None,
        towers: ClipTowers | None = None,
        precision: str | None = None,
    ) -> Classifier:
        """Build a classifier for all tasks.

        Args:
            pretrained, precision: as in `towers`.
            towers: the towers of this adapter, or of another one trained on the same CLIP; not modified. None: loaded
                here.

        Raises:
            UserError: as in `towers`; or the tensors do not fit the CLIP.
        """
        config, method_class = self.config, get_method(self.method)
        towers = towers or self.towers(device, pretrained, precision)
        groups = []
        for class_names, state in zip(self.groups, self.states):
            try:
                method = method_class.build(config, towers, class_names)
                method.load_state_dict(state)
                if any(value.dtype != state[name].dtype for name, value in method.state_dict().items()):
                    raise RuntimeError("tensors of another dtype")
            except RuntimeError as error:
                raise UserError(
                    f"the adapter of {', '.join(class_names)} does not fit {method_class.title} on "
                    f"{config.clip.model}: {error}; train it again"
                ) from None
            with torch.no_grad():
                tokens = method_class.tokenize(config, towers.tokenizer, class_names)
                groups.append((class_names, tokens, method.to(device)()))
        return Classifier(towers, groups, precision or config.clip.precision, self.logit_biases)


def save_adapter(path: Path, adapter: TrainedAdapter) -> None:
    header, tensors = _contents(adapter)
    with atomic_write(path) as partial:
        # One field, since safetensors writes several in any order.
        save_file(tensors, partial, metadata={"adapter": _canonical(header | {"sha256": _digest(header, tensors)})})


def load_adapter(path: Path) -> TrainedAdapter:
    """Load an adapter. Raises: UserError: the file is missing, damaged, or not written by `save_adapter`."""
    if not path.is_file():
        raise UserError(f"adapter file {path} does not exist")
    try:
        with safe_open(path, "pt") as file:
            values = json.loads((file.metadata() or {})["adapter"])
            if values["format"] != FORMAT:
                raise UserError(
                    f"adapter file {path} has format {values['format']!r:.80}; this version reads {FORMAT}: "
                    "train it again"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        digest = values.pop("sha256")
        header, config = _Header(**values), Config(**values["config"])
        if digest != _digest(values, tensors):
            raise ValueError("it is corrupted (SHA-256 mismatch); copy it again")
        states: dict[str, dict[str, torch.Tensor]] = {str(index): {} for index in range(len(header.groups))}
        for name, value in tensors.items():
            index, _, parameter = name.partition(".")
            states[index][parameter] = value
        groups = tuple(header.groups), tuple(states.values())
        adapter = TrainedAdapter(header.method, config, header.weights, *groups, header.logit_biases)
        _validate(adapter)
        return adapter
    except UserError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ValidationError):
            details = error.errors()[0]
            reason = f"{'.'.join(map(str, details['loc']))} {value_message(details)}"
        raise UserError(f"{path} is not an adapter file of this project: {reason}") from None


def merge_adapters(adapters: Sequence[TrainedAdapter]) -> TrainedAdapter:
    """Merge the groups of adapters of one method trained on the same CLIP."""
    method, config, weights = adapters[0].method, adapters[0].config, adapters[0].weights
    templates = {task: text for adapter in adapters for task, text in _task_templates(adapter).items()}
    clip = config.clip.model_copy(update={"task_templates": templates})
    return TrainedAdapter(
        method,
        config.model_copy(update={"clip": clip}),
        weights,
        tuple(group for adapter in adapters for group in adapter.groups),
        tuple(state for adapter in adapters for state in adapter.states),
        {task: bias for adapter in adapters for task, bias in adapter.logit_biases.items()},
    )


def _task_templates(adapter: TrainedAdapter) -> dict[str, str]:
    """Return the templates of the adapter's tasks."""
    return {task: text for task, text in adapter.config.clip.task_templates.items() if task in adapter.class_names}


def _contents(adapter: TrainedAdapter) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the header and the tensors of the adapter's file."""
    header = {
        "format": FORMAT,
        "method": adapter.method,
        "config": {
            "clip": adapter.config.clip.model_dump(mode="json", exclude={"task_templates"})
            | ({"task_templates": templates} if (templates := _task_templates(adapter)) else {}),
            "mmap": adapter.config.mmap.model_dump(mode="json"),  # for text_prompt_position
            **method_options(adapter.method, adapter.config),
        },
        "weights": adapter.weights,
        "groups": adapter.groups,
        **({"logit_biases": adapter.logit_biases} if adapter.logit_biases else {}),
    }
    tensors = {
        f"{index}.{name}": value.detach().cpu().contiguous()
        for index, state in enumerate(adapter.states)
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


def _validate(adapter: TrainedAdapter) -> None:
    """Raises: ValueError: NaN or infinite values, options larger than the tensors, control characters, a task twice,
    biases of some tasks only."""
    kind, options = get_method(adapter.method), method_options(adapter.method, adapter.config)
    sizes = [value for section in options.values() for value in section.values() if type(value) is int]
    if issubclass(kind, FittedMethod):
        sizes = []  # its options are no sizes of tensors
    if len(adapter.class_names) != sum(map(len, adapter.groups)):
        raise ValueError("a task is in two groups")
    if adapter.logit_biases and adapter.logit_biases.keys() != adapter.class_names.keys():
        raise ValueError("logit_biases are not those of its tasks")
    if not all(map(math.isfinite, adapter.logit_biases.values())):
        raise ValueError("logit_biases are not finite")
    texts = [text for task, class_names in adapter.class_names.items() for text in (task, *class_names)]
    if any(text != escape_controls(text) for text in texts):
        raise ValueError("a name has control characters")
    for group, state in zip(adapter.groups, adapter.states):
        if any(value.is_floating_point() and not value.isfinite().all() for value in state.values()):
            raise ValueError(f"the parameters of {', '.join(group)} are not finite")
        count = sum(value.numel() for value in state.values())
        if kind.has_parameters() and any(size > count for size in (1, *sizes)):
            raise ValueError(
                f"{adapter.method} with {options} needs more than {count} parameters for {', '.join(group)}"
            )
        if not group or not all(group.values()):
            raise ValueError("a group without tasks, or a task without classes")
