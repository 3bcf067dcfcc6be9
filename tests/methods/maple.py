import torch
from reference_method import FROM_TEXT, Option, Reference, full_ids, is_normal, replace_first_words
from reference_towers import reference_encode_image, reference_encode_text


def text(template, config):
    return replace_first_words(template, config.maple.prompt_length)


def features(method, model, images, config):
    ids = full_ids(text(config.clip.template, config))  # SOS [v1] [v2] of a {}.
    vision = torch.stack([p @ f.weight.T + f.bias for f, p in zip(method.projections, method.text_prompts)])
    return (
        reference_encode_image(model, images, vision, propagate=True),
        reference_encode_text(model, ids, method.text_prompts, propagate=True),
    )


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {
        "text_prompts": is_normal(0.02),  # more than the template's words
        "projections.*": FROM_TEXT,
    },
    options={
        "prompt_length": Option(5, {"text_prompts": (2, 5, 16)}),
        "depth": Option(3, {"text_prompts": (3, 2, 16)}),
    },
    small={"prompt_length": 2, "depth": 2},
    start_options={"prompt_length": 40, "depth": 2},
    num_parameters=(({}, 3_555_072), ({"depth": 12, "prompt_length": 12}, 4_801_536)),
    text=text,
)
