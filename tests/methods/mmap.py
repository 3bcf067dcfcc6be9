"""MmAP of a group: in every layer the group's prompts and the task's, each a Kronecker product."""

import torch
from reference_method import Option, Reference, full_ids, is_all, is_normal
from reference_towers import reference_encode_image, reference_encode_text


def features_of(stacks, model, images, config):
    """Compute the features for MmAPs whose prompts are concatenated."""
    num_layers = min(len(model.transformer.resblocks), len(model.visual.transformer.resblocks))
    text, vision = (
        torch.stack(
            [
                torch.cat(
                    [
                        torch.kron(
                            getattr(stack, scaling)[0, k], stack.source[0, 0 if config.mmap.shared_source else k]
                        )
                        for stack in stacks
                    ]
                )
                for k in range(config.mmap.depth or num_layers)
            ]
        )
        for scaling in ("text_scaling", "vision_scaling")
    )
    before_sos = config.mmap.text_prompt_position == "before_sos"
    ids = full_ids(config.clip.template)
    return reference_encode_image(model, images, vision), reference_encode_text(model, ids, text, before_sos)


REFERENCE = Reference(
    features=lambda method, *inputs: features_of((method.group, method.task), *inputs),
    starts=lambda towers, model: {"*.source": is_normal(0.07), "*_scaling": is_all(1)},
    options={
        "prompt_length": Option(4, {"text_scaling": (1, 4, 2, 2), "vision_scaling": (1, 4, 2, 3)}),
        "source_rows": Option(3, {"source": (1, 4, 3, 8), "text_scaling": (1, 4, 2, 2)}),
        "source_columns": Option(4, {"source": (1, 4, 2, 4), "vision_scaling": (1, 4, 3, 6)}),
        "depth": Option(3, {"source": (1, 3, 2, 8), "text_scaling": (1, 3, 3, 2)}),
        "shared_source": Option(True, {"source": (1, 1, 2, 8), "text_scaling": (1, 4, 3, 2)}),
        "text_prompt_position": Option("before_sos"),
        "init_std": Option(0.3),
    },
    small={"prompt_length": 2, "source_rows": 2},
    start_options={"prompt_length": 40, "source_rows": 40, "init_std": 0.07},
)
