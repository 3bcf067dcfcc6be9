"""LoRA of a task group: on every matrix the group's update and the task's."""

import torch
from reference_method import Option, Reference, full_ids, is_all, is_uniform, replace_weights


def features(method, model, images, config, index=0):
    """Compute the features of one task."""
    alpha, rank, weights = config.clip_lora.alpha, config.clip_lora.rank, model.state_dict()
    vision = [f"visual.transformer.resblocks.{i}.attn" for i in range(len(model.visual.transformer.resblocks))]
    text = [f"transformer.resblocks.{i}.attn" for i in range(len(model.transformer.resblocks))]
    updated = {}
    for layer, block in enumerate([*vision, *text]):
        group, task = method.group[layer], method.task[layer]
        matrices = []
        for part, matrix in enumerate(weights[f"{block}.in_proj_weight"].chunk(3)):
            rows = slice(part * rank, (part + 1) * rank)
            products = group.up[part] @ group.down.weight[rows] + task.up[index, part] @ task.down[index, rows]
            matrices.append(matrix + alpha / rank**0.5 * products)
        updated[f"{block}.in_proj_weight"] = torch.cat(matrices)
    model = replace_weights(model, updated)
    return model.encode_image(images), model.encode_text(full_ids(config.clip.template))


def starts(towers, model):
    def is_linear(start):
        return is_uniform(start.shape[-1] ** -0.5)(start)

    return {"*.up": is_all(0), "*.down*": is_linear}


REFERENCE = Reference(
    features=features,
    starts=starts,
    options={
        "rank": Option(3, {"group.0.up": (3, 24, 3), "task.8.down": (1, 9, 16)}),
        "alpha": Option(2.5),
    },
    num_parameters=(({}, 3 * 184_320),),
)
