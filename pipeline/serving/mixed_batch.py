"""Predictions for images of several models and tasks in one forward pass of the image tower, in which each image gets
the prompts of its own task. The prediction of an image does not depend on the others in its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.clip.class_tokens import counts_in_range
from pipeline.clip.precision import autocast
from pipeline.methods.classifier import Classifier
from pipeline.prediction.image_prediction import ImagePrediction
from pipeline.prediction.model import TrainedModel


@dataclass(frozen=True)
class PredictRequest:
    """Images for one model and task."""

    model: TrainedModel
    task: str | None
    """None: all tasks of the model, as in `TrainedModel.predict`."""
    pixels: torch.Tensor
    """uint8 (B, 3, S, S), B > 0."""


@dataclass(frozen=True)
class _TowerInput:
    """The images of a request with the image prompts of one task."""

    request_index: int
    task: str
    classifier: Classifier

    def forward_key(self) -> tuple[Any, ...]:
        """Inputs with equal keys can share a forward pass of the image tower."""
        adaptation = self.classifier.adaptation(self.task)
        prompts = adaptation.vision_prompts
        shape = None if prompts is None else prompts.shape
        towers = adaptation.towers or self.classifier.towers
        return id(towers), shape, adaptation.vision_prompts_propagate, self.classifier.precision

    def prompt_key(self) -> tuple[Classifier, str]:
        """Inputs with equal keys have the same prompts."""
        return self.classifier, self.task


@torch.inference_mode()
def predict_batch(requests: Sequence[PredictRequest], max_batch: int) -> list[list[ImagePrediction]]:
    """Return the predictions for each request, in order.

    Args:
        max_batch: maximum batch size of the image tower.

    Raises:
        UserError: unknown task.
    """
    passes: dict[tuple[Any, ...], dict[tuple[Classifier, str], list[_TowerInput]]] = {}
    for index, request in enumerate(requests):
        classifier = request.model.classifier
        for task in dict.fromkeys(map(classifier.shared_feature_key, request.model.resolve_tasks(request.task))):
            tower_input = _TowerInput(index, task, classifier)
            inputs_by_prompt = passes.setdefault(tower_input.forward_key(), {})
            inputs_by_prompt.setdefault(tower_input.prompt_key(), []).append(tower_input)
    features: dict[tuple[int, str], torch.Tensor] = {}
    for inputs_by_prompt in passes.values():
        pass_features = _encode_images(requests, list(inputs_by_prompt.values()), max_batch)
        tower_inputs = [tower_input for group in inputs_by_prompt.values() for tower_input in group]
        sizes = [len(requests[tower_input.request_index].pixels) for tower_input in tower_inputs]
        for tower_input, input_features in zip(tower_inputs, pass_features.split(sizes)):
            features[tower_input.request_index, tower_input.task] = input_features
    predictions = []
    for index, request in enumerate(requests):
        classifier = request.model.classifier
        logits = {
            task: classifier.logits_from_features(task, features[index, classifier.shared_feature_key(task)])
            for task in request.model.resolve_tasks(request.task)
        }
        predictions.append(list(request.model.predictions_from_logits(logits, request.task)))
    return predictions


def _encode_images(
    requests: Sequence[PredictRequest], prompt_groups: Sequence[Sequence[_TowerInput]], max_batch: int
) -> torch.Tensor:
    """Return the features (ΣB, E) of the images of all inputs, which share a `forward_key`, in order."""
    classifier = prompt_groups[0][0].classifier
    adaptations = [inputs[0].classifier.adaptation(inputs[0].task) for inputs in prompt_groups]
    towers = adaptations[0].towers or classifier.towers
    propagate = adaptations[0].vision_prompts_propagate
    pixels = torch.cat([requests[item.request_index].pixels for inputs in prompt_groups for item in inputs])
    counts = [sum(len(requests[item.request_index].pixels) for item in inputs) for inputs in prompt_groups]
    vision_prompts = [a.vision_prompts for a in adaptations if a.vision_prompts is not None]  # all or none
    prompts = torch.cat(vision_prompts) if vision_prompts else None  # (T, K', b, D)
    features = []
    for start in range(0, len(pixels), max_batch):
        stop = min(start + max_batch, len(pixels))
        images = towers.normalize_pixels(pixels[start:stop].to(towers.device))
        with autocast(towers, classifier.precision, inference=True):
            chunk_counts = counts_in_range(counts, start, stop)
            features.append(towers.encode_image(images, prompts, chunk_counts, propagate))
    return torch.cat(features)
