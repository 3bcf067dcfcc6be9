"""Reference implementations of methods, and their common parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from reference_towers import reference_encode_text
from small_clip import CLASS_NAMES, tokenizer

StartCheck = Callable[[torch.Tensor], bool]


class Option(NamedTuple):
    value: object
    """Neither the default nor 1."""
    shapes: dict[str, tuple[int, ...]] = {}
    """Shapes of the parameters with these names, in towers of 4 text layers and 5 vision layers."""
    only_in_training: bool = False
    """Whether it changes neither features nor losses."""


class Training(NamedTuple):
    """Frozen features of all tasks' training images."""

    features: list[torch.Tensor]
    """(n, views, E) of each task."""
    labels: list[torch.Tensor]
    """(n,) of each task."""
    text_features: list[torch.Tensor]
    """(C, E) of each task's classes."""
    class_names: list[list[str]]
    """Of each task."""

    @property
    def names(self) -> list[str]:
        """All tasks' classes, each once."""
        return list(dict.fromkeys(name for names in self.class_names for name in names))

    def images(self):
        """Yield each image's task, views (V, E), and class name."""
        for task, (features, labels) in enumerate(zip(self.features, self.labels)):
            for views, label in zip(features, labels):
                yield task, views, self.class_names[task][label]


@dataclass(frozen=True)
class Reference:
    """Reference of a method. `model` is open_clip's, `towers` are built from it."""

    starts: Callable[[Any, Any], Mapping[str, StartCheck]]
    """(towers, model) → pattern of parameters' names → check of their initial values."""
    features: Callable[[Any, Any, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor]] | None = None
    """(method, model, images, config) → features (B, E), (C, E) of one task, by the plain towers; None: nothing
    trains."""
    logits: Callable[[Any, torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor] | None = None
    """(method, x, z, CLIP's logits, config) → logits (B, C) of one task, from features of unit length; None: CLIP's."""
    fit: Callable[[Any, Training, Any], Mapping[str, torch.Tensor]] | None = None
    """(options, training images, CLIP's temperature) → state of a method that is fitted to them."""
    added_loss: Callable[..., torch.Tensor] | None = None
    """(method, options, x, frozen x, z, frozen z, logits, frozen logits) → the terms that one of two tasks adds to its
    cross-entropy; features have unit length."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """Each option, except the training's, with another value than its default."""
    small: Mapping[str, Any] = field(default_factory=dict)
    """Options that fit the small towers."""
    start_options: Mapping[str, Any] = field(default_factory=dict)
    """Options with which parameters are large enough to show their distribution."""
    num_stages: int = 1
    """Number of stages of a training."""
    num_parameters: tuple[tuple[Mapping[str, Any], int], ...] = ()
    """Options → number of trained parameters on ViT-B/16, with two tasks of the same five classes."""
    modifies_text_encoder: bool = True
    """Whether text features differ from the frozen CLIP's."""
    text: Callable[[str, Any], str] = lambda template, config: template
    """(template, config) → template of the text beside its prompts."""
    random_start: bool = True
    """Whether initial values depend on the seed."""
    trains_weight: Callable[[str], bool] | None = None
    """For methods with their own towers: whether the weight of this name is trained."""
    needs_small_learning_rate: bool = False
    """Whether it needs a hundredth of the usual learning rate."""


def full_ids(template: str) -> torch.Tensor:
    """Tokenize the texts of all classes."""
    return tokenizer()([template.format(word) for word in CLASS_NAMES])


def encode_embedded_text(model: torch.nn.Module, ids: torch.Tensor, embedded: list[torch.Tensor]) -> torch.Tensor:
    """Encode the texts (C, 77) with these embeddings (77, d_l) of each text's tokens instead of CLIP's."""
    model, z = replace_weights(model, {}), []
    for row, tokens in zip(ids, embedded, strict=True):
        model.token_embedding.forward = lambda ids, tokens=tokens: tokens[None]
        z.append(reference_encode_text(model, row[None], None))
    return torch.cat(z)


# Methods with their own towers


def replace_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return a copy of open_clip's model with these tensors instead of its parameters."""
    model = copy.deepcopy(model)
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        del module._parameters[leaf]
        setattr(module, leaf, tensor)
    return model


def trained_weights(method: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters of its towers, by open_clip's names."""
    return {open_clips_name(name.removeprefix("towers.")): value for name, value in method.named_parameters()}


def open_clips_name(name: str) -> str:
    """Map the name of a weight of ClipTowers to open_clip's."""
    return name.removeprefix("text.")


def features_of_trained_weights(trains_weight: Callable[[str], bool]) -> Callable[..., Any]:
    """Return `features` of a method that trains exactly the weights of open_clip's model with these names."""

    def features(method, model, images, config):
        trained = trained_weights(method)
        assert set(trained) == {name for name in model.state_dict() if trains_weight(name)}
        model = replace_weights(model, trained)
        return model.encode_image(images), model.encode_text(full_ids(config.clip.template))

    return features


def starts_as_clip(towers, model) -> dict[str, StartCheck]:
    return {f"towers.{name}": equals(value) for name, value in towers.state_dict().items()}


# Checks of a parameter's initial values


def is_all(value: float) -> StartCheck:
    return lambda start: torch.equal(start, torch.full_like(start, value))


def equals(expected: torch.Tensor) -> StartCheck:
    return lambda start: torch.allclose(start, expected.to(start.dtype), rtol=1e-6, atol=1e-9)


def is_normal(std: float) -> StartCheck:
    def check(start):
        assert start.numel() >= 500  # for a standard deviation within 10 %
        return abs(start.mean()) < 4 * std / start.numel() ** 0.5 and abs(start.std() / std - 1) < 0.1

    return check


def is_uniform(bound: float) -> StartCheck:
    """Check for uniform values within ±bound, as torch initializes linear layers with bound = 1 / √inputs."""

    def check(start):
        if not 0 < start.abs().max() <= bound:
            return False
        return start.numel() < 100 or abs(start.std() / (bound / 3**0.5) - 1) < 0.15

    return check


FROM_TEXT, FROM_VISION = is_uniform(16**-0.5), is_uniform(24**-0.5)
"""Linear layers on the small towers' widths."""
SKETCHED = "an old sketch of the {}, in ink."
"""Template for tests of initial values."""


# Texts


def name_only(template: str, config: Any) -> str:
    """CoOp's text: its context replaces all words."""
    return "{}."


def replace_first_words(template: str, num_prompts: int) -> str:
    """MaPLe's text after the start token and the prompts, for words of one token: with two prompts, `of a {}.` is left
    of "a photo of a {}."."""
    before, name, after = template.partition("{}")
    return " ".join([*before.split()[num_prompts:], name + after])
