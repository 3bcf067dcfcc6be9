"""The two frozen towers of CLIP with prompts that are replaced at every layer (Eqs. 9-10), as exact shortcuts.

What a plain version would compute and throw away is not computed here:
- a prompt is replaced at the next layer, so at its own layer it needs keys and values only: no query, no MLP;
- text: tokens after EOT never matter; start token and shared words run once a task, and the classes attend to their
  keys and values;
- in the last layer only the CLS or EOT row needs a query and an MLP.

Dimensions: T tasks, B images (task by task), R = ΣC class rows (task by task), L tokens, K layers, D width, b prompts.
Attention does not depend on the order of its keys, so prompts always come first among them; the mask alone says who
sees them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.clip.class_tokens import ClassTokens, Tokenizer
from pipeline.errors import UserError


class ClipTowers(nn.Module):
    """Frozen towers of an open_clip model.

    Args:
        model: open_clip `CLIP` or `CustomTextCLIP` with plain ViT and causal text towers.
        tokenizer: the model's tokenizer.
        text_order: whether text prompts stand after the start token, which then does not see them, or before it.

    Raises:
        UserError: the model has parts that prompts cannot be put into exactly.
    """

    def __init__(self, model: nn.Module, tokenizer: Tokenizer, text_order: str = "after_sos"):
        super().__init__()
        text = getattr(model, "text", model)
        _refuse_unsupported(model, text)
        self.visual = model.visual
        self.vision_blocks = model.visual.transformer.resblocks
        self.text_blocks = text.transformer.resblocks
        self.token_embedding = text.token_embedding
        self.text_positions = text.positional_embedding
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.logit_scale = model.logit_scale
        self.tokenizer = tokenizer
        self.prompts_before_sos = text_order == "before_sos"
        self.image_size: int = model.visual.image_size[0]
        self.image_mean: Sequence[float] = model.visual.image_mean
        self.image_std: Sequence[float] = model.visual.image_std
        self.requires_grad_(False).eval()

    @property
    def vision_width(self) -> int:
        return self.visual.conv1.out_channels

    @property
    def text_width(self) -> int:
        return self.token_embedding.embedding_dim

    @property
    def vision_depth(self) -> int:
        return len(self.vision_blocks)

    @property
    def text_depth(self) -> int:
        return len(self.text_blocks)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [0, 255], uint8 or float → standardised by the model's mean and deviation."""
        mean = torch.tensor(self.image_mean, device=pixels.device)[:, None, None] * 255
        std = torch.tensor(self.image_std, device=pixels.device)[:, None, None] * 255
        return ((pixels - mean) / std).to(self.visual.conv1.weight.dtype)

    def encode_image(
        self, images: torch.Tensor, prompts: torch.Tensor | None = None, images_per_task: Sequence[int] = ()
    ) -> torch.Tensor:
        """Features (B, E), not normalised.

        Args:
            images: (B, 3, H, W), standardised, task by task.
            prompts: (T, K', b, D) for the first K' layers; images of task t see prompts[t]. None: CLIP as it is.
            images_per_task: T counts, ΣB.
        """
        x = self.visual._embeds(images)  # (B, L, D), CLS first
        for k, block in enumerate(self.vision_blocks):
            h = block.ln_1(x)
            key, value = _keys_values(block, h)
            if prompts is not None and k < prompts.shape[1]:
                prompt_key, prompt_value = _keys_values(block, block.ln_1(prompts[:, k]))
                key = torch.cat([_for_rows(prompt_key, images_per_task), key], dim=2)
                value = torch.cat([_for_rows(prompt_value, images_per_task), value], dim=2)
            if k == len(self.vision_blocks) - 1:
                x, h = x[:, :1], h[:, :1]
            x = _attend_and_mlp(block, x, h, key, value)
        return self.visual.ln_post(x[:, 0]) @ self.visual.proj

    def encode_text(self, tokens: ClassTokens, prompts: torch.Tensor | None = None) -> torch.Tensor:
        """Features (R, E) of all tasks' classes, task by task, not normalised.

        Args:
            tokens: the classes of T tasks.
            prompts: (T, K', b, D) for the first K' layers; classes of task t see prompts[t]. None: CLIP as it is.
        """
        num_prefix, num_suffix = tokens.prefix.shape[1], tokens.suffix.shape[1]
        positions = self.text_positions[: num_prefix + num_suffix]
        prefix = self.token_embedding(tokens.prefix) + positions[:num_prefix]  # (T, P, D)
        suffix = self.token_embedding(tokens.suffix) + positions[num_prefix:]  # (R, S, D)
        rows = torch.arange(len(suffix), device=suffix.device)
        last = len(self.text_blocks) - 1
        for k, block in enumerate(self.text_blocks):
            prefix_h, suffix_h = block.ln_1(prefix), block.ln_1(suffix)
            prefix_key, prefix_value = _keys_values(block, prefix_h)
            num_prompts = 0
            if prompts is not None and k < prompts.shape[1]:
                num_prompts = prompts.shape[2]
                prompt_key, prompt_value = _keys_values(block, block.ln_1(prompts[:, k]))
                prefix_key = torch.cat([prompt_key, prefix_key], dim=2)
                prefix_value = torch.cat([prompt_value, prefix_value], dim=2)
            key, value = _keys_values(block, suffix_h)
            key = torch.cat([_for_rows(prefix_key, tokens.classes_per_task), key], dim=2)
            value = torch.cat([_for_rows(prefix_value, tokens.classes_per_task), value], dim=2)
            mask = self._text_mask(num_prompts, num_prefix, num_suffix)  # queries: prefix, then suffix
            if k < last:
                prefix = _attend_and_mlp(
                    block, prefix, prefix_h, prefix_key, prefix_value, mask[:num_prefix, : prefix_key.shape[2]]
                )
                suffix = _attend_and_mlp(block, suffix, suffix_h, key, value, mask[num_prefix:])
            else:
                eot_mask = mask[num_prefix:][tokens.eot][:, None, None]  # (R, 1, 1, keys)
                suffix = _attend_and_mlp(
                    block, suffix[rows, tokens.eot, None], suffix_h[rows, tokens.eot, None], key, value, eot_mask
                )
        z = self.ln_final(suffix[:, 0])
        if self.text_projection is None:
            return z
        return self.text_projection(z) if isinstance(self.text_projection, nn.Linear) else z @ self.text_projection

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Cosine similarities over CLIP's temperature (Eq. 5): (B, E), (C, E) → float32 or float64 (B, C)."""
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        x = F.normalize(image_features.to(dtype), dim=-1)
        z = F.normalize(text_features.to(dtype), dim=-1)
        return self.logit_scale.exp() * x @ z.T

    def _text_mask(self, num_prompts: int, num_prefix: int, num_suffix: int) -> torch.Tensor:
        """(P + S, b + P + S) bool, True where a query (row) may look at a key: prompts, then prefix, then suffix."""
        words = num_prefix + num_suffix
        causal = torch.ones(words, words, dtype=torch.bool, device=self.device).tril()
        sees_prompts = torch.ones(words, num_prompts, dtype=torch.bool, device=self.device)
        sees_prompts[0] = self.prompts_before_sos
        return torch.cat([sees_prompts, causal], dim=1)


