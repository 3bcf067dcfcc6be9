"""Merging of T task vectors, as rows (T, n) of all their values, for comparison in tests."""

from __future__ import annotations

import numpy as np
import torch
from reference_method import full_ids, open_clips_name, replace_weights


def add(vectors, config):
    """Task arithmetic."""
    return config.task_arithmetic.scaling * vectors.sum(axis=0)


def ties(vectors, config):
    trimmed = np.zeros_like(vectors)
    for row, vector in zip(trimmed, vectors):
        largest = np.argsort(-abs(vector))[: int(config.ties.density * len(vector))]
        row[largest] = vector[largest]
    positive, negative = np.maximum(trimmed, 0), np.minimum(trimmed, 0)
    total = positive.sum(axis=0) + negative.sum(axis=0)
    elected = np.where(total > 0, positive, np.where(total < 0, negative, 0))
    return config.ties.scaling * elected.sum(axis=0) / np.maximum((elected != 0).sum(axis=0), 1)


def mix(vectors, config):
    """WiSE-FT."""
    (vector,) = vectors
    return config.wise_ft.alpha * vector


def lora_vector(state, config):
    """Return (layer, query/key/value, row, column) → what the products of the factors add to CLIP's matrices."""
    alpha, rank, vector = config.clip_lora.alpha, config.clip_lora.rank, {}
    for name, up in state.items():
        if name.endswith(".in_proj_update.up"):
            layer = open_clips_name(name.removeprefix("towers.").removesuffix(".in_proj_update.up"))
            down = state[name.replace(".up", ".down.weight")].tolist()
            for part, matrix in enumerate(up.tolist()):
                for row, factors in enumerate(matrix):
                    for column in range(len(matrix)):
                        terms = (b * down[rank * part + r][column] for r, b in enumerate(factors))
                        vector[layer, part, row, column] = alpha / rank**0.5 * sum(terms)
    return vector


def features_of_merged_lora(rule):
    """Return `features` of a method that merges CLIP-LoRA's updates by this rule."""

    def features(method, model, images, config):
        vectors = [lora_vector(state, config) for state in method.sources]
        merged = rule(np.array([list(vector.values()) for vector in vectors]), config)
        weights = {name: value.clone() for name, value in model.state_dict().items() if "in_proj_weight" in name}
        for (layer, part, row, column), value in zip(vectors[0], merged, strict=True):
            matrices = weights[f"{layer}.in_proj_weight"]
            matrices[part * matrices.shape[1] + row, column] += value
        model = replace_weights(model, weights)
        return model.encode_image(images), model.encode_text(full_ids(config.clip.template))

    return features


def features_of_merged_weights(rule):
    """Return `features` of a method that merges fully fine-tuned weights by this rule."""

    def features(method, model, images, config):
        frozen, vectors = model.state_dict(), []
        for state in method.sources:
            values = {open_clips_name(name.removeprefix("towers.")): value for name, value in state.items()}
            assert values.keys() == frozen.keys()
            vectors.append(np.concatenate([(values[name] - frozen[name]).flatten().numpy() for name in frozen]))
        merged = torch.from_numpy(rule(np.stack(vectors), config)).split([value.numel() for value in frozen.values()])
        weights = {name: value + part.view_as(value) for (name, value), part in zip(frozen.items(), merged)}
        model = replace_weights(model, weights)
        return model.encode_image(images), model.encode_text(full_ids(config.clip.template))

    return features


MATRICES_OF_VIT_B_16 = 12 * 3 * (512**2 + 768**2)
