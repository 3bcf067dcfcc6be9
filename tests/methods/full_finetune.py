from reference_method import Reference, features_of_trained_weights, starts_as_clip

REFERENCE = Reference(
    features=features_of_trained_weights(lambda name: True),
    starts=starts_as_clip,
    num_parameters=(({}, 149_620_737),),
    random_start=False,
    trains_weight=lambda name: True,
)
