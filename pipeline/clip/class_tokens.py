"""Class texts of several tasks as token ids, split into a prefix shared by a task's classes and a suffix per class.

Under a causal mask a token sees only those before it. So the start token and the template's words before the class
name run once per task, and nothing after the end-of-text token (EOT) runs at all. Without that mask the suffix is
padded to the model's context, and each text runs as a whole.

A class may have several names, "sofa | couch": each is a separate text, and the class's feature is the mean of their
unit-length features, as in CLIP's prompt ensembles (Radford et al., ICML 2021, Section 3.1.4).

Dimensions: T tasks, C classes of a task, R texts (rows) of all names of all classes, P prefix tokens, S suffix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.clip.tokenizer import Tokenizer
from pipeline.data.names import split_synonyms
from pipeline.errors import UserError
from pipeline.lazy_torch import F, torch

_NAMES_FILE = "in a file for --data.class_names (lines `folder<TAB>class name`)"


@dataclass(frozen=True)
class ClassTokens:
    prefix: torch.Tensor
    """(T, P) int64: start token and the template's words before the class name."""
    suffix: torch.Tensor
    """(R, S) int64: the remainder of each text with EOT, padded; task by task, class by class."""
    eot: torch.Tensor
    """(R,) int64: position of EOT in the suffix."""
    num_begin: int
    """Number of tokens before the words: 1 with a start token, else 0."""
    rows_per_task: tuple[int, ...]
    classes_per_task: tuple[int, ...]
    """Like `names_per_class`, of all rows even after `slice_rows` or `select_task`."""
    names_per_class: tuple[int, ...]
    name_start: tuple[int, ...]
    """Position in the suffix where each task's class names start; 0 unless its template merges into them, or has more
    words before them than another's."""
    first_row: int = 0
    """Index of the first of these rows among all rows."""

    def to(self, device: torch.device) -> ClassTokens:
        prefix, suffix, eot = (tensor.to(device) for tensor in (self.prefix, self.suffix, self.eot))
        return replace(self, prefix=prefix, suffix=suffix, eot=eot)

    def slice_rows(self, start: int, stop: int) -> ClassTokens:
        """Return the texts of rows start:stop, which may be none of a task."""
        counts = counts_in_range(self.rows_per_task, start, stop)
        return replace(
            self,
            suffix=self.suffix[start:stop],
            eot=self.eot[start:stop],
            rows_per_task=tuple(counts),
            first_row=start,
        )

    def select_task(self, index: int) -> ClassTokens:
        """Return only the texts of one task among these rows."""
        start = sum(self.rows_per_task[:index])
        rows = slice(start, start + self.rows_per_task[index])
        return replace(
            self,
            prefix=self.prefix[index : index + 1],
            suffix=self.suffix[rows],
            eot=self.eot[rows],
            rows_per_task=(self.rows_per_task[index],),
            name_start=(self.name_start[index],),
            first_row=self.first_row + start,
        )

    def pool_names_to_classes(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Average the features (R, E) of all texts to class features (C, E) for each task."""
        if len(self.names_per_class) < len(features):
            lengths = torch.tensor(self.names_per_class, device=features.device)
            unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
            features = torch.segment_reduce(unit, "mean", lengths=lengths)
        class_features: tuple[torch.Tensor, ...] = features.split(self.classes_per_task)
        return class_features


def class_tokens(
    tokenizer: Tokenizer,
    template: str | Sequence[str],
    class_names_per_task: Sequence[Sequence[str]],
    num_prompt_positions: int = 0,
    num_replaced_tokens: int = 0,
) -> ClassTokens:
    """Tokenize each task's template filled with its class names.

    Args:
        template: one template for all tasks, or one per task.
        class_names_per_task: the text of each class, which `split_synonyms` splits into one or several names.
        num_prompt_positions: context positions to leave free for prompts.
        num_replaced_tokens: first tokens of each template that are left out, since prompts replace them; a template
            with fewer tokens before the class name loses all of these.

    Raises:
        UserError: a text exceeds the model's context, a name has no tokens, or two of a task have the same ones.
    """
    templates = [template] * len(class_names_per_task) if isinstance(template, str) else template
    texts: list[list[list[int]]] = []
    name_starts: list[int] = []
    for task_template, class_names in zip(templates, class_names_per_task, strict=True):
        words = tokenizer.encode(task_template.partition("{}")[0])
        names = [name for class_name in class_names for name in split_synonyms(class_name)]
        nameless, *encoded = [tokenizer.encode(task_template.format(name)) for name in ("", *names)]
        # Tokens that merge with a name stay.
        num_replaced = min(num_replaced_tokens, _common_prefix([words, *encoded]))
        name_starts.append(len(tokenizer.begin) + len(words) - num_replaced)
        name_by_ids: dict[tuple[int, ...], str] = {}
        for name, text_ids in zip(names, encoded):
            ids = [*tokenizer.begin, *text_ids[num_replaced:], *tokenizer.end]
            if len(ids) + num_prompt_positions > tokenizer.context_length:
                prompts, remedy = "", f"shorten the name {_NAMES_FILE}"
                if num_prompt_positions:
                    prompts = f" and {num_prompt_positions} prompts"
                    remedy += ", or use fewer prompts (prompt_length or context_length of the method)"
                raise UserError(
                    f"class {name!r} in the template {task_template!r} has {len(ids)} tokens{prompts}; the model's "
                    f"context length is {tokenizer.context_length}: {remedy}"
                )
            if text_ids == nameless:
                raise UserError(
                    f"the class name {name!r} has no tokens in this model's vocabulary; give another one {_NAMES_FILE}"
                )
            if tuple(ids) in name_by_ids:
                raise UserError(
                    f"the class names {name_by_ids[tuple(ids)]!r} and {name!r} have the same tokens; "
                    f"give different ones {_NAMES_FILE}"
                )
            name_by_ids[tuple(ids)] = name
        texts.append([list(ids) for ids in name_by_ids])

    # EOT stays in the suffix even of a single class.
    shared = min(*name_starts, *(_common_prefix([ids[:-1] for ids in task_texts]) for task_texts in texts))
    rows = [ids[shared:] for task_texts in texts for ids in task_texts]
    length = tokenizer.context_length - shared if tokenizer.pad_to_context else max(map(len, rows))
    suffix = torch.full((len(rows), length), tokenizer.pad_id, dtype=torch.int64)
    for row, ids in zip(suffix, rows):
        row[: len(ids)] = torch.tensor(ids)
    return ClassTokens(
        prefix=torch.tensor([task_texts[0][:shared] for task_texts in texts], dtype=torch.int64),
        suffix=suffix,
        eot=torch.tensor([len(ids) - 1 for ids in rows]),
        num_begin=len(tokenizer.begin),
        rows_per_task=tuple(len(task_texts) for task_texts in texts),
        classes_per_task=tuple(len(class_names) for class_names in class_names_per_task),
        names_per_class=tuple(
            len(split_synonyms(class_name)) for class_names in class_names_per_task for class_name in class_names
        ),
        name_start=tuple(start - shared for start in name_starts),
    )


def counts_in_range(rows_per_task: Sequence[int], start: int, stop: int) -> list[int]:
    """Return how many of the rows start:stop belong to each task; rows are ordered task by task."""
    counts, offset = [], 0
    for count in rows_per_task:
        counts.append(max(0, min(stop, offset + count) - max(start, offset)))
        offset += count
    return counts


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    length = min(map(len, texts))
    for position in range(length):
        if len({ids[position] for ids in texts}) > 1:
            return position
    return length
