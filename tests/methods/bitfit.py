from reference_method import Reference, features_of_trained_weights, starts_as_clip


def is_bias(name):
    return name.endswith("bias")


REFERENCE = Reference(
    features=features_of_trained_weights(is_bias),
    starts=starts_as_clip,
    num_parameters=(({}, 171_008),),
    random_start=False,
    trains_weight=is_bias,
)
