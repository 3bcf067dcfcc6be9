import math

import torch
import torch.nn.functional as F
from reference_method import (
    FROM_TEXT,
    FROM_VISION,
    Option,
    Reference,
    encode_embedded_text,
    full_ids,
    is_all,
    is_normal,
    is_uniform,
)
from reference_towers import reference_encode_image
from small_clip import CLASS_NAMES, tokenizer


def features(method, model, images, config):
    prompts = torch.cat(
        [
            method.context @ method.text_in.weight.T + method.text_in.bias,
            method.vision_prompts.reshape(-1, 24) @ method.vision_in.weight.T + method.vision_in.bias,
        ]
    )
    mixer, length, width = method.mixer, config.mvlpt.prompt_length, config.mvlpt.mixer_width
    h = F.layer_norm(prompts, (width,), mixer.norm1.weight, mixer.norm1.bias)
    q, k, v = (h @ mixer.self_attn.in_proj_weight.T + mixer.self_attn.in_proj_bias).chunk(3, dim=1)
    attended = (q @ k.T / width**0.5).softmax(dim=1) @ v  # one head
    prompts = prompts + attended @ mixer.self_attn.out_proj.weight.T + mixer.self_attn.out_proj.bias
    h = F.layer_norm(prompts, (width,), mixer.norm2.weight, mixer.norm2.bias)
    h = h @ mixer.linear1.weight.T + mixer.linear1.bias
    h = h * (1.702 * h).sigmoid()  # QuickGELU
    prompts = prompts + h @ mixer.linear2.weight.T + mixer.linear2.bias
    context = prompts[:length] @ method.text_out.weight.T + method.text_out.bias
    vision = prompts[length:] @ method.vision_out.weight.T + method.vision_out.bias
    vision = vision.reshape(len(model.visual.transformer.resblocks), length, 24)
    half, ids, embedded = length // 2, full_ids("X " * length + "{}."), []
    for row, name in zip(ids, CLASS_NAMES):  # SOS [c1] [c2] name [c3] [c4] . EOS
        words, end = model.token_embedding(row), 1 + length + len(tokenizer().encode(name))
        embedded.append(torch.cat([words[:1], context[:half], words[1 + length : end], context[half:], words[end:]]))
    return reference_encode_image(model, images, vision), encode_embedded_text(model, ids, embedded)


def starts(towers, model):
    mixer = is_uniform(20**-0.5)
    return {
        "context": is_normal(0.02),
        "vision_prompts": is_uniform((6 / (3 * 8**2 + 24)) ** 0.5),  # Glorot's, of patches of 8 x 8 pixels
        "text_in.*": FROM_TEXT,
        "vision_in.*": FROM_VISION,
        "mixer.norm[12].weight": is_all(1),
        "mixer.norm[12].bias": is_all(0),
        "mixer.self_attn.in_proj_weight": is_uniform((6 / (4 * 20)) ** 0.5),  # Glorot's
        "mixer.self_attn.*bias": is_all(0),
        "mixer.self_attn.out_proj.weight": mixer,
        "mixer.linear1.*": mixer,
        "mixer.linear2.*": is_uniform(80**-0.5),
        "*_out.*": mixer,
    }


REFERENCE = Reference(
    features=features,
    starts=starts,
    options={
        "prompt_length": Option(5, {"context": (5, 16), "vision_prompts": (5, 5, 24)}),
        "mixer_width": Option(6, {"text_in.weight": (6, 16), "vision_out.weight": (24, 6)}),
    },
    small={"prompt_length": 2, "mixer_width": 4},
    start_options={"prompt_length": 40, "mixer_width": 20},
    num_parameters=(({}, 566_400),),
    text=lambda template, config: "{}" + " X" * math.ceil(config.mvlpt.prompt_length / 2) + ".",
)
