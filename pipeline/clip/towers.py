"""The two towers of CLIP with prompts (Eqs. 9-10), frozen or trained themselves, as exact shortcuts.

What a plain version would compute and throw away is not computed here:
- a prompt that the next layer replaces needs keys and values only at its own layer: no query, no MLP;
- text: tokens after EOT never matter; start token, carried prompts and shared words run once a task, and the classes
  attend to their keys and values;
- in the last layer only the CLS or EOT row needs a query and an MLP;
- what does not fit `activation_memory_gib` runs in chunks of images or classes, and again in the backward pass.

Prompts come in two kinds. Replaced prompts (MmAP, VPT-deep) are new in each of the first K' layers and gone after
them; words keep their positions. Carried prompts (CoOp: K' = 1; MaPLe: K' = 9) are tokens of the input: they take
positions, words after them shift, and those of layer K' go on through the layers after it.

Dimensions: T tasks, B images (task by task), R = ΣC class rows (task by task), L tokens, K layers, D width, b prompts.
Attention does not depend on the order of its keys; the mask alone says who sees them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.clip.class_tokens import ClassTokens, Tokenizer, counts_between
from pipeline.errors import UserError

Layer = Callable[[torch.Tensor], torch.Tensor]
"""A module that is called with rows (N, L, D) or (N, D)."""


class Attention(Protocol):
    """torch's MultiheadAttention, as far as it is used here."""

    embed_dim: int
    num_heads: int
    in_proj_weight: torch.Tensor
    in_proj_bias: torch.Tensor
    out_proj: Layer
    in_proj_update: Callable[[torch.Tensor, slice], torch.Tensor]
    """There only if a method put it there: normed rows, parts as of `_project` → what is added to them."""


class Mlp(Protocol):
    c_fc: nn.Linear
    gelu: Layer
    c_proj: Layer


class Block(Protocol):
    """open_clip's ResidualAttentionBlock, as far as it is used here."""

    ln_1: Layer
    attn: Attention
    ls_1: Layer
    ln_2: Layer
    mlp: Mlp
    ls_2: Layer


class Transformer(Protocol):
    resblocks: Sequence[Block]


class ImageTower(Protocol):
    """open_clip's VisionTransformer, as far as it is used here."""

    conv1: nn.Conv2d
    positional_embedding: torch.Tensor
    ln_pre: Layer
    transformer: Transformer
    ln_post: Layer
    proj: torch.Tensor
    image_size: tuple[int, int]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    def _embeds(self, images: torch.Tensor) -> torch.Tensor: ...


class TextTower(Protocol):
    """open_clip's TextTransformer, or its CLIP that has these parts itself, as far as it is used here."""

    token_embedding: nn.Embedding
    positional_embedding: torch.Tensor
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: torch.Tensor | nn.Linear | None


