"""timm's VisionTransformer in open_clip's TimmModel: SigLIP, SigLIP 2, MobileCLIP-B, MobileCLIP2-L, ViTamin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipeline.clip.blocks import Block
from pipeline.clip.families.base import ImageTower, UnsupportedTower


class TimmBlock(Block):
    """timm's pre-norm Block with its plain Attention."""

    def __init__(self, block: Any):
        attention = block.attn
        is_plain = type(block).__name__ == "Block" and type(attention).__name__ == "Attention"
        if not is_plain or attention.gate is not None or attention.attn_dim != block.norm1.normalized_shape[0]:
            raise UnsupportedTower("its blocks are not timm's plain residual attention blocks")
        if not isinstance(attention.q_norm, nn.Identity) or not isinstance(attention.k_norm, nn.Identity):
            raise UnsupportedTower("its queries and keys are normalized")
        super().__init__(attention, attention.num_heads, attention.attn_dim, mlp_values(block.mlp))
        self.block = block

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.block.norm1(x)

    def in_proj(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        qkv, rows = self.block.attn.qkv, slice(parts.start * self.width, parts.stop * self.width)
        return nn.functional.linear(h, qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])

    def in_proj_weights(self) -> Sequence[torch.Tensor]:
        return [self.block.attn.qkv.weight]

    def add_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        attention = self.block.attn
        return x + self.block.ls1(attention.proj(attention.norm(attended)))

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block.ls2(self.block.mlp(self.block.norm2(x)))


class TimmVisionTransformer(ImageTower):
    """timm's VisionTransformer.

    Args:
        visual: open_clip's TimmModel.
    """

    block: Callable[[Any], Block] = TimmBlock
    """Description of a layer."""

    def __init__(self, visual: Any):
        trunk = visual.trunk
        self.visual, self.trunk = visual, trunk
        self.blocks = [self.block(block) for block in trunk.blocks]
        self.num_tokens = trunk.patch_embed.num_patches + trunk.num_prefix_tokens
        self.pools_first_token = trunk.global_pool == "token"
        self.pool_layers = int(trunk.attn_pool is not None)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(images)))

    def norm_prompts(self, prompts: torch.Tensor) -> torch.Tensor:
        return self.trunk.norm_pre(prompts)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        return self.visual.head(self.trunk.forward_head(self.trunk.norm(x)))


def mlp_values(mlp: nn.Module) -> int:
    """Return the number of values per token that a timm MLP keeps for its backward pass."""
    hidden = [layer.out_features for layer in mlp.modules() if isinstance(layer, nn.Linear)][:-1]
    is_gated = "Glu" in type(mlp).__name__ or "GLU" in type(mlp).__name__
    return sum(hidden) * (2 if is_gated else 1)
