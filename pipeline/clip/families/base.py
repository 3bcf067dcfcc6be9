"""Descriptions of towers for `ClipTowers`; a family of towers is a file beside this one that fills one in.

They refer to the modules of a tower, which `ClipTowers` owns, and hold no tensors of their own.

Dimensions: B images, R texts (rows), L tokens, D width, E width of the features, K layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from pipeline.clip.blocks import Block
from pipeline.clip.tokenizer import Tokenizer


class ImageTower:
    """An image tower. A family sets the attributes and defines the methods that raise NotImplementedError."""

    blocks: Sequence[Block] = ()
    """The layers. Empty: the tower cannot take prompts, and only its module is called."""
    reason: str = ""
    """Why it cannot."""
    num_tokens: int = 0
    """Number of tokens L of an image."""
    pools_first_token: bool = True
    """Whether the feature depends only on the first token (CLS) of the last layer."""
    pool_layers: int = 0
    """Number of layers whose activations the pooling needs besides."""

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the input (B, L, D) of the first layer for standardized images (B, 3, H, W)."""
        raise NotImplementedError

    def norm_prompts(self, prompts: torch.Tensor) -> torch.Tensor:
        """Normalize prompts that are tokens of the input, as `embed` normalizes patches."""
        return prompts

    def rotation(self) -> torch.Tensor | None:
        """Return the rotary position embedding (L, 2 D / heads) of all tokens, as of `blocks.rotate`, if any."""
        return None

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """Return features (B, E) of the last layer's output x (B, L, D), or its first token (B, 1, D) if
        `pools_first_token`."""
        raise NotImplementedError


class TextTower:
    """A text tower. A family sets the attributes and defines the methods that raise NotImplementedError."""

    blocks: Sequence[Block]
    """The layers."""
    output_dim: int
    """E."""
    token_embedding: nn.Embedding
    causal: bool = True
    """Whether a token sees only those before it. If not, all tokens see each other."""
    masks_padding: bool = False
    """Whether padding is not seen; only if not causal. If it is seen, texts are padded to the context."""
    pooled: Literal["eot", "first", "last", "mean"] = "eot"
    """Token whose output is the feature: `first` is the text's first, `last` the last of the context, padding or not;
    `mean` is the mean of all tokens but padding, only with `masks_padding`."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises: UnsupportedTower: with this tokenizer, the features are not those of open_clip."""

    def embed(self, embeddings: torch.Tensor, position: int) -> torch.Tensor:
        """Add what belongs to the positions `position`, `position` + 1, ... to token embeddings (..., L, D)."""
        raise NotImplementedError

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Return features (R, E) of the pooled outputs (R, D)."""
        raise NotImplementedError


class UnsupportedTower(ValueError):
    """A tower that no family describes; the message is the reason."""
