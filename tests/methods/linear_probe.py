from reference_method import SKETCHED, Reference, equals, full_ids


def features(method, model, images, config):
    return model.encode_image(images), method.weights


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {"weights": equals(model.encode_text(full_ids(SKETCHED)))},
    random_start=False,
    needs_small_learning_rate=True,
)
