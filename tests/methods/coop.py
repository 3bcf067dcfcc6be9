from reference_method import Option, Reference, full_ids, is_normal, name_only
from reference_towers import reference_encode_text


def features(method, model, images, config):
    z = reference_encode_text(model, full_ids("{}."), method.context[None], propagate=True)
    return model.encode_image(images), z


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {"context": is_normal(0.02)},
    options={"context_length": Option(5, {"context": (5, 16)})},
    small={"context_length": 3},
    start_options={"context_length": 50},
    num_parameters=(({}, 16 * 512),),
    text=name_only,
)
