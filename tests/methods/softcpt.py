import torch
from reference_method import Option, Reference, full_ids, is_normal, name_only
from reference_towers import reference_encode_text
from small_clip import tokenizer


def features(method, model, images, config):
    (task,) = method.tasks
    task_feature = reference_encode_text(model, tokenizer()([f"{task}."]), method.meta_prompt[None], propagate=True)[0]
    context = torch.stack([task_feature @ method.projection[:, i] for i in range(config.softcpt.context_length)])
    return model.encode_image(images), reference_encode_text(model, full_ids("{}."), context[None], propagate=True)


REFERENCE = Reference(
    features=features,
    starts=lambda towers, model: {"meta_prompt": is_normal(0.02), "projection": is_normal(0.02)},
    options={
        "context_length": Option(5, {"projection": (12, 5, 16)}),
        "meta_length": Option(3, {"meta_prompt": (3, 16)}),
    },
    small={"context_length": 3, "meta_length": 2},
    start_options={"context_length": 10, "meta_length": 40},
    num_parameters=(({}, 512 * 16 * 512 + 4 * 512),),
    text=name_only,
)
