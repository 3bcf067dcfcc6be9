import torch
import torch.nn.functional as F
from reference_method import Option, Reference, full_ids, is_all

ALPHAS = (0.0001, 0.001, 0.01, 0.1, 1, 10, 100)


def features(method, model, images, config):
    return model.encode_image(images), model.encode_text(full_ids(config.clip.template))


def gaussians(samples, names):
    """samples: (class name, unit feature (E,)) of each view."""
    means = {name: torch.stack([x for label, x in samples if label == name]).mean(0) for name in names}
    centered = [x - means[name] for name, x in samples]
    covariance = sum(torch.outer(x, x) for x in centered) / (len(samples) - 1)
    ridged = (len(samples) - 1) * covariance + covariance.trace() * torch.eye(len(covariance), dtype=torch.float64)
    precision = len(covariance) * torch.linalg.inv(ridged)
    weights = torch.stack([precision @ means[name] for name in names])
    biases = torch.stack([-means[name] @ precision @ means[name] / 2 for name in names])
    return weights, biases


def fit(options, training, temperature):
    images = [(task, [F.normalize(view, dim=0) for view in views], name) for task, views, name in training.images()]
    alpha = options.alpha if options.alpha is not None else select_alpha(images, training, temperature)
    weights, biases = gaussians([(name, x) for _, views, name in images for x in views], training.names)
    return {"weights": alpha * weights, "biases": alpha * biases}


def select_alpha(images, training, temperature):
    counts, ranked = {}, []
    for task, views, name in images:
        counts[task, name] = counts.get((task, name), 0) + 1
        ranked.append((counts[task, name] - 1, task, views, name))
    num_folds = min(5, *counts.values())
    if num_folds == 1:
        return 0.001
    hits = [0] * len(ALPHAS)
    for fold in range(num_folds):
        fitted = [(name, x) for rank, _, views, name in ranked if rank % num_folds != fold for x in views]
        weights, biases = gaussians(fitted, training.names)
        for rank, task, views, name in ranked:
            for x in views if rank % num_folds == fold else ():
                names = training.class_names[task]
                for index, alpha in enumerate(ALPHAS):
                    scores = [
                        x @ F.normalize(z, dim=0) / temperature + alpha * (x @ weights[row] + biases[row])
                        for row, z in zip(map(training.names.index, names), training.text_features[task])
                    ]
                    hits[index] += names[max(range(len(names)), key=lambda label: scores[label])] == name
    return ALPHAS[hits.index(max(hits))]


def logits(method, x, z, clip_logits, config):
    return clip_logits + torch.stack([torch.stack([w @ image for w in method.weights]) for image in x]) + method.biases


REFERENCE = Reference(
    features=features,
    fit=fit,
    logits=logits,
    starts=lambda towers, model: {"*": is_all(0)},
    options={"views": Option(3), "alpha": Option(0.25)},
    small={"views": 2},
    modifies_text_encoder=False,
    random_start=False,
)
