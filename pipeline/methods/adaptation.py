"""What a method adds to the frozen towers, made by its forward pass: prompts, a change of the image features, or
towers of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.clip.class_tokens import ClassTokens
from pipeline.clip.towers import ClipTowers


@dataclass(frozen=True)
class Adaptation:
    """Of T tasks; made anew in every training step, once for an evaluation. All fields None: CLIP as it is."""

    text_prompts: torch.Tensor | None = None
    """(T, K', b, d_l)."""
    vision_prompts: torch.Tensor | None = None
    """(T, K', b, d_v)."""
    carried: bool = False
    """Whether prompts are tokens of the input that go on through the layers, not replaced at each (see ClipTowers)."""
    image_features: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Image features (B, E) → (B, E), the same for all tasks."""
    towers: ClipTowers | None = None
    """In place of the frozen ones."""

    def encode_image(self, towers: ClipTowers, images: torch.Tensor, images_per_task: Sequence[int]) -> torch.Tensor:
        """Features (B, E) of images (B, 3, H, W), standardised, task by task."""
        carried = self.carried and self.vision_prompts is not None
        x = (self.towers or towers).encode_image(images, self.vision_prompts, images_per_task, carried)
        return self.image_features(x) if self.image_features else x

    def encode_text(self, towers: ClipTowers, tokens: ClassTokens) -> torch.Tensor:
        """Features (R, E) of all tasks' classes, task by task."""
        carried = self.carried and self.text_prompts is not None
        return (self.towers or towers).encode_text(tokens, self.text_prompts, carried)

    def logits(self, towers: ClipTowers, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """(B, C) of features (B, E), (C, E)."""
        return (self.towers or towers).logits(image_features, text_features)

    def of_task(self, at: int) -> Adaptation:
        """For images and classes of the task at position `at` alone."""
        text, vision = (p if p is None else p[at : at + 1] for p in (self.text_prompts, self.vision_prompts))
        return replace(self, text_prompts=text, vision_prompts=vision)