def _keys_values(block: nn.Module, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (N, heads, L, D / heads) of normed rows h (N, L, D)."""
    attention, width = block.attn, h.shape[-1]
    key_value = F.linear(h, attention.in_proj_weight[width:], attention.in_proj_bias[width:])
    key, value = key_value.chunk(2, dim=-1)
    return _split_heads(key, attention.num_heads), _split_heads(value, attention.num_heads)


def _attend_and_mlp(
    block: nn.Module,
    x: torch.Tensor,
    h: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The rest of a residual block for the rows x (N, L, D), h = ln_1(x), given all keys and values."""
    attention, width = block.attn, h.shape[-1]
    query = F.linear(h, attention.in_proj_weight[:width], attention.in_proj_bias[:width])
    attended = F.scaled_dot_product_attention(_split_heads(query, attention.num_heads), key, value, attn_mask=mask)
    attended = attended.transpose(1, 2).flatten(2)  # (N, L, D)
    x = x + block.ls_1(attention.out_proj(attended))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _split_heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _for_rows(per_task: torch.Tensor, rows_per_task: Sequence[int]) -> torch.Tensor:
    """(T, ...) → (Σ rows, ...). Expanding, unlike indexing, has a backward pass that adds in a fixed order."""
    return torch.cat([task.expand(count, *task.shape) for task, count in zip(per_task, rows_per_task, strict=True)])


def _refuse_unsupported(model: nn.Module, text: nn.Module) -> None:
    visual = model.visual
    size = getattr(visual, "image_size", 0)
    blocks = [
        *getattr(getattr(visual, "transformer", None), "resblocks", []),
        *getattr(getattr(text, "transformer", None), "resblocks", []),
    ]
    pool_type = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    reasons = {
        "the image tower is not open_clip's own VisionTransformer": type(visual).__name__ != "VisionTransformer",
        "the image feature is not the CLS token": getattr(visual, "pool_type", "") != "tok"
        or getattr(visual, "attn_pool", None) is not None,
        "the image is not square": isinstance(size, tuple) and len(set(size)) != 1,
        "the text tower is not open_clip's own": not hasattr(text, "token_embedding"),
        "the text tower is not causal": getattr(text, "attn_mask", None) is None,
        "the text feature is not the end-of-text token": pool_type not in ("argmax", "eos")
        or getattr(text, "cls_emb", None) is not None,
        "its blocks are not plain residual attention blocks": any(
            type(block).__name__ != "ResidualAttentionBlock" or not isinstance(block.attn, nn.MultiheadAttention)
            for block in blocks
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UserError(
            f"clip.model: this {type(model).__name__} cannot take prompts: {'; '.join(found)}. "
            "Use a ViT model with a CLS token and a causal text tower, such as ViT-B-16-quickgelu, ViT-B-32, ViT-L-14"
        )
