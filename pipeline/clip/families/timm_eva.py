"""timm's Eva in open_clip's TimmModel: EVA01, EVA02, and the Perception Encoder (PE-Core)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.clip.blocks import Block, no_rotation
from pipeline.clip.families.base import UnsupportedTower
from pipeline.clip.families.timm_vit import TimmVisionTransformer, mlp_values


class EvaBlock(Block):
    """timm's EvaBlock (pre-norm) and EvaBlockPostNorm: no bias of keys, rotated queries and keys, norms inside."""

    def __init__(self, block: Any):
        attention = block.attn
        self.is_post_norm = type(block).__name__ == "EvaBlockPostNorm"
        if type(attention).__name__ not in ("EvaAttention", "AttentionRope") or attention.gate is not None:
            raise UnsupportedTower("its blocks are not EVA's plain residual attention blocks")
        if not isinstance(attention.q_norm, nn.Identity) or not isinstance(attention.k_norm, nn.Identity):
            raise UnsupportedTower("its queries and keys are normalized")
        if attention.rotate_half:
            raise UnsupportedTower("its rotary position embedding rotates halves, not pairs")
        width = attention.proj.out_features
        if attention.proj.in_features != width or getattr(attention, "num_kv_heads", None) not in (
            None,
            attention.num_heads,
        ):
            raise UnsupportedTower("its keys have fewer heads, or another width")
        super().__init__(attention, attention.num_heads, width, mlp_values(block.mlp))
        self.block = block

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_post_norm:
            return x
        return self.block.norm1(x)

    def in_proj(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        attention = self.block.attn
        if attention.qkv is None:
            layers = (attention.q_proj, attention.k_proj, attention.v_proj)[parts]
            return torch.cat([layer(h) for layer in layers], dim=-1)
        rows = slice(parts.start * self.width, parts.stop * self.width)
        bias = attention.qkv.bias  # AttentionRope
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        return F.linear(h, attention.qkv.weight[rows], None if bias is None else bias[rows])

    def in_proj_weights(self) -> Sequence[torch.Tensor]:
        attention = self.block.attn
        layers = [attention.q_proj, attention.k_proj, attention.v_proj] if attention.qkv is None else [attention.qkv]
        return [layer.weight for layer in layers]

    def add_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        attention = self.block.attn
        update = attention.proj(attention.norm(attended))
        if self.is_post_norm:
            return x + self.block.norm1(update)
        return x + (update if self.block.gamma_1 is None else self.block.gamma_1 * update)

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_post_norm:
            return x + self.block.norm2(self.block.mlp(x))
        update = self.block.mlp(self.block.norm2(x))
        return x + (update if self.block.gamma_2 is None else self.block.gamma_2 * update)


class Eva(TimmVisionTransformer):
    """timm's Eva: rotary position embeddings of the patches, if any; CLS, mean or attention pooling."""

    block = EvaBlock

    def __init__(self, visual: Any):
        if visual.trunk.rope_mixed:
            raise UnsupportedTower("its rotary position embedding differs from layer to layer")
        super().__init__(visual)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        return self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(images))[0])

    def rotation(self) -> torch.Tensor | None:
        if self.trunk.rope is None:
            return None
        patches: torch.Tensor = self.trunk.rope.get_embed()
        return torch.cat([no_rotation(patches, self.trunk.num_prefix_tokens), patches])
