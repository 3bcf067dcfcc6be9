from reference_method import (
    SKETCHED,
    Option,
    Reference,
    equals,
    full_ids,
    replace_weights,
    starts_as_clip,
    trained_weights,
)

from methods.layernorm import is_layernorm


def features(method, model, images, config):
    weights = trained_weights(method)
    classifier = weights.pop("weights")
    assert set(weights) == {name for name in model.state_dict() if is_layernorm(name)}
    model = replace_weights(model, weights)
    x = model.encode_image(images)
    if method.stage:
        return x.detach(), classifier
    return x, model.encode_text(full_ids(config.clip.template))


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {
        "weights": equals(model.encode_text(full_ids(SKETCHED))),
        **starts_as_clip(towers, model),
    },
    options={"first_stage_fraction": Option(0.25, only_in_training=True)},
    num_stages=2,
    num_parameters=(({}, 65_536 + 5 * 512),),
    random_start=False,
    needs_small_learning_rate=True,
    trains_weight=is_layernorm,
)
