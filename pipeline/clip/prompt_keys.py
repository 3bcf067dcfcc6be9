"""Keys and values of prompts. A prompt that the next layer replaces needs no more: no query, no MLP."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.clip.blocks import Block


def deep_prompt_kv(blocks: Sequence[Block], prompts: torch.Tensor | None, propagate: bool) -> list[torch.Tensor]:
    """Return keys and values (T, b, 2 D) of prompts (T, K', b, D) in each layer after which they end."""
    if prompts is None:
        return []
    num_replaced = prompts.shape[1] - propagate
    return [blocks[k].keys_values(blocks[k].norm(prompts[:, k])) for k in range(num_replaced)]


def prepend_task_kv(task_kv: torch.Tensor, rows_per_task: Sequence[int], row_kv: torch.Tensor) -> torch.Tensor:
    """Concatenate each row's keys and values to those of its task."""
    return torch.cat([repeat_per_row(task_kv, rows_per_task), row_kv], dim=1)


def repeat_per_row(per_task: torch.Tensor, rows_per_task: Sequence[int]) -> torch.Tensor:
    """(T, ...) → (Σ rows, ...). The backward pass of expand, unlike that of indexing, adds in a fixed order."""
    rows = [task.expand(count, *task.shape) for task, count in zip(per_task, rows_per_task, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