class ClipTowers(nn.Module):
    """Towers of an open_clip model, frozen; a method that trains their weights takes a `trainable_copy`.

    Args:
        model: open_clip `CLIP` or `CustomTextCLIP` with plain ViT and causal text towers.
        tokenizer: the model's tokenizer.
        text_prompt_position: text prompts stand after the start token, which then does not see them, or before it.
        activation_memory_gib: what each tower may keep for its backward pass, GiB.

    Raises:
        UserError: the model has parts that prompts cannot be put into exactly.
    """

    logit_scale: torch.Tensor
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        text_prompt_position: str = "after_sos",
        activation_memory_gib: float = math.inf,
    ):
        super().__init__()
        _refuse_unsupported(model, getattr(model, "text", model))
        visual, text = cast(ImageTower, model.visual), cast(TextTower, getattr(model, "text", model))  # as just found
        self.visual = visual
        self.text_blocks = text.transformer.resblocks
        self.token_embedding = text.token_embedding
        self.text_positions = text.positional_embedding
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.logit_scale = cast(torch.Tensor, model.logit_scale)
        self.tokenizer = tokenizer
        self.prompts_before_sos = text_prompt_position == "before_sos"
        self.activation_memory_gib = activation_memory_gib
        self.fingerprint: str | None = None
        """Of the weights before any were cast."""
        self.image_size = visual.image_size[0]
        for name, value in (("mean", visual.image_mean), ("std", visual.image_std)):
            self.register_buffer(f"pixel_{name}", torch.tensor(value)[:, None, None] * 255, persistent=False)
        self.requires_grad_(False).eval()

    @property
    def vision_width(self) -> int:
        return self.visual.conv1.out_channels

    @property
    def text_width(self) -> int:
        return self.token_embedding.embedding_dim

    @property
    def embed_dim(self) -> int:
        """Of a feature."""
        return self.visual.proj.shape[1]

    @property
    def vision_blocks(self) -> Sequence[Block]:
        return self.visual.transformer.resblocks

    @property
    def vision_depth(self) -> int:
        return len(self.vision_blocks)

    @property
    def text_depth(self) -> int:
        return len(self.text_blocks)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def cast_weights_to_bfloat16(self) -> None:
        """For frozen towers under autocast, which does not keep its casts of frozen weights: the same numbers, without
        casting every matrix again in every step. LayerNorms and embeddings stay as they are."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)
            elif isinstance(module, nn.MultiheadAttention):
                for parameter in (module.in_proj_weight, module.in_proj_bias):
                    parameter.data = parameter.data.to(torch.bfloat16)
        for projection in (self.visual.proj, self.text_projection):
            if isinstance(projection, nn.Parameter):
                projection.data = projection.data.to(torch.bfloat16)

    def trainable_copy(self, trains: Callable[[str], bool] = lambda name: False) -> ClipTowers:
        """Towers for a method to have as a module. The weights whose names `trains` takes are copied and are its
        parameters and state dict; the others are buffers, which share these towers' memory."""
        towers = copy.deepcopy(self, {id(kept): kept for kept in (*self.parameters(), self.tokenizer)})
        for path, module in towers.named_modules():
            for name, value in list(module._parameters.items()):
                if value is None:
                    continue
                del module._parameters[name]
                if trains(f"{path}.{name}".lstrip(".")):
                    module.register_parameter(name, nn.Parameter(value.detach().clone()))
                else:
                    module.register_buffer(name, value.detach(), persistent=False)
        return towers

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in [0, 255], uint8 or float → standardized by the model's mean and deviation."""
        return ((pixels - self.pixel_mean) / self.pixel_std).to(self.visual.conv1.weight.dtype)

    def encode_image(
        self,
        images: torch.Tensor,
        prompts: torch.Tensor | None = None,
        images_per_task: Sequence[int] = (),
        propagate: bool = False,
    ) -> torch.Tensor:
        """Features (B, E), not normalized.

        Args:
            images: (B, 3, H, W), standardized, task by task.
            prompts: (T, K', b, D) for the first K' layers; images of task t see prompts[t]. None: CLIP as it is.
            images_per_task: T counts, ΣB.
            carried: the prompts are tokens of the input, normed like patches, and those of layer K' go on after it.
        """
        if prompts is not None and propagate:
            prompts = torch.cat([self.visual.ln_pre(prompts[:, :1]), prompts[:, 1:]], dim=1)
        replaced = _deep_prompt_kv(self.vision_blocks, prompts, propagate)
        last_prompted = -1 if prompts is None else prompts.shape[1] - 1

        def encode(start: int, stop: int) -> torch.Tensor:
            counts = counts_between(images_per_task, start, stop)
            x = self.visual._embeds(images[start:stop])  # (B, L, D), CLS first
            for k, block in enumerate(self.vision_blocks):
                if prompts is not None and propagate and k == last_prompted:
                    x = torch.cat([x, _repeat_per_row(prompts[:, k], counts)], dim=1)
                h = block.ln_1(x)
                keys_values = _keys_values(block, h)
                if k < len(replaced):
                    keys_values = _prepend_task_kv(replaced[k], counts, keys_values)
                if k == self.vision_depth - 1:
                    x, h = x[:, :1], h[:, :1]
                x = _attend_and_mlp(block, x, h, keys_values)
            return self.visual.ln_post(x[:, 0]) @ self.visual.proj

        num_prompts = 0 if prompts is None else prompts.shape[2]
        num_tokens = len(self.visual.positional_embedding) + (num_prompts if propagate else 0)
        bytes_per_image = self._activation_bytes(self.vision_blocks, num_tokens, num_tokens + num_prompts)
        return self._checkpointed_chunks(encode, len(images), bytes_per_image)

    def encode_text(
        self,
        tokens: ClassTokens,
        prompts: torch.Tensor | None = None,
        propagate: bool = False,
        suffix_embeddings: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features (R, E) of all texts of all tasks' classes, task by task, not normalized.

        Args:
            tokens: the classes of T tasks.
            prompts: (T, K', b, D) for the first K' layers; classes of task t see prompts[t]. None: CLIP as it is.
            carried: the prompts are tokens of the input, with positions, and those of layer K' go on after it.
            suffix_embeddings: (R, S, D) of the tokens' suffix, without positions. None: CLIP's own.
        """
        if suffix_embeddings is None:
            suffix_embeddings = self.token_embedding(tokens.suffix)
        shared = self._shared_keys_values(tokens, prompts, propagate)
        before = tokens.prefix.shape[1] + (prompts.shape[2] if prompts is not None and propagate else 0)
        num_suffix = tokens.suffix.shape[1]
        positions = self.text_positions[before : before + num_suffix]
        causal = torch.ones(num_suffix, num_suffix, dtype=torch.bool, device=self.device).tril()
        num_shared = [keys_values.shape[1] for keys_values in shared]
        masks = {number: F.pad(causal, (number, 0), value=True) for number in set(num_shared)}  # (S, keys)

        def encode(start: int, stop: int) -> torch.Tensor:
            counts = counts_between(tokens.rows_per_task, start, stop)
            eot, rows = tokens.eot[start:stop], torch.arange(stop - start, device=self.device)
            x = suffix_embeddings[start:stop] + positions  # (R, S, D)
            for k, block in enumerate(self.text_blocks):
                h = block.ln_1(x)
                keys_values = _prepend_task_kv(shared[k], counts, _keys_values(block, h))
                mask = masks[num_shared[k]]
                if k == self.text_depth - 1:
                    x, h, mask = x[rows, eot, None], h[rows, eot, None], mask[eot][:, None, None]
                x = _attend_and_mlp(block, x, h, keys_values, mask)
            z: torch.Tensor = self.ln_final(x[:, 0])
            if self.text_projection is None:
                return z
            if isinstance(self.text_projection, nn.Linear):
                projected: torch.Tensor = self.text_projection(z)
                return projected
            return z @ self.text_projection

        bytes_per_class = self._activation_bytes(self.text_blocks, num_suffix, num_suffix + max(num_shared))
        return self._checkpointed_chunks(encode, len(tokens.suffix), bytes_per_class)

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Cosine similarities over CLIP's temperature (Eq. 5): (B, E), (C, E) → float32 or float64 (B, C)."""
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        x = F.normalize(image_features.to(dtype), dim=-1)
        z = F.normalize(text_features.to(dtype), dim=-1)
        return self.logit_scale.exp() * x @ z.T

    def _shared_keys_values(
        self, tokens: ClassTokens, prompts: torch.Tensor | None, propagate: bool
    ) -> list[torch.Tensor]:
        """Of each text layer: keys and values (T, L, 2 D) of what all classes of a task see: the start token, the
        shared words, and the prompts."""
        x = self.token_embedding(tokens.prefix)  # (T, P, D)
        at = 0 if self.prompts_before_sos else 1
        if prompts is not None and propagate:
            behind = at + prompts.shape[2]
            positions = self.text_positions[: prompts.shape[2] + x.shape[1]]
            x = x + torch.cat([positions[:at], positions[behind:]])
            prompts = torch.cat([prompts[:, :1] + positions[at:behind], prompts[:, 1:]], dim=1)
        else:
            x = x + self.text_positions[: x.shape[1]]
        replaced = _deep_prompt_kv(self.text_blocks, prompts, propagate)
        last_prompted = -1 if prompts is None else prompts.shape[1] - 1
        shared = []
        for k, block in enumerate(self.text_blocks):
            if prompts is not None and propagate and k == last_prompted:
                x = torch.cat([x[:, :at], prompts[:, k], x[:, at:]], dim=1)
            h = block.ln_1(x)
            keys_values = _keys_values(block, h)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=self.device).tril()
            if k < len(replaced):
                num_prompts = replaced[k].shape[1]
                keys_values = torch.cat([replaced[k], keys_values], dim=1)
                mask = F.pad(mask, (num_prompts, 0), value=True)  # words see the prompts
                if not self.prompts_before_sos:
                    mask[0, :num_prompts] = False  # and the start token does not
            shared.append(keys_values)
            if k < self.text_depth - 1:
                x = _attend_and_mlp(block, x, h, keys_values, mask)
        return shared

    def _activation_bytes(self, blocks: Sequence[Block], num_tokens: int, num_keys: int) -> int:
        """Bytes that a row of `num_tokens` tokens, whose queries see `num_keys` keys, keeps for its backward pass, or
        where there is none, needs at once: less than two layers' worth."""
        width, hidden = blocks[0].attn.embed_dim, blocks[0].mlp.c_fc.out_features
        dtype = self.ln_final.weight.dtype
        itemsize = 2 if torch.is_autocast_enabled(self.device.type) else dtype.itemsize
        norms = 2 * num_tokens * width * dtype.itemsize
        rest = num_tokens * (2 * width + hidden) + 2 * num_keys * width  # query, attended, MLP; keys, values
        if any(p.requires_grad for block in blocks for p in (block.attn.in_proj_weight, block.mlp.c_fc.weight)):
            rest += num_tokens * (3 * width + hidden)  # the inputs of trained matrices
        elif any(hasattr(block.attn, "in_proj_update") for block in blocks):
            rest += 2 * num_tokens * width  # its inputs
        return (norms + rest * itemsize) * (len(blocks) if torch.is_grad_enabled() else 2)

    def _checkpointed_chunks(
        self, encode: Callable[[int, int], torch.Tensor], num_rows: int, bytes_per_row: int
    ) -> torch.Tensor:
        """encode(0, num_rows), in as few equal chunks as fit `activation_memory_gib`, recomputed backwards."""
        rows_per_chunk = math.floor(min(num_rows, self.activation_memory_gib * 2**30 / bytes_per_row))
        num_chunks = math.ceil(num_rows / max(rows_per_chunk, 1))
        if num_chunks <= 1:
            return encode(0, num_rows)
        bounds = [num_rows * chunk // num_chunks for chunk in range(num_chunks + 1)]
        # Without a graph, checkpoint() just calls.
        return torch.cat(
            [
                checkpoint(encode, start, stop, use_reentrant=False, preserve_rng_state=False)
                for start, stop in zip(bounds, bounds[1:])
            ]
        )


def _deep_prompt_kv(blocks: Sequence[Block], prompts: torch.Tensor | None, propagate: bool) -> list[torch.Tensor]:
    """Keys and values (T, b, 2 D) of the prompts (T, K', b, D) in each layer whose successor replaces or drops them."""
    if prompts is None:
        return []
    num_replaced = prompts.shape[1] - propagate
    return [_keys_values(blocks[k], blocks[k].ln_1(prompts[:, k])) for k in range(num_replaced)]


def _keys_values(block: Block, h: torch.Tensor) -> torch.Tensor:
    """Keys and values (N, L, 2 D) of normed rows h (N, L, D)."""
    return _project(block.attn, h, slice(1, 3))


def _project(attention: Attention, h: torch.Tensor, parts: slice) -> torch.Tensor:
    """Of normed rows h (N, L, D): those of query (0), key (1) and value (2) that are asked for, side by side."""
    rows = slice(parts.start * h.shape[-1], parts.stop * h.shape[-1])
    projected = F.linear(h, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    if hasattr(attention, "in_proj_update"):  # a method's
        projected = projected + attention.in_proj_update(h, parts)
    return projected


def _prepend_task_kv(per_task: torch.Tensor, rows_per_task: Sequence[int], own: torch.Tensor) -> torch.Tensor:
    """Each row's own keys and values behind those of its task."""
    return torch.cat([_repeat_per_row(per_task, rows_per_task), own], dim=1)


def _attend_and_mlp(
    block: Block, x: torch.Tensor, h: torch.Tensor, keys_values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The rest of a residual block for the rows x (N, L, D), h = ln_1(x), given all keys and values (N, n, 2 D)."""
    attention = block.attn
    query = _project(attention, h, slice(0, 1))
    query, key, value = (
        rows.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for rows in (query, *keys_values.chunk(2, dim=-1))
    )  # (N, heads, L or n, D / heads)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    attended = attended.transpose(1, 2).flatten(2)  # (N, L, D)
    x = x + block.ls_1(attention.out_proj(attended))
    return x + block.ls_2(_mlp(block.mlp, block.ln_2(x)))


def _mlp(mlp: Mlp, h: torch.Tensor) -> torch.Tensor:
    h = mlp.c_fc(h)
    if type(mlp.gelu).__name__ == "QuickGELU":
        # x sigmoid(1.702 x), as open_clip's own, but half the memory for the backward pass.
        h = F.silu(h.mul_(1.702)).div_(1.702)
    else:
        h = mlp.gelu(h)
    return mlp.c_proj(h)


def _repeat_per_row(per_task: torch.Tensor, rows_per_task: Sequence[int]) -> torch.Tensor:
    """(T, ...) → (Σ rows, ...). Expanding, unlike indexing, has a backward pass that adds in a fixed order."""
    rows = [task.expand(count, *task.shape) for task, count in zip(per_task, rows_per_task, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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
