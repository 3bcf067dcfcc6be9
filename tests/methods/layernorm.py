import re

from reference_method import Reference, features_of_trained_weights, starts_as_clip
from torch import nn


def is_layernorm(name):
    return re.fullmatch(r"(.+\.)?ln_(pre|1|2|post|final)\.(weight|bias)", name) is not None


def features(method, model, images, config):
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(path, recurse=False):
            assert is_layernorm(name) == isinstance(module, nn.LayerNorm)
    return features_of_trained_weights(is_layernorm)(method, model, images, config)


REFERENCE = Reference(
    features=features,
    starts=starts_as_clip,
    num_parameters=(({}, 26 * 2 * 768 + 25 * 2 * 512),),
    random_start=False,
    trains_weight=is_layernorm,
)
