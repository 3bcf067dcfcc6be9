import torch
import torch.nn.functional as F
from reference_method import Option, Reference, full_ids


def features(method, model, images, config):
    return model.encode_image(images), model.encode_text(full_ids(config.clip.template))


def fit(options, training, temperature):
    keys = [F.normalize(sum(views) / len(views), dim=0) for _, views, _ in training.images()]
    values = [[name == label for name in training.names] for _, _, label in training.images()]
    return {"keys": torch.stack(keys), "values": torch.tensor(values)}


def cache_logits(method, x, z, clip_logits, options):
    rows = []
    for image, row in zip(x, clip_logits):
        scores = list(row)
        for key, value in zip(method.keys, method.values):
            label = value.tolist().index(True)
            similarity = torch.exp(-options.beta * (1 - image @ key))
            scores[label] = scores[label] + options.alpha * similarity
        rows.append(torch.stack(scores))
    return torch.stack(rows)


def is_empty(start):
    return start.shape == (0, 12)


REFERENCE = Reference(
    features=features,
    fit=fit,
    logits=lambda method, x, z, clip_logits, config: cache_logits(method, x, z, clip_logits, config.tip_adapter),
    starts=lambda towers, model: {"keys": is_empty},
    options={"views": Option(3), "alpha": Option(2.5), "beta": Option(0.75)},
    small={"views": 2},
    modifies_text_encoder=False,
    random_start=False,
)
