"""CLIP with what a method trained, as a classifier of several tasks; its text features are computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.methods.adaptation import Adaptation


class Classifier:
    """
    Args:
        template: text of a class, as the method takes it: in all tasks, or task → text.
        groups: for each group of tasks, task → words of its classes by label, and the group's adaptation, whose tasks
            have the same order; `Adaptation()` is zero-shot CLIP.
    """

    @torch.inference_mode()
    def __init__(
        self,
        towers: ClipTowers,
        template: str | Mapping[str, str],
        groups: Sequence[tuple[Mapping[str, Sequence[str]], Adaptation]],
        precision: str = "auto",
    ):
        self.towers, self.precision = towers, precision
        self._of_task: dict[str, tuple[Adaptation, torch.Tensor]] = {}
        self._image_features_like: dict[str, str] = {}
        """Task → the first task whose images have the same features."""
        for class_names, adaptation in groups:
            templates = template if isinstance(template, str) else [template[task] for task in class_names]
            tokens = class_tokens(towers.tokenizer, templates, list(class_names.values())).to(towers.device)
            with autocast(towers.device, precision):
                z = adaptation.encode_text(towers, tokens)
            for at, (task, for_task) in enumerate(zip(class_names, tokens.pool_names_to_classes(z))):
                self._of_task[task] = (own := adaptation.for_task(at), for_task)
                before = self._image_features_like.items()
                self._image_features_like[task] = next(
                    (
                        first
                        for first, same in before
                        if first == same and own.shares_image_features_with(self._of_task[first][0])
                    ),
                    task,
                )

    def probabilities(self, task: str, pixels: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, C) of uint8 images (B, 3, S, S)."""
        return self.logits([task], pixels)[task].softmax(dim=1)

    @torch.inference_mode()
    def logits(self, tasks: Sequence[str], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Task → logits (B, C) of uint8 images (B, 3, S, S), whose softmax are the class probabilities. The image tower
        runs once for all tasks that have it give the same features."""
        pixels = pixels.to(self.towers.device, non_blocking=pixels.is_pinned())
        images = self.towers.normalize_pixels(pixels)
        features: dict[str, torch.Tensor] = {}
        logits = {}
        for task in tasks:
            like = self.shared_feature_key(task)
            if like not in features:
                with autocast(self.towers.device, self.precision):
                    features[like] = self.adaptation(task).tower_features(self.towers, images, [len(images)])
            logits[task] = self.logits_from_features(task, features[like])
        return logits

    def adaptation(self, task: str) -> Adaptation:
        """Of this task alone."""
        return self._of_task[task][0]

    def shared_feature_key(self, task: str) -> str:
        """The first task for whose images the image tower gives the same features."""
        return self._image_features_like[task]

    @torch.inference_mode()
    def logits_from_features(self, task: str, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, C) of features (B, E) that the image tower gave for this task."""
        adaptation, text_features = self._of_task[task]
        with autocast(self.towers.device, self.precision):
            x = adaptation.adapt_image_features(features)
        return adaptation.logits(self.towers, x, text_features)

    @torch.inference_mode()
    def probabilities_from_frozen_features(self, task: str, features: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, C) of features (B, E) by the frozen image tower, where the method does not change
        it."""
        assert not self.adaptation(task).modifies_image_encoder
        return self.logits_from_features(task, features.to(self.towers.device)).softmax(dim=1)
