"""Adapted CLIP as a classifier of several tasks; its text features are computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from pipeline.clip.class_tokens import ClassTokens
from pipeline.clip.precision import autocast
from pipeline.clip.towers import ClipTowers
from pipeline.methods.adaptation import Adaptation


class Classifier:
    """
    Args:
        groups: for each group its tasks, their class tokens, and the adaptation, with the tasks in the same order;
            `Adaptation()` is zero-shot CLIP.
        logit_biases: task → what is added to its logits, of multi-label tasks.
    """

    @torch.inference_mode()
    def __init__(
        self,
        towers: ClipTowers,
        groups: Sequence[tuple[Iterable[str], ClassTokens, Adaptation]],
        precision: str = "auto",
        logit_biases: Mapping[str, float] = {},
    ):
        self.towers, self.precision, self.logit_biases = towers, precision, logit_biases
        self._head_by_task: dict[str, tuple[Adaptation, torch.Tensor]] = {}
        self._shared_feature_keys: dict[str, str] = {}
        """Task → the first task with the same image features."""
        for tasks, tokens, adaptation in groups:
            with autocast(towers, precision, inference=True):
                z = adaptation.encode_text(towers, tokens.to(towers.device))
            for index, (task, class_features) in enumerate(zip(tasks, tokens.pool_names_to_classes(z))):
                self._head_by_task[task] = (task_adaptation := adaptation.for_task(index), class_features)
                self._shared_feature_keys[task] = next(
                    (
                        key
                        for prior, key in self._shared_feature_keys.items()
                        if prior == key and task_adaptation.shares_image_features_with(self._head_by_task[key][0])
                    ),
                    task,
                )

    def probabilities(self, task: str, pixels: torch.Tensor) -> torch.Tensor:
        """Return class probabilities (B, C) of uint8 images (B, 3, S, S)."""
        return self.to_probabilities(task, self.logits([task], pixels)[task])

    def to_probabilities(self, task: str, logits: torch.Tensor) -> torch.Tensor:
        """Return the class probabilities (B, C) of logits: of a multi-label task each class's own."""
        return logits.sigmoid() if task in self.logit_biases else logits.softmax(dim=1)

    @torch.inference_mode()
    def logits(self, tasks: Sequence[str], pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return task → logits (B, C) of uint8 images (B, 3, S, S). The image tower runs once for tasks whose image
        features are equal."""
        pixels = pixels.to(self.towers.device, non_blocking=pixels.is_pinned())
        images = self.towers.normalize_pixels(pixels)
        features: dict[str, torch.Tensor] = {}
        logits = {}
        for task in tasks:
            key = self.shared_feature_key(task)
            if key not in features:
                with autocast(self.towers, self.precision, inference=True):
                    features[key] = self.adaptation(task).tower_features(self.towers, images, [len(images)])
            logits[task] = self.logits_from_features(task, features[key])
        return logits

    def adaptation(self, task: str) -> Adaptation:
        """Return the adaptation of this task."""
        return self._head_by_task[task][0]

    def text_features(self, task: str) -> torch.Tensor:
        """Return the features (C, E) of this task's classes."""
        return self._head_by_task[task][1]

    def shared_feature_key(self, task: str) -> str:
        """Return the first task with the same image features as this one."""
        return self._shared_feature_keys[task]

    @torch.inference_mode()
    def logits_from_features(self, task: str, features: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) of the image tower's features (B, E) for this task."""
        adaptation, text_features = self._head_by_task[task]
        with autocast(self.towers, self.precision, inference=True):
            x = adaptation.adapt_image_features(features)
        logits = adaptation.logits(self.towers, x, text_features)
        return logits + self.logit_biases[task] if task in self.logit_biases else logits

    @torch.inference_mode()
    def logits_from_frozen_features(self, task: str, features: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) of the frozen image tower's features (B, E), if the method does not modify it."""
        assert not self.adaptation(task).modifies_image_encoder
        return self.logits_from_features(task, features.to(self.towers.device))
