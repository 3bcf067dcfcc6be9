"""The class texts of several tasks as token ids, cut into what all classes of a task share and what is their own.

Under the causal mask a token sees only those before it. So the start token and the template's words before the class
name need to be run once a task, and nothing after the end-of-text token (EOT) needs to be run at all.

A class's words may be several names, "sofa | couch": each is a text of its own, and the class's feature is the mean of
their unit-length features, as in CLIP's ensembles of prompts (Radford et al., ICML 2021, Section 3.1.4).

Dimensions: T tasks, C classes of a task, R texts (rows) of all names of all classes, P prefix tokens, S suffix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pipeline.data.names import names_of
from pipeline.errors import UserError
from pipeline.lazy_torch import F, torch


class Tokenizer(Protocol):
    """open_clip's SimpleTokenizer, as far as it is used here."""

    sot_token_id: int
    eot_token_id: int
    context_length: int
    decoder: dict[int, str]

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class ClassTokens:
    prefix: torch.Tensor
    """(T, P) int64: start token and the template's words before the class name."""
    suffix: torch.Tensor
    """(R, S) int64: the rest of each text with EOT, padded with zeros; task by task, class by class."""
    eot: torch.Tensor
    """(R,) int64: position of EOT in the suffix."""
    rows_per_task: tuple[int, ...]
    classes_per_task: tuple[int, ...]
    """Also in a part of the rows those of the whole, as in the next field."""
    names_per_class: tuple[int, ...]
    name_at: tuple[int, ...]
    """Where a task's class names begin in the suffix; 0 unless its template runs into them, or begins with more words
    than another's."""
    first_row: int = 0
    """Place of the first of these rows among all."""

    def to(self, device: torch.device) -> ClassTokens:
        prefix, suffix, eot = (tensor.to(device) for tensor in (self.prefix, self.suffix, self.eot))
        return replace(self, prefix=prefix, suffix=suffix, eot=eot)

    def rows(self, start: int, stop: int) -> ClassTokens:
        """The texts of rows start:stop; a task may be left with none."""
        counts = counts_between(self.rows_per_task, start, stop)
        return replace(
            self,
            suffix=self.suffix[start:stop],
            eot=self.eot[start:stop],
            rows_per_task=tuple(counts),
            first_row=start,
        )

    def pool_names_to_classes(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of each task (C, E), by the features (R, E) of all texts."""
        if len(self.names_per_class) < len(features):
            lengths = torch.tensor(self.names_per_class, device=features.device)
            unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
            features = torch.segment_reduce(unit, "mean", lengths=lengths)
        of_tasks: tuple[torch.Tensor, ...] = features.split(self.classes_per_task)
        return of_tasks


def class_tokens(
    tokenizer: Tokenizer,
    template: str | Sequence[str],
    class_names_per_task: Sequence[Sequence[str]],
    num_prompt_positions: int = 0,
) -> ClassTokens:
    """Tokens of templates filled with each class's names, for every task; leave room for `num_prompt_positions`
    prompts.

    Args:
        template: text of a class in all tasks, or one for each task.
        words_per_task: each class's words, of which `names_of` makes one or several names.

    Raises:
        UserError: a text is longer than the model's context, two names in a task read the same to the tokenizer.
    """
    templates = [template] * len(class_names_per_task) if isinstance(template, str) else template
    texts: list[list[list[int]]] = []
    for own_template, class_names in zip(templates, class_names_per_task, strict=True):
        of_task: dict[tuple[int, ...], str] = {}
        for name in (name for of_class in class_names for name in names_of(of_class)):
            ids = [tokenizer.sot_token_id, *tokenizer.encode(own_template.format(name)), tokenizer.eot_token_id]
            if len(ids) + num_prompt_positions > tokenizer.context_length:
                beside = f" beside {num_prompt_positions} prompts" if num_prompt_positions else ""
                raise UserError(
                    f"class {name!r} takes {len(ids)} tokens in the template {own_template!r}{beside}; the model reads "
                    f"{tokenizer.context_length}: shorten it with data.class_names"
                )
            if tuple(ids) in of_task:
                raise UserError(
                    f"the class names {of_task[tuple(ids)]!r} and {name!r} are the same to CLIP's tokenizer; "
                    f"give other words with data.class_names"
                )
            of_task[tuple(ids)] = name
        texts.append([list(ids) for ids in of_task])

    name_at = [1 + len(tokenizer.encode(own_template.partition("{}")[0])) for own_template in templates]
    shared = min(*name_at, *(_common_prefix(of_task) for of_task in texts))
    rows = [ids[shared:] for of_task in texts for ids in of_task]
    suffix = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for row, ids in zip(suffix, rows):
        row[: len(ids)] = torch.tensor(ids)
    return ClassTokens(
        prefix=torch.tensor([of_task[0][:shared] for of_task in texts]),
        suffix=suffix,
        eot=torch.tensor([len(ids) - 1 for ids in rows]),
        rows_per_task=tuple(len(of_task) for of_task in texts),
        classes_per_task=tuple(len(class_names) for class_names in class_names_per_task),
        names_per_class=tuple(
            len(names_of(of_class)) for class_names in class_names_per_task for of_class in class_names
        ),
        name_at=tuple(at - shared for at in name_at),
    )


def counts_between(rows_per_task: Sequence[int], start: int, stop: int) -> list[int]:
    """How many of the rows start:stop belong to each task, where rows go task by task."""
    counts, first = [], 0
    for count in rows_per_task:
        counts.append(max(0, min(stop, first + count) - max(start, first)))
        first += count
    return counts


def _common_prefix(texts: Sequence[Sequence[int]]) -> int:
    # EOT stays in the suffix also where there is one class only.
    length = min(map(len, texts)) - 1
    for position in range(length):
        if len({ids[position] for ids in texts}) > 1:
            return position
    return length
