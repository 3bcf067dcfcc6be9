import torch
from reference_method import (
    FROM_TEXT,
    FROM_VISION,
    Option,
    Reference,
    full_ids,
    is_all,
    replace_weights,
    trained_weights,
)


def features(method, model, images, config):
    trained, weights = trained_weights(method), model.state_dict()
    blocks = [name.removesuffix(".in_proj_weight") for name in weights if name.endswith("in_proj_weight")]
    assert len(trained) == 2 * len(blocks)
    alpha, rank = config.clip_lora.alpha, config.clip_lora.rank
    low_rank = {
        block: zip(trained[f"{block}.in_proj_update.up"], trained[f"{block}.in_proj_update.down.weight"].split(rank))
        for block in blocks
    }
    updated = {
        f"{block}.in_proj_weight": weights[f"{block}.in_proj_weight"]
        + torch.cat([alpha / rank**0.5 * b @ a for b, a in low_rank[block]])
        for block in blocks
    }
    model = replace_weights(model, updated)
    return model.encode_image(images), model.encode_text(full_ids(config.clip.template))


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {
        "*.up": is_all(0),
        "towers.text.*.down.weight": FROM_TEXT,
        "towers.visual.*.down.weight": FROM_VISION,
    },
    options={
        "rank": Option(3, {"text.transformer.resblocks.0.attn.in_proj_update.up": (3, 16, 3)}),
        "alpha": Option(2.5),
    },
    num_parameters=(({}, 12 * 3 * 2 * 2 * (512 + 768)),),
    trains_weight=lambda name: False,
)
