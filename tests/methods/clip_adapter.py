from reference_method import Option, Reference, full_ids, is_uniform


def features(method, model, images, config):
    x = model.encode_image(images)
    reduce, _, expand, _ = method.bottleneck
    adapted = (expand.weight @ (reduce.weight @ x.T + reduce.bias[:, None]).clamp(min=0) + expand.bias[:, None]).T
    ratio = config.clip_adapter.ratio
    return ratio * adapted.clamp(min=0) + (1 - ratio) * x, model.encode_text(full_ids(config.clip.template))


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {
        "bottleneck.0.*": is_uniform(12**-0.5),
        "bottleneck.2.*": is_uniform(3**-0.5),
    },
    options={"reduction": Option(3, {"bottleneck.0.weight": (4, 12)}), "ratio": Option(0.35)},
    num_parameters=(({}, 131_712),),
    modifies_text_encoder=False,
)
