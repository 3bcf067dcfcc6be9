"""Predictions of images of different models and tasks together: one pass of the image tower, in which each image sees
its own task's prompts. What an image is predicted to be does not depend on the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.clip.class_tokens import counts_in_range
from pipeline.clip.precision import autocast
from pipeline.methods.classifier import Classifier
from pipeline.prediction.model import ImagePrediction, TrainedModel


@dataclass(frozen=True)
class PredictRequest:
    """Of B images."""

    model: TrainedModel
    task: str | None
    """None: all tasks of the model, as in `TrainedModel.predict`."""
    pixels: torch.Tensor
    """uint8 (B, 3, S, S), B > 0."""


@dataclass(frozen=True)
class _TowerInput:
    """The images of `asked[at]` as the image tower sees them with one task's prompts."""

    at: int
    task: str
    classifier: Classifier

    def forward_key(self) -> tuple[Any, ...]:
        """Views for which this is the same can run in one pass of the image tower."""
        adaptation = self.classifier.adaptation(self.task)
        prompts = adaptation.vision_prompts
        shape = None if prompts is None else prompts.shape
        towers = adaptation.towers or self.classifier.towers
        return id(towers), shape, adaptation.vision_prompts_propagate, self.classifier.precision

    def prompts_of(self) -> tuple[Classifier, str]:
        return self.classifier, self.task


@torch.inference_mode()
def predict_batch(asked: Sequence[PredictRequest], at_once: int) -> list[list[ImagePrediction]]:
    """The predictions of each, in order.

    Args:
        at_once: images that the tower takes at most.

    Raises:
        UserError: a task that its model does not have.
    """
    passes: dict[tuple[Any, ...], dict[tuple[Classifier, str], list[_TowerInput]]] = {}
    for at, one in enumerate(asked):
        classifier = one.model.classifier
        for task in dict.fromkeys(map(classifier.shared_feature_key, one.model.asked_for(one.task))):
            view = _TowerInput(at, task, classifier)
            passes.setdefault(view.forward_key(), {}).setdefault(view.prompts_of(), []).append(view)
    features: dict[tuple[int, str], torch.Tensor] = {}
    for by_prompts in passes.values():
        views = [view for those in by_prompts.values() for view in those]
        sizes = [len(asked[view.at].pixels) for view in views]
        found = _tower_pass(asked, list(by_prompts.values()), at_once).split(sizes)
        features.update(((view.at, view.task), of_view) for view, of_view in zip(views, found))
    predictions = []
    for at, one in enumerate(asked):
        classifier = one.model.classifier
        logits = {
            task: classifier.logits_from_features(task, features[at, classifier.shared_feature_key(task)])
            for task in one.model.asked_for(one.task)
        }
        predictions.append(list(one.model.predictions(logits, one.task)))
    return predictions


def _tower_pass(
    asked: Sequence[PredictRequest], by_prompts: Sequence[Sequence[_TowerInput]], at_once: int
) -> torch.Tensor:
    """Features (ΣB, E) of the images of all views, in their order."""
    first = by_prompts[0][0]
    adaptation = first.classifier.adaptation(first.task)
    towers = adaptation.towers or first.classifier.towers
    pixels = torch.cat([asked[view.at].pixels for views in by_prompts for view in views])
    counts = [sum(len(asked[view.at].pixels) for view in views) for views in by_prompts]
    of_views = [views[0].classifier.adaptation(views[0].task).vision_prompts for views in by_prompts]
    with_prompts = [prompts for prompts in of_views if prompts is not None]  # all or none
    prompts = torch.cat(with_prompts) if with_prompts else None  # (T, K', b, D)
    features = []
    for start in range(0, len(pixels), at_once):
        stop = min(start + at_once, len(pixels))
        images = towers.normalize_pixels(pixels[start:stop].to(towers.device))
        with autocast(towers.device, first.classifier.precision):
            of_these = counts_in_range(counts, start, stop)
            features.append(towers.encode_image(images, prompts, of_these, adaptation.vision_prompts_propagate))
    return torch.cat(features)
