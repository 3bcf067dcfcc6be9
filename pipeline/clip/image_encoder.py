"""The image tower with prompts, without the computations that have no effect (see `ClipTowers`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.clip.blocks import no_rotation
from pipeline.clip.chunks import activation_bytes, checkpointed_chunks
from pipeline.clip.class_tokens import counts_in_range
from pipeline.clip.families.base import ImageTower
from pipeline.clip.prompt_keys import deep_prompt_kv, prepend_task_kv, repeat_per_row


def encode_prompted_image(
    tower: ImageTower,
    images: torch.Tensor,
    prompts: torch.Tensor | None,
    images_per_task: Sequence[int],
    propagate: bool,
    memory_gib: float,
    prototype: torch.Tensor,
) -> torch.Tensor:
    """Return image features (B, E).

    Args:
        prototype: see `activation_bytes`; the others are those of `ClipTowers.encode_image`.
    """
    if prompts is not None and propagate:
        prompts = torch.cat([tower.norm_prompts(prompts[:, :1]), prompts[:, 1:]], dim=1)
    replaced = deep_prompt_kv(tower.blocks, prompts, propagate)
    last_prompted = -1 if prompts is None else prompts.shape[1] - 1
    num_prompts = 0 if prompts is None else prompts.shape[2]
    rotation, rotation_with_prompts = tower.rotation(), None
    if rotation is not None:  # of patches only; prompts are not rotated, like CLS
        rotation_with_prompts = torch.cat([rotation, no_rotation(rotation, num_prompts)])

    def encode(start: int, stop: int) -> torch.Tensor:
        counts = counts_in_range(images_per_task, start, stop)
        x, turns = tower.embed(images[start:stop]), rotation  # (B, L, D)
        for k, block in enumerate(tower.blocks):
            if prompts is not None and propagate and k == last_prompted:
                x, turns = torch.cat([x, repeat_per_row(prompts[:, k], counts)], dim=1), rotation_with_prompts
            h = block.norm(x)
            keys_values = block.keys_values(h, turns)
            if k < len(replaced):
                keys_values = prepend_task_kv(replaced[k], counts, keys_values)
            if k == len(tower.blocks) - 1:
                needed = 1 if tower.pools_first_token else tower.num_tokens
                x, h, turns = x[:, :needed], h[:, :needed], None if turns is None else turns[:needed]
            x = block.attend(x, h, keys_values, rotation=turns)
        return tower.pool(x)

    num_tokens = tower.num_tokens + (num_prompts if propagate else 0)
    num_layers = len(tower.blocks) + tower.pool_layers
    bytes_per_image = activation_bytes(tower.blocks, num_tokens, num_tokens + num_prompts, prototype, num_layers)
    return checkpointed_chunks(encode, images.shape[0], bytes_per_image, memory_gib)
