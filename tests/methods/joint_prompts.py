from reference_method import Option, Reference, full_ids, is_normal
from reference_towers import reference_encode_image, reference_encode_text


def features(method, model, images, config):
    return (
        reference_encode_image(model, images, method.vision_prompts),
        reference_encode_text(model, full_ids(config.clip.template), method.text_prompts),
    )


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {"text_prompts": is_normal(0.02), "vision_prompts": is_normal(0.02)},
    options={"prompt_length": Option(5, {"text_prompts": (4, 5, 16), "vision_prompts": (5, 5, 24)})},
    small={"prompt_length": 2},
    start_options={"prompt_length": 20},
    num_parameters=(({}, 12 * 8 * (512 + 768)),),
)
