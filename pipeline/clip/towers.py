"""The two towers of CLIP with prompts (Eqs. 9-10), frozen or trained, without the computations that have no effect.

What a reference implementation computes and discards is left out:
- a prompt that the next layer replaces needs only keys and values in its own layer: no query, no MLP;
- text: tokens after EOT have no effect; start token, propagated prompts and shared words run once per task, and the
  classes attend to their keys and values;
- in the last layer only the CLS or EOT row needs a query and an MLP;
- what exceeds `activation_memory_gib` runs in chunks of images or classes, recomputed in the backward pass.

Two kinds of prompts: replaced (deep) prompts (MmAP, VPT-deep) are new in each of the first K' layers and gone after
them; words keep their positions. Propagated prompts (CoOp: K' = 1; MaPLe: K' = 9) are tokens of the input: they take
positions, words after them shift, and those of layer K' go on through the layers after it.

Dimensions: T tasks, B images (task by task), R = ΣC class rows (task by task), L tokens, K layers, D width, b prompts.
Attention does not depend on the order of its keys; only the mask decides which are seen.
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

from pipeline.clip.class_tokens import ClassTokens, Tokenizer, counts_in_range
from pipeline.errors import UserError

Layer = Callable[[torch.Tensor], torch.Tensor]
"""A module called with rows (N, L, D) or (N, D)."""


class Attention(Protocol):
    """The part of torch's MultiheadAttention that is used here."""

    embed_dim: int
    num_heads: int
    in_proj_weight: torch.Tensor
    in_proj_bias: torch.Tensor
    out_proj: Layer
    in_proj_update: Callable[[torch.Tensor, slice], torch.Tensor]
    """Set only by a method: normed rows and parts, as of `_project` → what is added to their projection."""


class Mlp(Protocol):
    c_fc: nn.Linear
    gelu: Layer
    c_proj: Layer


class Block(Protocol):
    """The part of open_clip's ResidualAttentionBlock that is used here."""

    ln_1: Layer
    attn: Attention
    ls_1: Layer
    ln_2: Layer
    mlp: Mlp
    ls_2: Layer


class Transformer(Protocol):
    resblocks: Sequence[Block]


class ImageTower(Protocol):
    """The part of open_clip's VisionTransformer that is used here."""

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
    """The part of open_clip's TextTransformer, or of a CLIP without one, that is used here."""

    token_embedding: nn.Embedding
    positional_embedding: torch.Tensor
    transformer: Transformer
    ln_final: nn.LayerNorm
    text_projection: torch.Tensor | nn.Linear | None


