import torch
import torch.nn.functional as F
from reference_method import Option, Reference, full_ids, is_all


def features(method, model, images, config):
    return model.encode_image(images), model.encode_text(full_ids(config.clip.template))


def fit(options, training, temperature):
    names, samples = training.names, []
    for task, views, name in training.images():
        classes = [names.index(candidate) for candidate in training.class_names[task]]
        z = F.normalize(training.text_features[task], dim=1)
        label = training.class_names[task].index(name)
        samples += [(F.normalize(view, dim=0), classes, z, label) for view in views]
    similarities = [[] for _ in names]  # of a class's images with its text
    weights = torch.zeros(len(names), len(samples[0][0]), dtype=torch.float64)
    squares = torch.zeros(len(names), dtype=torch.float64)
    for x, classes, z, label in samples:
        weights[classes[label]] += x
        squares[classes] += (z @ x) ** 2
        similarities[classes[label]].append(x @ z[label])
    mean = torch.stack([torch.stack(values).mean() for values in similarities]).mean()
    alphas = (250 * mean).repeat(len(names)).requires_grad_()
    weights.requires_grad_()
    x = torch.stack([x for x, *_ in samples])
    optimizer = torch.optim.SGD([weights], lr=4 * len(x) / torch.linalg.eigvalsh(x.T @ x).max().item(), momentum=0.9)
    for iteration in range(options.iterations):
        losses = [
            F.cross_entropy(weights[classes] @ x + alphas[classes] * (z @ x), torch.tensor(label))
            for x, classes, z, label in samples
        ]
        weights.grad = alphas.grad = None
        torch.stack(losses).mean().backward()
        optimizer.step()
        if (iteration + 1) % options.alpha_every == 0:
            with torch.no_grad():
                alphas -= len(x) / (4 * squares.max()) * alphas.grad
    return {"weights": weights.detach(), "alphas": alphas.detach()}


def logits(method, x, z, clip_logits, config):
    scores = [
        [image @ (weight + alpha * text) for weight, alpha, text in zip(method.weights, method.alphas, z)]
        for image in x
    ]
    return torch.stack([torch.stack(row) for row in scores])


REFERENCE = Reference(
    features=features,
    fit=fit,
    logits=logits,
    starts=lambda towers, model: {"*": is_all(0)},
    options={"views": Option(3), "iterations": Option(15), "alpha_every": Option(4)},
    small={"views": 2, "iterations": 25},
    num_parameters=(({}, 5 * 513),),
    modifies_text_encoder=False,
    random_start=False,
)
