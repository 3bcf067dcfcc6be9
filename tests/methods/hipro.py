"""HiPro with one task, where the tree is one leaf; several tasks: test_methods.py."""

import torch.nn.functional as F
from reference_method import Option, Reference, full_ids, is_normal, name_only
from reference_towers import reference_encode_text


def features(method, model, images, config):
    z = reference_encode_text(model, full_ids("{}."), method.contexts, propagate=True)
    return model.encode_image(images), F.normalize(z, dim=1)


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {"contexts": is_normal(0.02)},
    options={"context_length": Option(5, {"contexts": (1, 5, 16)})},
    small={"context_length": 3},
    start_options={"context_length": 20},
    num_parameters=(({}, 3 * 16 * 512),),
    text=name_only,
)
