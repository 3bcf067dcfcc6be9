"""open_clip's own towers: VisionTransformer, and the text transformer of CLIP and CustomTextCLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.clip.blocks import Block
from pipeline.clip.families.base import ImageTower, TextTower, UnsupportedTower
from pipeline.clip.tokenizer import BytePairTokenizer, Tokenizer


class OpenClipBlock(Block):
    """open_clip's ResidualAttentionBlock."""

    def __init__(self, block: Any):
        if type(block).__name__ != "ResidualAttentionBlock" or not isinstance(block.attn, nn.MultiheadAttention):
            raise UnsupportedTower("its blocks are not plain residual attention blocks")
        attention = block.attn
        super().__init__(attention, attention.num_heads, attention.embed_dim, block.mlp.c_fc.out_features)
        self.block = block
        self.uses_quick_gelu = type(block.mlp.gelu).__name__ == "QuickGELU"

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.ln_1(x)

    def in_proj(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        attention, rows = self.block.attn, slice(parts.start * self.width, parts.stop * self.width)
        return F.linear(h, attention.in_proj_weight[rows], attention.in_proj_bias[rows])

    def in_proj_weights(self) -> Sequence[torch.Tensor]:
        return [self.block.attn.in_proj_weight]

    def add_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        return x + self.block.ls_1(self.block.attn.out_proj(attended))

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        mlp = self.block.mlp
        h = mlp.c_fc(self.block.ln_2(x))
        if self.uses_quick_gelu:
            # x sigmoid(1.702 x), as open_clip's, with half the memory for the backward pass.
            h = F.silu(h.mul_(1.702)).div_(1.702)
        else:
            h = mlp.gelu(h)
        return x + self.block.ls_2(mlp.c_proj(h))


class OpenClipImageTower(ImageTower):
    """open_clip's VisionTransformer whose feature is the CLS token or the mean of the patches."""

    def __init__(self, visual: Any):
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise UnsupportedTower("the image feature is neither the CLS token nor the mean of the patches")
        self.visual = visual
        self.blocks = [OpenClipBlock(block) for block in visual.transformer.resblocks]
        self.num_tokens = len(visual.positional_embedding)
        self.pools_first_token = visual.pool_type == "tok"

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual._embeds(images)

    def norm_prompts(self, prompts: torch.Tensor) -> torch.Tensor:
        return self.visual.ln_pre(prompts)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.visual._pool(x)[0]
        return pooled @ self.visual.proj


class FlatText(nn.Module):
    """The text tower of a CLIP that has no module of its own for it, under the names of TextTransformer."""

    def __init__(self, model: Any):
        super().__init__()
        self.token_embedding = model.token_embedding
        self.positional_embedding = model.positional_embedding
        self.transformer = model.transformer
        self.ln_final = model.ln_final
        self.text_projection = model.text_projection


class OpenClipTextTower(TextTower):
    """open_clip's text transformer, causal or not, with any of its poolings but CoCa's.

    Args:
        text: its modules: TextTransformer or FlatText.
        options: the TextTransformer or CLIP, which knows its pooling and mask.
    """

    def __init__(self, text: Any, options: Any):
        pool_type = getattr(options, "text_pool_type", None) or getattr(options, "pool_type", None)
        pooled = {"argmax": "eot", "eos": "eot", "first": "first", "last": "last"}.get(str(pool_type))
        if pooled is None or getattr(text, "cls_emb", None) is not None:
            raise UnsupportedTower("the text feature is not one of the text's tokens")
        if getattr(options, "use_pad_mask", False):
            raise UnsupportedTower("the text tower masks padding")
        self.causal = options.attn_mask is not None
        if self.causal and pooled != "eot":
            raise UnsupportedTower("the text feature is not the end-of-text token")
        self.text = text
        self.pool_type, self.eos_id = pool_type, getattr(options, "text_eos_id", getattr(options, "eos_id", None))
        self.blocks = [OpenClipBlock(block) for block in text.transformer.resblocks]
        self.token_embedding = text.token_embedding
        self.pooled = pooled  # type: ignore[assignment]
        projection, width = text.text_projection, text.token_embedding.embedding_dim
        if isinstance(projection, nn.Linear):
            self.output_dim = projection.out_features
        else:
            self.output_dim = width if projection is None else projection.shape[1]

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        if self.pool_type == "argmax" and not isinstance(tokenizer, BytePairTokenizer):
            raise UnsupportedTower("the text feature is that of the highest token, which is not its tokenizer's last")
        if self.pool_type == "eos" and tokenizer.end[-1:] != (self.eos_id,):
            raise UnsupportedTower(
                f"the text feature is that of token {self.eos_id}, and its tokenizer ends texts with {tokenizer.end}"
            )

    def embed(self, embeddings: torch.Tensor, position: int) -> torch.Tensor:
        positions: torch.Tensor = self.text.positional_embedding
        return embeddings + positions[position : position + embeddings.shape[-2]]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        z: torch.Tensor = self.text.ln_final(x)
        projection = self.text.text_projection
        if projection is None:
            return z
        return projection(z) if isinstance(projection, nn.Linear) else z @ projection
