"""The slow, obvious definition of prompted CLIP: concatenate the prompts at every layer, discard their outputs.

All classes at 77 tokens, one task at a time, open_clip's own blocks: the reference for pipeline/clip/towers.py.
"""

from __future__ import annotations

import torch
from torch import nn


def reference_encode_image(
    model: nn.Module, images: torch.Tensor, prompts: torch.Tensor | None, propagate: bool = False
) -> torch.Tensor:
    """images (B, 3, H, W), prompts (K', b, D) → (B, E). Eq. 10: [CLS, prompts, patches] at each layer; propagate: the
    prompts of layer K' stay (VPT-shallow, MaPLe)."""
    x = model.visual._embeds(images)
    if propagate:
        prompts = torch.cat([model.visual.ln_pre(prompts[:1]), prompts[1:]])
    for k, block in enumerate(model.visual.transformer.resblocks):
        prompted = prompts is not None and k < len(prompts)
        b = prompts.shape[1] if prompted else 0
        if prompted:
            x = torch.cat([x[:, :1], prompts[k].expand(len(x), -1, -1), x[:, 1:]], dim=1)
        x = block(x)
        if not (propagate and prompted and k == len(prompts) - 1):
            x = torch.cat([x[:, :1], x[:, 1 + b :]], dim=1)
    return model.visual.ln_post(x)[:, 0] @ model.visual.proj


def reference_encode_text(
    model: nn.Module,
    ids: torch.Tensor,
    prompts: torch.Tensor | None,
    before_sos: bool = False,
    propagate: bool = False,
) -> torch.Tensor:
    """ids (C, 77), prompts (K', b, D) → (C, E). Eq. 9; [SOS, prompts, words], or prompts before SOS; propagate: prompts
    are inserted before positions are added, and those of layer K' stay (CoOp, MaPLe)."""
    text = getattr(model, "text", model)
    start, eot = 0 if before_sos else 1, ids.argmax(dim=-1)
    x = text.token_embedding(ids)
    if propagate:
        b = prompts.shape[1]
        x = torch.cat([x[:, :start], prompts[0].expand(len(x), -1, -1), x[:, start : x.shape[1] - b]], dim=1)
        eot = eot + b
    x = x + text.positional_embedding
    for k, block in enumerate(text.transformer.resblocks):
        prompted = prompts is not None and k < len(prompts)
        if propagate and prompted and k > 0:
            x = torch.cat([x[:, :start], prompts[k].expand(len(x), -1, -1), x[:, start + b :]], dim=1)
        elif prompted and not propagate:
            b = prompts.shape[1]
            x = torch.cat([x[:, :start], prompts[k].expand(len(x), -1, -1), x[:, start:]], dim=1)
        length = x.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        x = block(x, attn_mask=mask)
        if prompted and not propagate:
            x = torch.cat([x[:, :start], x[:, start + b :]], dim=1)
    x = text.ln_final(x)[torch.arange(len(ids)), eot]
    return x @ text.text_projection if not isinstance(text.text_projection, nn.Linear) else text.text_projection(x)
