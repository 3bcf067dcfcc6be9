"""A residual block of a transformer, as `ClipTowers` runs it; each family of towers fills one in.

With h = norm(x), and `attended` the attention of h's queries to keys and values, of which some may be prompts':

    x ← add_attention(x, attended); x ← add_mlp(x)

Dimensions: N rows, L tokens, n keys, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn


class Block:
    """Base class. A family passes the modules of one block, and defines the methods that raise NotImplementedError.

    Args:
        attention: the block's attention module; a method may set its attribute `in_proj_update`, a module called with
            normed rows (N, L, D) and parts, as of `project`, which returns what is added to their projection.
        num_heads: H.
        width: D.
        mlp_values: number of values per token that the MLP keeps for its backward pass.
    """

    def __init__(self, attention: nn.Module, num_heads: int, width: int, mlp_values: int):
        self.attention = attention
        self.num_heads = num_heads
        self.width = width
        self.mlp_values = mlp_values

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows (N, L, D) that are projected to queries, keys and values."""
        raise NotImplementedError

    def in_proj(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        """Project normed rows h (N, L, D) to the given parts of query (0), key (1) and value (2), concatenated."""
        raise NotImplementedError

    def in_proj_weights(self) -> Sequence[torch.Tensor]:
        """Return the matrices whose rows, one after the other, are those of query, key and value (3 D, D)."""
        raise NotImplementedError

    def add_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return x (N, L, D) after the attention, whose heads' outputs are `attended` (N, L, D)."""
        raise NotImplementedError

    def add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (N, L, D) after the MLP."""
        raise NotImplementedError

    @property
    def trains_matrices(self) -> bool:
        """True if some weight matrix of the attention, apart from a method's update, requires a gradient."""
        tensors = (*self.attention.named_parameters(), *self.attention.named_buffers())  # buffers: made by a method
        return any(
            tensor.requires_grad and tensor.dim() > 1 and not name.startswith("in_proj_update")
            for name, tensor in tensors
        )

    @property
    def has_update(self) -> bool:
        """True if a method has set an update of the projections."""
        return hasattr(self.attention, "in_proj_update")

    def set_projection_update(self, update: nn.Module) -> None:
        """Add the output of `update` to each projection (see the class)."""
        self.attention.in_proj_update = update

    def project(self, h: torch.Tensor, parts: slice) -> torch.Tensor:
        """Project rows as `in_proj`, and add the update of a method, if any."""
        projected = self.in_proj(h, parts)
        if self.has_update:
            projected = projected + cast(nn.Module, self.attention.in_proj_update)(h, parts)
        return projected

    def merged_in_proj_weights(self) -> list[torch.Tensor]:
        """Return the matrices of `in_proj_weights` with the update of a method, if any, a linear map, added."""
        weights = self.in_proj_weights()
        if not self.has_update:
            return list(weights)
        rows = torch.eye(self.width, dtype=weights[0].dtype, device=weights[0].device)[None]
        update = cast(nn.Module, self.attention.in_proj_update)(rows, slice(0, 3))[0].T  # (3 D, D)
        return [weight + part for weight, part in zip(weights, update.split([len(weight) for weight in weights]))]

    def keys_values(self, h: torch.Tensor, rotation: torch.Tensor | None = None) -> torch.Tensor:
        """Project normed rows h (N, L, D) to keys and values (N, L, 2 D).

        Args:
            rotation: (L, 2 D / H), as of `rotate`. None: the keys are not rotated.
        """
        projected = self.project(h, slice(1, 3))
        if rotation is None:
            return projected
        key, value = projected.chunk(2, dim=-1)
        return torch.cat([self._rotate_heads(key, rotation), value], dim=-1)

    def attend(
        self,
        x: torch.Tensor,
        h: torch.Tensor,
        keys_values: torch.Tensor,
        mask: torch.Tensor | None = None,
        rotation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Apply the block to rows x (N, L, D) with h = norm(x), given all keys and values (N, n, 2 D).

        Args:
            mask: bool, of a shape that expands to (N, H, L, n); True: the query sees the key. None: it sees all.
            rotation: (L, 2 D / H), of the queries.
        """
        query = self.project(h, slice(0, 1))
        if rotation is not None:
            query = self._rotate_heads(query, rotation)
        query, key, value = (
            rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for rows in (query, *keys_values.chunk(2, dim=-1))
        )  # (N, H, L or n, D / H)
        attended = attention(query, key, value, mask)
        return self.add_mlp(self.add_attention(x, attended.transpose(1, 2).flatten(2)))

    def _rotate_heads(self, rows: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        heads = rows.unflatten(-1, (self.num_heads, -1))  # (N, L, H, D / H)
        return rotate(heads, rotation[:, None]).flatten(-2).to(rows.dtype)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return softmax attention; in float32 where a CPU would compute its gradients in bfloat16, which takes several
    times as long."""
    is_slow = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not (is_slow and (query.requires_grad or key.requires_grad or value.requires_grad)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):
        attended = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    return attended.to(query.dtype)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighboring values of x (..., d), as RoPE (Su et al., 2021) in timm's layout.

    Args:
        rotation: (..., 2 d): the sines, then the cosines, each repeated for both values of a pair.
    """
    sine, cosine = rotation.chunk(2, dim=-1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return x * cosine + turned * sine


def no_rotation(rotation: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the rotation (num_tokens, 2 d) that leaves tokens as they are, like `rotation` (L, 2 d)."""
    zeros = rotation.new_zeros(num_tokens, rotation.shape[1] // 2)
    return torch.cat([zeros, zeros + 1], dim=1)
