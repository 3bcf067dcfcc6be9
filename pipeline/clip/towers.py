"""The two towers of CLIP with prompts (Eqs. 9-10), frozen or trained, without the computations that have no effect.

What a reference implementation computes and discards is left out:
- a prompt that the next layer replaces needs only keys and values in its own layer: no query, no MLP;
- text under a causal mask: tokens after EOT have no effect; start token, propagated prompts and shared words run once
  per task, and the classes attend to their keys and values;
- in the last layer only the row of which the feature is made needs a query and an MLP;
- what exceeds `activation_memory_gib` runs in chunks of images or classes, recomputed in the backward pass.

Two kinds of prompts: replaced (deep) prompts (MmAP, VPT-deep) are new in each of the first K' layers and gone after
them; words keep their positions. Propagated prompts (CoOp: K' = 1; MaPLe: K' = 9) are tokens of the input: they take
positions, words after them shift, and those of layer K' go on through the layers after it.

What differs from one family of towers to the next is in `pipeline/clip/families`.

Dimensions: T tasks, B images (task by task), R = ΣC class rows (task by task), L tokens, K layers, D width, b prompts.
Attention does not depend on the order of its keys; only the mask decides which are seen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.clip.blocks import Block
from pipeline.clip.chunks import checkpointed_chunks, measured_activation_bytes
from pipeline.clip.class_tokens import ClassTokens
from pipeline.clip.families import describe_image_tower, describe_text_tower
from pipeline.clip.families.base import UnsupportedTower
from pipeline.clip.image_encoder import encode_prompted_image
from pipeline.clip.text_encoder import TextEncoder
from pipeline.clip.tokenizer import describe_tokenizer
from pipeline.data.preprocessing import Preprocessing
from pipeline.errors import UserError


class ClipTowers(nn.Module):
    """Frozen towers of an open_clip model; a method that trains their weights takes a `trainable_copy`.

    Args:
        model: open_clip `CLIP` or `CustomTextCLIP`.
        tokenizer: the model's tokenizer, of `open_clip.get_tokenizer`.
        preprocessing: how images become the model's input.
        text_prompt_position: after_sos (the start token does not see the prompts) or before_sos.
        activation_memory_gib: limit in GiB of what each tower keeps for its backward pass.

    Raises:
        UserError: no family of `pipeline/clip/families` describes the text tower, or not with this tokenizer.
    """

    logit_scale: torch.Tensor
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenizer: object,
        preprocessing: Preprocessing,
        text_prompt_position: str = "after_sos",
        activation_memory_gib: float = math.inf,
    ):
        super().__init__()
        self.visual = cast(nn.Module, model.visual)
        self.image_tower = describe_image_tower(model.visual)
        try:
            self.text, self.text_tower = describe_text_tower(model)
            sees_padding = not self.text_tower.causal and not self.text_tower.masks_padding
            self.tokenizer = describe_tokenizer(tokenizer, pad_to_context=sees_padding)
            self.text_tower.check_tokenizer(self.tokenizer)
        except UnsupportedTower as error:
            raise UserError(
                f"clip.model: this {type(model).__name__} cannot be used: {error}. Use another, such as "
                "ViT-B-16-quickgelu or ViT-B-32; mmap-clip list-models lists all"
            ) from None
        self.logit_scale = cast(torch.Tensor, model.logit_scale)
        self.prompts_before_sos = text_prompt_position == "before_sos"
        self.activation_memory_gib = activation_memory_gib
        self.fingerprint: str | None = None
        """Fingerprint of the weights before any cast."""
        self.preprocessing = preprocessing
        for name, value in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            self.register_buffer(f"pixel_{name}", torch.tensor(value)[:, None, None] * 255, persistent=False)
        self._black_box_bytes: dict[bool, int] = {}
        self.requires_grad_(False).eval()

    @property
    def takes_image_prompts(self) -> bool:
        """True if the image tower has layers that take prompts."""
        return len(self.vision_blocks) > 0

    @property
    def vision_width(self) -> int:
        return self.vision_blocks[0].width

    @property
    def text_width(self) -> int:
        return self.token_embedding.embedding_dim

    @property
    def embed_dim(self) -> int:
        """Width E of the features."""
        return self.text_tower.output_dim

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.text_tower.token_embedding

    @property
    def vision_blocks(self) -> Sequence[Block]:
        return self.image_tower.blocks

    @property
    def text_blocks(self) -> Sequence[Block]:
        return self.text_tower.blocks

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
        """Cast frozen matrices once: autocast would cast each of them in every step, with the same results. Norms and
        embeddings stay as they are."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(torch.bfloat16)
            elif isinstance(module, nn.MultiheadAttention):
                for parameter in (module.in_proj_weight, module.in_proj_bias):
                    parameter.data = parameter.data.to(torch.bfloat16)
        for projection in (getattr(self.visual, "proj", None), getattr(self.text, "text_projection", None)):
            if isinstance(projection, nn.Parameter):
                projection.data = projection.data.to(torch.bfloat16)

    def trainable_copy(self, is_trained: Callable[[nn.Module, str], bool] = lambda module, name: False) -> ClipTowers:
        """Return towers to use as a method's module: the parameters, of a module and by their name in it, that
        `is_trained` accepts are copied and make up its parameters and state dict; the others are buffers that share
        these towers' memory."""
        towers = copy.deepcopy(self, {id(shared): shared for shared in (*self.parameters(), self.tokenizer)})
        for module in towers.modules():
            for name, value in list(module._parameters.items()):
                if value is None:
                    continue
                del module._parameters[name]
                if is_trained(module, name):
                    module.register_parameter(name, nn.Parameter(value.detach().clone()))
                else:
                    module.register_buffer(name, value.detach(), persistent=False)
        return towers

    def without_text(self) -> ClipTowers:
        """Return towers that share this image tower and have no other, and run any batch at once: for tracing."""
        towers = copy.copy(self)
        towers._modules = {"visual": self.visual}
        towers.activation_memory_gib = math.inf
        return towers

    def merged_state(self) -> dict[str, torch.Tensor]:
        """Return the weights by their names in these towers, with the methods' updates of projections merged."""
        state = dict(chain(self.named_parameters(), self.named_buffers()))
        names = {id(value): name for name, value in state.items()}
        for block in (*self.vision_blocks, *self.text_blocks):
            for weight, merged in zip(block.in_proj_weights(), block.merged_in_proj_weights()):
                state[names[id(weight)]] = merged
        return state

    def normalize_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Standardize pixels (B, 3, H, W) in [0, 255], uint8 or float, by the model's mean and standard deviation."""
        patches = next(module for module in self.visual.modules() if isinstance(module, nn.Conv2d))
        return ((pixels - self.pixel_mean) / self.pixel_std).to(patches.weight.dtype)

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
        if self.takes_image_prompts:
            return encode_prompted_image(
                self.image_tower,
                images,
                prompts,
                images_per_task,
                propagate,
                self.activation_memory_gib,
                prototype=self.logit_scale,
            )
        assert prompts is None, "the plan refuses methods with image prompts"
        keeps_graph = torch.is_grad_enabled()
        if keeps_graph not in self._black_box_bytes:
            self._black_box_bytes[keeps_graph] = measured_activation_bytes(self.visual, images[:1])
        return checkpointed_chunks(
            lambda start, stop: cast(torch.Tensor, self.visual(images[start:stop])),
            images.shape[0],
            self._black_box_bytes[keeps_graph],
            self.activation_memory_gib,
        )

    def encode_text(
        self,
        tokens: ClassTokens,
        prompts: torch.Tensor | None = None,
        propagate: bool = False,
        suffix_embeddings: torch.Tensor | None = None,
        class_prompts: tuple[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return text features (R, E) of all tasks' classes, task by task, not normalized.

        Args:
            tokens: the classes of T tasks.
            prompts: (T, K', b, D) for the first K' layers; classes of task t see prompts[t]. None: unmodified CLIP.
            propagate: the prompts are tokens of the input, with positions, and those of layer K' go on after it.
            suffix_embeddings: (R, S, D) of the tokens' suffix, without positions. None: CLIP's own.
            class_prompts: index of a layer, and prompts (R, b, D) of each row, which replace the propagated prompts
                before that layer.
        """
        if suffix_embeddings is None:
            suffix_embeddings = self.token_embedding(tokens.suffix)
        encoder = TextEncoder(
            self.text_tower, self.prompts_before_sos, self.activation_memory_gib, prototype=self.logit_scale
        )
        return encoder.encode(tokens, prompts, propagate, suffix_embeddings, class_prompts)

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Return cosine similarities over CLIP's temperature (Eq. 5): (B, E), (C, E) → float32 or float64 (B, C)."""
        dtype = torch.promote_types(self.logit_scale.dtype, torch.float32)
        x = F.normalize(image_features.to(dtype), dim=-1)
        z = F.normalize(text_features.to(dtype), dim=-1)
        return self.logit_scale.exp() * x @ z.T
