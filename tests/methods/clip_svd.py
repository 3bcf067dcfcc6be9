import torch
from reference_method import Reference, equals, full_ids, open_clips_name, replace_weights


def matrices(model):
    """Name of each trained weight → its matrices: query, key and value, or one."""
    names = ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight")
    weights = {name: value for name, value in model.state_dict().items() if name.endswith(names)}
    assert len(weights) == 4 * (len(model.visual.transformer.resblocks) + len(model.transformer.resblocks))
    return {name: value.chunk(3 if name.endswith("in_proj_weight") else 1) for name, value in weights.items()}


def features(method, model, images, config):
    trained = {
        open_clips_name(key.removeprefix("matrices.").removesuffix(".values").replace("/", ".")): values
        for key, values in method.named_parameters()
    }
    weights = {}
    assert trained.keys() == matrices(model).keys()
    for name, parts in matrices(model).items():
        factors = [torch.linalg.svd(part, full_matrices=False) for part in parts]
        weights[name] = torch.cat([u @ s.diag() @ vt for (u, _, vt), s in zip(factors, trained[name], strict=True)])
    model = replace_weights(model, weights)
    return model.encode_image(images), model.encode_text(full_ids(config.clip.template))


def starts(towers, model):
    checks = {}
    for name, parts in matrices(model).items():
        path = name if name.startswith("visual") else f"text.{name}"
        checks[f"matrices.{path.replace('.', '/')}.values"] = equals(
            torch.stack(list(map(torch.linalg.svdvals, parts)))
        )
    return checks


REFERENCE = Reference(
    features=features,
    starts=starts,
    num_parameters=(({}, 12 * 6 * (768 + 512)),),
    random_start=False,
    needs_small_learning_rate=True,
    trains_weight=lambda name: False,
)
