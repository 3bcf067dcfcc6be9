"""The slow, obvious definition of prompted text towers of all families: concatenate the prompts at every layer.

As reference_towers.py, which is for CLIP's own text tower, with each tower's own mask, positions and pooling.
"""

from __future__ import annotations

import torch
from torch import nn


def reference_encode_text(
    model: nn.Module,
    ids: torch.Tensor,
    prompts: torch.Tensor | None,
    start: int,
    propagate: bool = False,
    embeddings: torch.Tensor | None = None,
    class_prompts: tuple[int, torch.Tensor] | None = None,
) -> torch.Tensor:
    """ids (C, L) as open_clip's tokenizer pads them, prompts (K', b, D) before token `start` → (C, E).

    Replaced prompts are new in each layer, and gone after the last. Propagated ones are tokens of the input in the
    place of padding; those of layer K' stay. embeddings (C, L, D) replace the tokens' own. class_prompts: a layer, and
    prompts (C, b, D) that replace the propagated ones before it.
    """
    text = getattr(model, "text", model)
    is_bert = not hasattr(text, "positional_embedding")
    b = 0 if prompts is None else prompts.shape[1]
    inserted = b if propagate else 0
    x = embeddings
    if x is None:
        x = text.transformer.embeddings.word_embeddings(ids) if is_bert else text.token_embedding(ids)
    context_length = x.shape[1]
    if propagate:
        x = insert(x, prompts[0], start)[:, :context_length]
    x = text.transformer.embeddings(inputs_embeds=x) if is_bert else x + text.positional_embedding
    layers = text.transformer.encoder.layer if is_bert else text.transformer.resblocks
    padding = ids == text.config.pad_token_id if is_bert else torch.zeros_like(ids, dtype=torch.bool)
    for k, layer in enumerate(layers):
        prompted = k < (0 if prompts is None else len(prompts))
        if prompted and not propagate:
            x = insert(x, prompts[k], start)
        elif prompted and k > 0:
            x = insert(torch.cat([x[:, :start], x[:, start + b :]], dim=1), prompts[k], start)
        if class_prompts is not None and k == class_prompts[0]:
            x = torch.cat([x[:, :start], class_prompts[1], x[:, start + b :]], dim=1)
        num_seen = (~padding).sum(1) + (x.shape[1] - context_length) + inserted
        hidden = torch.arange(x.shape[1]) >= num_seen[:, None]
        mask = torch.zeros(len(x), 1, x.shape[1], x.shape[1], dtype=x.dtype)
        mask = mask.masked_fill(hidden[:, None, None], -torch.inf)
        if is_bert:
            x = layer(x, mask)
        else:
            is_causal = getattr(text, "attn_mask", None) is not None
            x = layer(x, attn_mask=mask[0, 0].fill_(-torch.inf).triu(1) if is_causal else None)
        if prompted and not propagate:
            x = torch.cat([x[:, :start], x[:, start + b :]], dim=1)
    if is_bert:
        pooler = type(text.pooler).__name__
        if pooler == "MeanPooler":
            x = torch.stack([row[:count].mean(0) for row, count in zip(x, (~padding).sum(1) + inserted)])
        else:
            first = inserted if start == 0 else 0
            x = x[:, first]
            if pooler == "ClsPooler":
                x = torch.tanh(text.transformer.pooler.dense(x))
        return text.proj(x)
    x = text.ln_final(x)
    pool_type = getattr(text, "text_pool_type", None) or text.pool_type
    if pool_type in ("argmax", "eos"):
        eos = ids.argmax(1) if pool_type == "argmax" else (ids == getattr(text, "text_eos_id", 2)).int().argmax(1)
        x = x[torch.arange(len(x)), eos + inserted]
    else:
        assert pool_type == "last"
        x = x[:, -1]
    projection = text.text_projection
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


def insert(x: torch.Tensor, prompts: torch.Tensor, start: int) -> torch.Tensor:
    return torch.cat([x[:, :start], prompts.expand(len(x), -1, -1), x[:, start:]], dim=1)
