import torch
import torch.nn.functional as F
from reference_method import Option, Reference, full_ids, is_normal, is_uniform, replace_first_words


def text(template, config):
    return replace_first_words(template, config.tcp.context_length)


def features(method, model, images, config):
    length, layer = config.tcp.context_length, config.tcp.class_layer
    hidden = F.normalize(model.encode_text(full_ids(config.clip.template)), dim=1)
    hidden = hidden @ method.down.weight.T + method.down.bias
    hidden = hidden * (1.702 * hidden).sigmoid()
    class_prompts = hidden @ method.up.weight.T + method.up.bias
    z = []
    for row, prompts in zip(full_ids(text(config.clip.template, config)), class_prompts, strict=True):
        words = model.token_embedding(row)
        x = torch.cat([words[:1], method.context, words[1 : len(words) - length]])[None] + model.positional_embedding
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        for number, block in enumerate(model.transformer.resblocks, 1):
            if number == layer:
                x = torch.cat([x[:, :1], prompts.reshape(1, length, 16), x[:, 1 + length :]], dim=1)
            x = block(x, attn_mask=mask)
        z.append(model.ln_final(x[0, row.argmax() + length]) @ model.text_projection)
    return model.encode_image(images), torch.stack(z)


def added_loss(method, options, x, frozen_x, z, frozen_z, logits, frozen_logits):
    return options.text_weight * (1 - (z * frozen_z).sum(1).mean())


REFERENCE = Reference(
    features=features,
    added_loss=added_loss,
    starts=lambda towers, model: {
        "context": is_normal(0.02),
        "down.*": is_uniform(12**-0.5),
        "up.*": is_uniform(3**-0.5),
    },
    options={
        "context_length": Option(3, {"context": (3, 16), "up.weight": (3 * 16, 3)}),
        "class_layer": Option(4),
        "reduction": Option(6, {"down.weight": (2, 12), "up.weight": (2 * 16, 2)}),
        "text_weight": Option(2.5),
    },
    small={"context_length": 2, "class_layer": 2},
    start_options={"context_length": 40},
    num_parameters=(({}, 331_904),),
    text=text,
)
