"""The text tower with prompts, without the computations that have no effect (see `ClipTowers`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.clip.chunks import activation_bytes, checkpointed_chunks
from pipeline.clip.class_tokens import ClassTokens, counts_in_range
from pipeline.clip.families.base import TextTower
from pipeline.clip.prompt_keys import deep_prompt_kv, prepend_task_kv, repeat_per_row


@dataclass(frozen=True)
class TextEncoder:
    """Encoder of class texts.

    Args:
        prompts_before_sos: the start token sees the prompts.
        memory_gib: limit in GiB of what is kept for the backward pass.
        prototype: as of `activation_bytes`.
    """

    tower: TextTower
    prompts_before_sos: bool
    memory_gib: float
    prototype: torch.Tensor

    def encode(
        self,
        tokens: ClassTokens,
        prompts: torch.Tensor | None,
        propagate: bool,
        suffix_embeddings: torch.Tensor,
        class_prompts: tuple[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return text features (R, E); arguments as those of `ClipTowers.encode_text`."""
        encode = self._encode_causal if self.tower.causal else self._encode_bidirectional
        return encode(tokens, prompts, propagate, suffix_embeddings, class_prompts)

    def _encode_causal(
        self,
        tokens: ClassTokens,
        prompts: torch.Tensor | None,
        propagate: bool,
        suffix_embeddings: torch.Tensor,
        class_prompts: tuple[int, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Run what precedes the class names once per task, and nothing after EOT. Prompts of the rows, and the words
        that see them, run once per row."""
        tower, device = self.tower, suffix_embeddings.device
        class_layer, row_prompts = class_prompts or (len(tower.blocks), suffix_embeddings)
        shared, words = self._shared_keys_values(tokens, prompts, propagate, class_layer)
        offset = tokens.prefix.shape[1] + (prompts.shape[2] if prompts is not None and propagate else 0)
        num_suffix = tokens.suffix.shape[1]
        num_inserted = row_prompts.shape[1] + words.shape[1] if class_prompts else 0
        num_shared = [keys_values.shape[1] for keys_values in shared]
        num_rows = [num_suffix + (num_inserted if k >= class_layer else 0) for k in range(len(tower.blocks))]
        masks = {
            (count, length): F.pad(causal_mask(length, device), (count, 0), value=True)
            for count, length in set(zip(num_shared, num_rows))
        }  # (S, keys)

        def encode(start: int, stop: int) -> torch.Tensor:
            counts = counts_in_range(tokens.rows_per_task, start, stop)
            eot, rows = tokens.eot[start:stop] + num_inserted, torch.arange(stop - start, device=device)
            x = tower.embed(suffix_embeddings[start:stop], offset)  # (R, S, D)
            for k, block in enumerate(tower.blocks):
                if k == class_layer:
                    x = torch.cat([row_prompts[start:stop], repeat_per_row(words, counts), x], dim=1)
                h = block.norm(x)
                keys_values = prepend_task_kv(shared[k], counts, block.keys_values(h))
                mask = masks[num_shared[k], num_rows[k]]
                if k == len(tower.blocks) - 1:
                    x, h, mask = x[rows, eot, None], h[rows, eot, None], mask[eot][:, None, None]
                x = block.attend(x, h, keys_values, mask)
            return tower.head(x[:, 0])

        num_tokens = num_rows[-1]
        bytes_per_class = activation_bytes(tower.blocks, num_tokens, num_tokens + max(num_shared), self.prototype)
        return checkpointed_chunks(encode, len(tokens.suffix), bytes_per_class, self.memory_gib)

    def _shared_keys_values(
        self, tokens: ClassTokens, prompts: torch.Tensor | None, propagate: bool, class_layer: int
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return, for each layer, keys and values (T, L, 2 D) of what all classes of a task see: the start token, the
        shared words, and the prompts; from `class_layer` on, only of what precedes the prompts. Also return the input
        (T, L, D) of that layer for what follows them."""
        tower = self.tower
        x = tower.token_embedding(tokens.prefix)  # (T, P, D)
        start = stop = 0 if self.prompts_before_sos else 1
        if prompts is not None and propagate:
            stop += prompts.shape[2]
            x = torch.cat([tower.embed(x[:, :start], 0), tower.embed(x[:, start:], stop)], dim=1)
            prompts = torch.cat([tower.embed(prompts[:, :1], start), prompts[:, 1:]], dim=1)
        else:
            x = tower.embed(x, 0)
        replaced = deep_prompt_kv(tower.blocks, prompts, propagate)
        last_prompted = -1 if prompts is None else prompts.shape[1] - 1
        shared, words = [], x[:, :0]
        for k, block in enumerate(tower.blocks):
            if prompts is not None and propagate and k == last_prompted:
                x = torch.cat([x[:, :start], prompts[:, k], x[:, start:]], dim=1)
            if k == class_layer:
                x, words = x[:, :start], x[:, stop:]
            h = block.norm(x)
            keys_values = block.keys_values(h)
            mask = causal_mask(x.shape[1], x.device)
            if k < len(replaced):
                num_prompts = replaced[k].shape[1]
                keys_values = torch.cat([replaced[k], keys_values], dim=1)
                mask = F.pad(mask, (num_prompts, 0), value=True)  # words see the prompts
                if not self.prompts_before_sos:
                    mask[0, :num_prompts] = False  # the start token does not
            shared.append(keys_values)
            if k < len(tower.blocks) - 1:
                x = block.attend(x, h, keys_values, mask)
        return shared, words

    def _encode_bidirectional(
        self,
        tokens: ClassTokens,
        prompts: torch.Tensor | None,
        propagate: bool,
        suffix_embeddings: torch.Tensor,
        class_prompts: tuple[int, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Run each text as a whole: every token sees all others, and the padding too unless it is masked."""
        tower, device = self.tower, suffix_embeddings.device
        num_prompts = 0 if prompts is None else prompts.shape[2]
        start = 0 if self.prompts_before_sos else tokens.num_begin
        prefix = tower.token_embedding(tokens.prefix)  # (T, P, D)
        inserted = num_prompts if propagate else 0
        prefix = torch.cat([tower.embed(prefix[:, :start], 0), tower.embed(prefix[:, start:], start + inserted)], dim=1)
        offset = tokens.prefix.shape[1] + inserted
        if prompts is not None and propagate:
            prompts = torch.cat([tower.embed(prompts[:, :1], start), prompts[:, 1:]], dim=1)
        replaced = deep_prompt_kv(tower.blocks, prompts, propagate)
        last_prompted = -1 if prompts is None else prompts.shape[1] - 1
        if not tower.masks_padding:  # prompts are in the place of padding
            suffix_embeddings = suffix_embeddings[:, : suffix_embeddings.shape[1] - inserted]
        num_tokens = offset + suffix_embeddings.shape[1]
        eot = tokens.eot + offset
        first, last = torch.full_like(eot, 0 if start else inserted), torch.full_like(eot, num_tokens - 1)
        pooled = {"eot": eot, "first": first, "last": last}.get(tower.pooled)

        def encode(start_row: int, stop_row: int) -> torch.Tensor:
            counts = counts_in_range(tokens.rows_per_task, start_row, stop_row)
            rows = torch.arange(stop_row - start_row, device=device)
            suffix = tower.embed(suffix_embeddings[start_row:stop_row], offset)
            x = torch.cat([repeat_per_row(prefix, counts), suffix], dim=1)  # (R, L, D)
            for k, block in enumerate(tower.blocks):
                if prompts is not None and propagate and k == last_prompted:
                    x = torch.cat([x[:, :start], repeat_per_row(prompts[:, k], counts), x[:, start:]], dim=1)
                if class_prompts is not None and k == class_prompts[0]:
                    row_prompts = class_prompts[1][start_row:stop_row]
                    x = torch.cat([x[:, :start], row_prompts, x[:, start + num_prompts :]], dim=1)
                h = block.norm(x)
                keys_values = block.keys_values(h)
                if k < len(replaced):
                    keys_values = prepend_task_kv(replaced[k], counts, keys_values)
                mask = None
                if tower.masks_padding:
                    num_keys = keys_values.shape[1]
                    # Padding is at the end, in every layer.
                    last_key = eot[start_row:stop_row] + num_keys - num_tokens
                    mask = (torch.arange(num_keys, device=device) <= last_key[:, None])[:, None, None]
                if k == len(tower.blocks) - 1 and pooled is not None:
                    row_pooled = pooled[start_row:stop_row]
                    x, h = x[rows, row_pooled, None], h[rows, row_pooled, None]
                x = block.attend(x, h, keys_values, mask)
            if pooled is None:  # the mean of all but padding
                seen = torch.arange(num_tokens, device=device) <= eot[start_row:stop_row, None]
                return tower.head((x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True))
            return tower.head(x[:, 0])

        bytes_per_class = activation_bytes(tower.blocks, num_tokens, num_tokens + num_prompts, self.prototype)
        return checkpointed_chunks(encode, len(tokens.suffix), bytes_per_class, self.memory_gib)


def causal_mask(num_tokens: int, device: torch.device) -> torch.Tensor:
    """Return the mask (L, L) with which each token sees itself and those before it."""
    return torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
