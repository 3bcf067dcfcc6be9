"""What a method adds to the frozen towers, made by its forward pass: prompts, a change of the image features or of the
classes, towers of its own, and what holds it to the frozen CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.clip.class_tokens import ClassTokens
from pipeline.lazy_torch import torch

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers


@dataclass(frozen=True)
class Consistency:
    """Losses between what a method makes and what the frozen CLIP makes of the same images and classes: to a task's
    loss, a step adds their means over its images and over its classes.

    Features are of unit length; `logits` are the task's (B, C).
    """

    image_loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(features (B, E), frozen features, logits, frozen logits) → (B,)."""
    text_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(features (C, E), frozen features) → (C,)."""
    parameter_loss: torch.Tensor | None = None
    """Once for all tasks."""


@dataclass(frozen=True)
class Adaptation:
    """Of T tasks; made anew in every training step, once for an evaluation. All fields None: CLIP as it is."""

    text_prompts: torch.Tensor | None = None
    """(T, K', b, d_l)."""
    vision_prompts: torch.Tensor | None = None
    """(T, K', b, d_v)."""
    text_prompts_propagate: bool = False
    """Whether prompts are tokens of the input that go on through the layers, not replaced at each (see ClipTowers)."""
    vision_prompts_propagate: bool = False
    """Likewise in the image tower."""
    word_embeddings: Callable[[ClassTokens], torch.Tensor] | None = None
    """Class tokens → embeddings (R, S, d_l) of their suffix, in place of CLIP's own."""
    text_features: Callable[[ClassTokens], torch.Tensor] | None = None
    """Class tokens → features (R, E) of their texts, in place of the text tower's."""
    image_features: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Image features (B, E) → (B, E), the same for all tasks."""
    towers: ClipTowers | None = None
    """In place of the frozen ones."""
    consistency: Consistency | None = None

    @property
    def modifies_image_encoder(self) -> bool:
        """Whether the image tower gives other features than the frozen CLIP's."""
        return self.vision_prompts is not None or self.towers is not None

    @property
    def modifies_text_encoder(self) -> bool:
        """Whether the classes have other features than the frozen CLIP's."""
        changed = (self.text_prompts, self.word_embeddings, self.text_features, self.towers)
        return any(change is not None for change in changed)

    def encode_image(self, towers: ClipTowers, images: torch.Tensor, images_per_task: Sequence[int]) -> torch.Tensor:
        """Features (B, E) of images (B, 3, H, W), standardized, task by task."""
        return self.adapt_image_features(self.tower_features(towers, images, images_per_task))

    def tower_features(self, towers: ClipTowers, images: torch.Tensor, images_per_task: Sequence[int]) -> torch.Tensor:
        """Likewise, before `adapt`."""
        return (self.towers or towers).encode_image(
            images, self.vision_prompts, images_per_task, self.vision_prompts_propagate
        )

    def shares_image_features_with(self, other: Adaptation) -> bool:
        """Whether the image tower gives the same features with both."""
        if self.towers is not other.towers or self.vision_prompts_propagate != other.vision_prompts_propagate:
            return False
        own, others = self.vision_prompts, other.vision_prompts
        return own is others or (own is not None and others is not None and torch.equal(own, others))

    def adapt_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """(B, E) of the image tower → (B, E) that are compared with the classes."""
        return self.image_features(image_features) if self.image_features else image_features

    def encode_text(self, towers: ClipTowers, tokens: ClassTokens) -> torch.Tensor:
        """Features (R, E) of all texts of all tasks' classes, task by task."""
        if self.text_features:
            return self.text_features(tokens)
        embeddings = self.word_embeddings(tokens) if self.word_embeddings else None
        return (self.towers or towers).encode_text(tokens, self.text_prompts, self.text_prompts_propagate, embeddings)

    def logits(self, towers: ClipTowers, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """(B, C) of features (B, E), (C, E)."""
        return (self.towers or towers).logits(image_features, text_features)

    def for_task(self, at: int) -> Adaptation:
        """For images of the task at position `at` alone."""
        text, vision = (p if p is None else p[at : at + 1] for p in (self.text_prompts, self.vision_prompts))
        return replace(self, text_prompts=text, vision_prompts=vision)