class ClipTowers(nn.Module):
    """Frozen towers of an open_clip model; a method that trains their weights takes a `trainable_copy`.

    Args:
        model: open_clip `CLIP` or `CustomTextCLIP` with plain ViT and causal text towers.
        tokenizer: the model's tokenizer.
        text_prompt_position: after_sos (the start token does not see the prompts) or before_sos.
        activation_memory_gib: limit in GiB of what each tower keeps for its backward pass.

    Raises:
        UserError: the model has parts that cannot take prompts exactly.
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
        _check_supported(model, getattr(model, "text", model))
        visual, text = cast(ImageTower, model.visual), cast(TextTower, getattr(model, "text", model))  # checked above
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
        """Fingerprint of the weights before any cast."""
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
        """Width E of the features."""
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
        """Cast frozen matrices once: autocast would cast each of them in every step, with the same results. LayerNorms
        and embeddings stay as they are."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)
            elif isinstance(module, nn.MultiheadAttention):
                for parameter in (module.in_proj_weight, module.in_proj_bias):
                    parameter.data = parameter.data.to(torch.bfloat16)
        for projection in (self.visual.proj, self.text_projection):
            if isinstance(projection, nn.Parameter):
                projection.data = projection.data.to(torch.bfloat16)

    def trainable_copy(self, is_trained: Callable[[str], bool] = lambda name: False) -> ClipTowers:
        """Return towers to use as a method's module: those whose names `is_trained` accepts are copied and make up its
        parameters and state dict; the others are buffers that share these towers' memory."""
        towers = copy.deepcopy(self, {id(shared): shared for shared in (*self.parameters(), self.tokenizer)})
        for path, module in towers.named_modules():
            for name, value in list(module._parameters.items()):
                if value is None:
                    continue
                del module._parameters[name]
                if is_trained(f"{path}.{name}".lstrip(".")):
                    module.register_parameter(name, nn.Parameter(value.detach().clone()))
                else:
                    module.register_buffer(name, value.detach(), persistent=False)
        return towers

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Standardize pixels (B, 3, H, W) in [0, 255], uint8 or float, by the model's mean and standard deviation."""
        return ((pixels - self.pixel_mean) / self.pixel_std).to(self.visual.conv1.weight.dtype)

    def encode_image(
        self,
        images: torch.Tensor,
        prompts: torch.Tensor | None = None,
        images_per_task: Sequence[int] = (),
        propagate: bool = False,
    ) -> torch.Tensor:
        """Return image features (B, E), not normalized.

        Args:
            images: (B, 3, H, W), standardized, task by task.
            prompts: (T, K', b, D) for the first K' layers; images of task t see prompts[t]. None: unmodified CLIP.
            images_per_task: T counts, ΣB.
            propagate: the prompts are tokens of the input, normed like patches, and those of layer K' go on after it.
        """
        if prompts is not None and propagate:
            prompts = torch.cat([self.visual.ln_pre(prompts[:, :1]), prompts[:, 1:]], dim=1)
        replaced = _deep_prompt_kv(self.vision_blocks, prompts, propagate)
        last_prompted = -1 if prompts is None else prompts.shape[1] - 1

        def encode(start: int, stop: int) -> torch.Tensor:
            counts = counts_in_range(images_per_task, start, stop)
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
        """Return text features (R, E) of all tasks' classes, task by task, not normalized.

        Args:
            tokens: the classes of T tasks.
            prompts: (T, K', b, D) for the first K' layers; classes of task t see prompts[t]. None: unmodified CLIP.
            propagate: the prompts are tokens of the input, with positions, and those of layer K' go on after it.
            suffix_embeddings: (R, S, D) of the tokens' suffix, without positions. None: CLIP's own.
        """
        if suffix_embeddings is None:
            suffix_embeddings = self.token_embedding(tokens.suffix)
        shared = self._shared_keys_values(tokens, prompts, propagate)
        offset = tokens.prefix.shape[1] + (prompts.shape[2] if prompts is not None and propagate else 0)
        num_suffix = tokens.suffix.shape[1]
        positions = self.text_positions[offset : offset + num_suffix]
        causal = torch.ones(num_suffix, num_suffix, dtype=torch.bool, device=self.device).tril()
        num_shared = [keys_values.shape[1] for keys_values in shared]
        masks = {count: F.pad(causal, (count, 0), value=True) for count in set(num_shared)}  # (S, keys)

        def encode(start: int, stop: int) -> torch.Tensor:
            counts = counts_in_range(tokens.rows_per_task, start, stop)
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
        """Return cosine similarities over CLIP's temperature (Eq. 5): (B, E), (C, E) → float32 or float64 (B, C)."""
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        x = F.normalize(image_features.to(dtype), dim=-1)
        z = F.normalize(text_features.to(dtype), dim=-1)
        return self.logit_scale.exp() * x @ z.T

    def _shared_keys_values(
        self, tokens: ClassTokens, prompts: torch.Tensor | None, propagate: bool
    ) -> list[torch.Tensor]:
        """Return, for each text layer, keys and values (T, L, 2 D) of what all classes of a task see: the start token,
        the shared words, and the prompts."""
        x = self.token_embedding(tokens.prefix)  # (T, P, D)
        start = 0 if self.prompts_before_sos else 1
        if prompts is not None and propagate:
            stop = start + prompts.shape[2]
            positions = self.text_positions[: prompts.shape[2] + x.shape[1]]
            x = x + torch.cat([positions[:start], positions[stop:]])
            prompts = torch.cat([prompts[:, :1] + positions[start:stop], prompts[:, 1:]], dim=1)
        else:
            x = x + self.text_positions[: x.shape[1]]
        replaced = _deep_prompt_kv(self.text_blocks, prompts, propagate)
        last_prompted = -1 if prompts is None else prompts.shape[1] - 1
        shared = []
        for k, block in enumerate(self.text_blocks):
            if prompts is not None and propagate and k == last_prompted:
                x = torch.cat([x[:, :start], prompts[:, k], x[:, start:]], dim=1)
            h = block.ln_1(x)
            keys_values = _keys_values(block, h)
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=self.device).tril()
            if k < len(replaced):
                num_prompts = replaced[k].shape[1]
                keys_values = torch.cat([replaced[k], keys_values], dim=1)
                mask = F.pad(mask, (num_prompts, 0), value=True)  # words see the prompts
                if not self.prompts_before_sos:
                    mask[0, :num_prompts] = False  # the start token does not
            shared.append(keys_values)
            if k < self.text_depth - 1:
                x = _attend_and_mlp(block, x, h, keys_values, mask)
        return shared

    def _activation_bytes(self, blocks: Sequence[Block], num_tokens: int, num_keys: int) -> int:
        """Return the bytes that a row of `num_tokens` tokens, whose queries see `num_keys` keys, keeps for its backward
        pass or, without one, needs at a time: less than two layers' worth."""
        width, hidden = blocks[0].attn.embed_dim, blocks[0].mlp.c_fc.out_features
        dtype = self.ln_final.weight.dtype
        itemsize = 2 if torch.is_autocast_enabled(self.device.type) else dtype.itemsize
        norms = 2 * num_tokens * width * dtype.itemsize
        values = num_tokens * (2 * width + hidden) + 2 * num_keys * width  # query, attended, MLP; keys, values
        if any(p.requires_grad for block in blocks for p in (block.attn.in_proj_weight, block.mlp.c_fc.weight)):
            values += num_tokens * (3 * width + hidden)  # inputs of the trained matrices
        elif any(hasattr(block.attn, "in_proj_update") for block in blocks):
            values += 2 * num_tokens * width  # its inputs
        return (norms + values * itemsize) * (len(blocks) if torch.is_grad_enabled() else 2)

    def _checkpointed_chunks(
        self, encode: Callable[[int, int], torch.Tensor], num_rows: int, bytes_per_row: int
    ) -> torch.Tensor:
        """Return encode(0, num_rows), in as few equal chunks as fit `activation_memory_gib`, recomputed backwards."""
        rows_per_chunk = math.floor(min(num_rows, self.activation_memory_gib * 2**30 / bytes_per_row))
        num_chunks = math.ceil(num_rows / max(rows_per_chunk, 1))
        if num_chunks <= 1:
            return encode(0, num_rows)
        bounds = [num_rows * chunk // num_chunks for chunk in range(num_chunks + 1)]
        # Without a graph, checkpoint() only calls.
        return torch.cat(
            [
                checkpoint(encode, start, stop, use_reentrant=False, preserve_rng_state=False)
                for start, stop in zip(bounds, bounds[1:])
            ]
        )


def _deep_prompt_kv(blocks: Sequence[Block], prompts: torch.Tensor | None, propagate: bool) -> list[torch.Tensor]:
    """Return keys and values (T, b, 2 D) of prompts (T, K', b, D) in each layer after which they end."""
    if prompts is None:
        return []
    num_replaced = prompts.shape[1] - propagate
    return [_keys_values(blocks[k], blocks[k].ln_1(prompts[:, k])) for k in range(num_replaced)]


def _keys_values(block: Block, h: torch.Tensor) -> torch.Tensor:
    """Project normed rows h (N, L, D) to keys and values (N, L, 2 D)."""
    return _project(block.attn, h, slice(1, 3))


def _project(attention: Attention, h: torch.Tensor, parts: slice) -> torch.Tensor:
    """Project normed rows h (N, L, D) to the given parts of query (0), key (1) and value (2), concatenated."""
    rows = slice(parts.start * h.shape[-1], parts.stop * h.shape[-1])
    projected = F.linear(h, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    if hasattr(attention, "in_proj_update"):  # set by a method
        projected = projected + attention.in_proj_update(h, parts)
    return projected


def _prepend_task_kv(task_kv: torch.Tensor, rows_per_task: Sequence[int], row_kv: torch.Tensor) -> torch.Tensor:
    """Concatenate each row's keys and values to those of its task."""
    return torch.cat([_repeat_per_row(task_kv, rows_per_task), row_kv], dim=1)


def _attend_and_mlp(
    block: Block, x: torch.Tensor, h: torch.Tensor, keys_values: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply a residual block to rows x (N, L, D) with h = ln_1(x), given all keys and values (N, n, 2 D)."""
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
        # x sigmoid(1.702 x), as open_clip's, with half the memory for the backward pass.
        h = F.silu(h.mul_(1.702)).div_(1.702)
    else:
        h = mlp.gelu(h)
    return mlp.c_proj(h)


def _repeat_per_row(per_task: torch.Tensor, rows_per_task: Sequence[int]) -> torch.Tensor:
    """(T, ...) → (Σ rows, ...). The backward pass of expand, unlike that of indexing, adds in a fixed order."""
    rows = [task.expand(count, *task.shape) for task, count in zip(per_task, rows_per_task, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _check_supported(model: nn.Module, text: nn.Module) -> None:
    visual = model.visual
    size = getattr(visual, "image_size", 0)
    blocks = [
        *getattr(getattr(visual, "transformer", None), "resblocks", []),
        *getattr(getattr(text, "transformer", None), "resblocks", []),
    ]
    pool_type = getattr(text, "text_pool_type", None) or getattr(text, "pool_type", None)
    reasons = {
        "the image tower is not open_clip's VisionTransformer": type(visual).__name__ != "VisionTransformer",
        "the image feature is not the CLS token": getattr(visual, "pool_type", "") != "tok"
        or getattr(visual, "attn_pool", None) is not None,
        "the image is not square": isinstance(size, tuple) and len(set(size)) != 1,
        "the text tower is not open_clip's": not hasattr(text, "token_embedding"),
        "the text tower is not causal": getattr(text, "attn_mask", None) is None,
        "the text feature is not the end-of-text token": pool_type not in ("argmax", "eos")
        or getattr(text, "cls_emb", None) is not None,
        "its blocks are not plain residual attention blocks": any(
            type(block).__name__ != "ResidualAttentionBlock" or not isinstance(block.attn, nn.MultiheadAttention)
            for block in blocks
        ),
    }
    unsupported = [reason for reason, holds in reasons.items() if holds]
    if unsupported:
        raise UserError(
            f"clip.model: this {type(model).__name__} cannot take prompts: {'; '.join(unsupported)}. "
            "Use a ViT model with a CLS token and a causal text tower, such as ViT-B-16-quickgelu, ViT-B-32, ViT-L-14"
        )
