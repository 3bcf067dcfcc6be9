"""The output of a method's forward pass: prompts, modified image features or classes, its own towers, and losses that
regularize it towards the frozen CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.clip.class_tokens import ClassTokens
from pipeline.lazy_torch import F, torch

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers


@dataclass(frozen=True)
class Consistency:
    """Losses between a method's and the frozen CLIP's features and logits. Their means over a task's images and classes
    are added to its loss.

    Features have unit length; `logits` are the task's (B, C).
    """

    image_loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(features (B, E), frozen features, logits, frozen logits) → (B,)."""
    text_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(features (C, E), frozen features) → (C,)."""
    parameter_loss: torch.Tensor | None = None
    """Added once for all tasks."""


@dataclass(frozen=True)
class Adaptation:
    """Adaptation of the towers for T tasks, built in every step and once per evaluation. All None: frozen CLIP."""

    text_prompts: torch.Tensor | None = None
    """(T, K', b, d_l)."""
    vision_prompts: torch.Tensor | None = None
    """(T, K', b, d_v)."""
    text_prompts_propagate: bool = False
    """Whether the prompts are input tokens that go on through the layers, not replaced in each (see ClipTowers)."""
    vision_prompts_propagate: bool = False
    """The same for the image tower."""
    class_prompts: Callable[[ClassTokens], torch.Tensor] | None = None
    """Class tokens → prompts (R, b, d_l) of each text, which replace the propagated text prompts before a layer."""
    class_prompt_layer: int = 0
    """Index of that layer."""
    word_embeddings: Callable[[ClassTokens], torch.Tensor] | None = None
    """Class tokens → embeddings (R, S, d_l) of their suffix, instead of CLIP's."""
    text_features: Callable[[ClassTokens], torch.Tensor] | None = None
    """Class tokens → features (R, E) of their texts, instead of the text tower's."""
    image_features: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Image features (B, E) → (B, E), the same for all tasks."""
    towers: ClipTowers | None = None
    """Used instead of the frozen towers."""
    task_towers: Sequence[ClipTowers] = ()
    """T towers, each used for one task instead of the frozen ones."""
    consistency: Consistency | None = None
    task_logits: tuple[Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], ...] | None = None
    """For each task: (unit-length image features (B, E), unit-length class features (C, E), CLIP's logits (B, C)) →
    (B, C) instead of CLIP's logits."""

    @property
    def modifies_image_encoder(self) -> bool:
        """True if the image tower's features differ from the frozen CLIP's."""
        return self.vision_prompts is not None or self.towers is not None or bool(self.task_towers)

    @property
    def modifies_text_encoder(self) -> bool:
        """True if the classes' features differ from the frozen CLIP's."""
        changes = (self.text_prompts, self.word_embeddings, self.text_features, self.towers)
        return any(change is not None for change in changes) or bool(self.task_towers)

    def encode_image(self, towers: ClipTowers, images: torch.Tensor, images_per_task: Sequence[int]) -> torch.Tensor:
        """Return features (B, E) of standardized images (B, 3, H, W), task by task."""
        return self.adapt_image_features(self.tower_features(towers, images, images_per_task))

    def tower_features(self, towers: ClipTowers, images: torch.Tensor, images_per_task: Sequence[int]) -> torch.Tensor:
        """Return the image tower's features (B, E), before `adapt_image_features`."""
        if self.task_towers:
            return torch.cat(
                [
                    self.for_task(index).tower_features(towers, task_images, [len(task_images)])
                    for index, task_images in enumerate(images.split(list(images_per_task)))
                    if len(task_images)
                ]
            )
        return (self.towers or towers).encode_image(
            images, self.vision_prompts, images_per_task, self.vision_prompts_propagate
        )

    def shares_image_features_with(self, adaptation: Adaptation) -> bool:
        """Return True if the image tower gives the same features with both adaptations."""
        if self.towers is not adaptation.towers or self.vision_prompts_propagate != adaptation.vision_prompts_propagate:
            return False
        a, b = self.vision_prompts, adaptation.vision_prompts
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    def adapt_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """Map the image tower's features (B, E) to those compared with the classes (B, E)."""
        return self.image_features(image_features) if self.image_features else image_features

    def encode_text(self, towers: ClipTowers, tokens: ClassTokens) -> torch.Tensor:
        """Return features (R, E) of all tasks' class texts, task by task."""
        if self.task_towers:
            return torch.cat(
                [
                    self.for_task(index).encode_text(towers, tokens.select_task(index))
                    for index, num_rows in enumerate(tokens.rows_per_task)
                    if num_rows
                ]
            )
        if self.text_features:
            return self.text_features(tokens)
        embeddings = self.word_embeddings(tokens) if self.word_embeddings else None
        class_prompts = (self.class_prompt_layer, self.class_prompts(tokens)) if self.class_prompts else None
        return (self.towers or towers).encode_text(
            tokens, self.text_prompts, self.text_prompts_propagate, embeddings, class_prompts
        )

    def logits(
        self, towers: ClipTowers, image_features: torch.Tensor, text_features: torch.Tensor, task: int = 0
    ) -> torch.Tensor:
        """Return logits (B, C) of features (B, E) and (C, E) for the task of this index."""
        logits = (self.towers or towers).logits(image_features, text_features)
        if self.task_logits is None:
            return logits
        x, z = (F.normalize(features.to(logits.dtype), dim=-1) for features in (image_features, text_features))
        return self.task_logits[task](x, z, logits)

    def for_task(self, index: int) -> Adaptation:
        """Return the adaptation for images of a single task."""
        text, vision = (p if p is None else p[index : index + 1] for p in (self.text_prompts, self.vision_prompts))
        task_towers = self.task_towers[index] if self.task_towers else self.towers
        task_logits = self.task_logits and self.task_logits[index : index + 1]
        return replace(
            self,
            text_prompts=text,
            vision_prompts=vision,
            towers=task_towers,
            task_towers=(),
            task_logits=task_logits,
        )
