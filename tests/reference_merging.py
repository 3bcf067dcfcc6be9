"""Merging of task vectors by plain loops, value by value, for comparison in tests."""

from __future__ import annotations

from reference_method import full_ids, open_clips_name, replace_weights


def add(vectors, config):
    """Task arithmetic."""
    return {key: config.task_arithmetic.scaling * sum(vector[key] for vector in vectors) for key in vectors[0]}


def ties(vectors, config):
    trimmed = []
    for vector in vectors:
        by_magnitude = sorted(vector, key=lambda key: -abs(vector[key]))
        kept = set(by_magnitude[: int(config.ties.density * len(vector))])
        trimmed.append({key: value if key in kept else 0.0 for key, value in vector.items()})
    merged = {}
    for key in vectors[0]:
        values = [vector[key] for vector in trimmed]
        positive, negative = [v for v in values if v > 0], [v for v in values if v < 0]
        elected = positive if sum(positive) > -sum(negative) else negative
        merged[key] = config.ties.scaling * sum(elected) / len(elected) if elected else 0.0
    return merged


def mix(vectors, config):
    """WiSE-FT."""
    (vector,) = vectors
    return {key: config.wise_ft.alpha * value for key, value in vector.items()}


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
        merged = rule([lora_vector(state, config) for state in method.sources], config)
        weights = {name: value.clone() for name, value in model.state_dict().items() if "in_proj_weight" in name}
        for (layer, part, row, column), value in merged.items():
            matrices = weights[f"{layer}.in_proj_weight"]
            matrices[part * matrices.shape[1] + row, column] += value
        model = replace_weights(model, weights)
        return model.encode_image(images), model.encode_text(full_ids(config.clip.template))

    return features


MATRICES_OF_VIT_B_16 = 12 * 3 * (512**2 + 768**2)
