import torch
from reference_method import FROM_TEXT, Option, Reference, full_ids, is_normal
from reference_towers import reference_encode_image, reference_encode_text


def features(method, model, images, config):
    text, vision = (
        torch.stack([p @ f.weight.T + f.bias for f, p in zip(layers, method.source)])
        for layers in (method.text_layers, method.vision_layers)
    )
    return (
        reference_encode_image(model, images, vision),
        reference_encode_text(model, full_ids(config.clip.template), text),
    )


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {"source": is_normal(0.02), "*_layers.*": FROM_TEXT},
    options={"prompt_length": Option(5, {"source": (4, 5, 4)}), "source_width": Option(6, {"source": (4, 2, 6)})},
    small={"prompt_length": 2, "source_width": 4},
    start_options={"prompt_length": 20, "source_width": 16},  # as wide as the text tower
    num_parameters=(({}, 3_959_808),),
)
