"""The slow, obvious definition of prompted CLIP: concatenate the prompts at every layer, throw their outputs away.

All classes at 77 tokens, one task at a time, open_clip's own blocks: the reference for pipeline/clip/towers.py.
"""

from __future__ import annotations

import torch
from torch import nn


def plain_encode_image(model: nn.Module, images: torch.Tensor, prompts: torch.Tensor | None) -> torch.Tensor:
    """images (B, 3, H, W), prompts (K', b, D) → (B, E). Eq. 10: [CLS, prompts, patches] at each layer."""
    x = model.visual._embeds(images)
    for k, block in enumerate(model.visual.transformer.resblocks):
        if prompts is not None and k < len(prompts):
            b = prompts.shape[1]
            x = torch.cat([x[:, :1], prompts[k].expand(len(x), -1, -1), x[:, 1:]], dim=1)
            x = block(x)
            x = torch.cat([x[:, :1], x[:, 1 + b :]], dim=1)
        else:
            x = block(x)
    return model.visual.ln_post(x)[:, 0] @ model.visual.proj


def plain_encode_text(
    model: nn.Module, ids: torch.Tensor, prompts: torch.Tensor | None, before_sos: bool = False
) -> torch.Tensor:
    """ids (C, 77), prompts (K', b, D) → (C, E). Eq. 9; [SOS, prompts, words], or with prompts before SOS."""
    text = getattr(model, "text", model)
    x = text.token_embedding(ids) + text.positional_embedding
    at = 0 if before_sos else 1
    for k, block in enumerate(text.transformer.resblocks):
        prompted = prompts is not None and k < len(prompts)
        b = prompts.shape[1] if prompted else 0
        if prompted:
            x = torch.cat([x[:, :at], prompts[k].expand(len(x), -1, -1), x[:, at:]], dim=1)
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        x = block(x, attn_mask=mask)
        x = torch.cat([x[:, :at], x[:, at + b :]], dim=1)
    x = text.ln_final(x)[torch.arange(len(ids)), ids.argmax(dim=-1)]
    return x @ text.text_projection if not isinstance(text.text_projection, nn.Linear) else text.text_projection(x)
