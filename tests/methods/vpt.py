from reference_method import Option, Reference, full_ids, is_normal
from reference_towers import reference_encode_image


def features(method, model, images, config):
    return (
        reference_encode_image(model, images, method.prompts, propagate=True),  # the first layer's through ln_pre
        model.encode_text(full_ids(config.clip.template)),
    )


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {"prompts": is_normal(0.02)},
    options={"prompt_length": Option(5, {"prompts": (5, 5, 24)})},
    small={"prompt_length": 2},
    start_options={"prompt_length": 10},
    num_parameters=(({"prompt_length": 18}, 165_888),),
    modifies_text_encoder=False,
)
