import math

import torch
import torch.nn.functional as F
from reference_method import Option, Reference, full_ids

from methods.tip_adapter import is_empty


def features(method, model, images, config):
    return model.encode_image(images), model.encode_text(full_ids(config.clip.template))


def kernel(x, y, beta):
    return math.exp(-beta * (1 - (x @ y).item()))


def fit(options, training, temperature):
    images = [(task, F.normalize(views.mean(0), dim=0), name) for task, views, name in training.images()]
    views = training.features[0].shape[1]
    columns = []
    for candidate in training.names:
        # Every view is a point, with the features of its image's mean view.
        rows = [
            (index, x, float(name == candidate) - (x @ F.normalize(training.text_features[task][label], dim=0)).item())
            for index, (task, x, name) in enumerate(images)
            if candidate in training.class_names[task]
            for label in [training.class_names[task].index(candidate)]
            for _ in range(views)
        ]
        gram = [[kernel(x, y, options.beta) for _, y, _ in rows] for _, x, _ in rows]
        system = torch.tensor(gram, dtype=torch.float64) / options.regularization + torch.eye(len(rows))
        solution = torch.linalg.inv(system) @ torch.tensor([residual for *_, residual in rows], dtype=torch.float64)
        column = [0.0] * len(images)
        for (index, *_), value in zip(rows, solution):
            column[index] += value.item() / temperature
        columns.append(column)
    return {
        "points": torch.stack([x for _, x, _ in images]),
        "coefficients": torch.tensor(columns, dtype=torch.float64).T,
    }


def logits(method, x, z, clip_logits, config):
    added = [
        sum(kernel(image, point, config.proker.beta) * row for point, row in zip(method.points, method.coefficients))
        for image in x
    ]
    return clip_logits + torch.stack(added)


REFERENCE = Reference(
    features=features,
    fit=fit,
    logits=logits,
    starts=lambda towers, model: {"points": is_empty, "coefficients": lambda start: start.shape == (0, 5)},
    options={"views": Option(3), "beta": Option(0.5), "regularization": Option(0.25)},
    small={"views": 2},
    modifies_text_encoder=False,
    random_start=False,
)
