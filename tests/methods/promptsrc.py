from reference_method import Option, Reference, full_ids, is_normal, replace_first_words
from reference_towers import reference_encode_image, reference_encode_text


def text(template, config):
    return replace_first_words(template, config.promptsrc.prompt_length)


def features(method, model, images, config):
    ids = full_ids(text(config.clip.template, config))  # SOS [v1] [v2] [v3] [v4] {}.; with two, SOS [v1] [v2] of a {}.
    return (
        reference_encode_image(model, images, method.vision_prompts, propagate=True),
        reference_encode_text(model, ids, method.text_prompts, propagate=True),
    )


def added_loss(method, options, x, frozen_x, z, frozen_z, logits, frozen_logits):
    p, q = logits, frozen_logits
    return (
        options.text_weight * (z - frozen_z).abs().mean()
        + options.image_weight * (x - frozen_x).abs().mean()
        + options.logits_weight * (q.softmax(1) * (q.log_softmax(1) - p.log_softmax(1))).mean()
    )


REFERENCE = Reference(
    features=features,
    added_loss=added_loss,
    starts=lambda towers, model: {
        "text_prompts": is_normal(0.02),  # more than the template's words
        "vision_prompts": is_normal(0.02),
    },
    options={
        "prompt_length": Option(5, {"text_prompts": (2, 5, 16), "vision_prompts": (2, 5, 24)}),
        "depth": Option(3, {"text_prompts": (3, 2, 16), "vision_prompts": (3, 2, 24)}),
        "image_weight": Option(3.0),
        "text_weight": Option(7.0),
        "logits_weight": Option(2.5),
    },
    small={"prompt_length": 2, "depth": 2},
    start_options={"prompt_length": 40, "depth": 2},
    num_parameters=(({}, 9 * 4 * (512 + 768)),),
    text=text,
)
