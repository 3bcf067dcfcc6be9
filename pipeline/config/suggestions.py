"""Names that are close to a mistyped one, and new names of renamed fields and options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

RENAMED = {
    "compare": "baselines",
    "full": "full_finetune",
    "full_mt": "full_finetune_mt",
    "data.given_splits": "data.use_official_splits",
    "data.max_dropped_share": "data.max_broken_fraction",
    "data.links_out_of_root": "data.follow_external_symlinks",
    "clip.activations_gib": "clip.activation_memory_gib",
    "mmap.text_order": "mmap.text_prompt_position",
    "training.warmup_rate": "training.warmup_learning_rate",
    "grouping.together": "grouping.must_link",
    "grouping.apart": "grouping.cannot_link",
    "fewest_epochs": "grace_period",
}
"""Config fields and sections, methods, and options of search files and jobs: old name → new name."""


def did_you_mean(name: str, valid_names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: `; did you mean <the closest valid name>?`, or a full stop.

    A dotted name may be misspelled in its last part or in its section.
    """

    def closest(word: str, words: Iterable[str]) -> list[str]:
        by_lower = {valid.lower(): valid for valid in words}
        return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=1)]

    options, name = {option.lstrip("-"): option for option in valid_names}, name.lstrip("-")
    for old, new in RENAMED.items():
        if f"{name}.".startswith(f"{old}.") and (renamed := new + name.removeprefix(old)) in options:
            return f"; it was renamed to {options[renamed]}."
    section, _, last_part = name.rpartition(".")
    siblings = {option.rpartition(".")[2]: option for option in options if option.rpartition(".")[0] == section}
    matches = [siblings[word] for word in closest(last_part, siblings)]
    matches += sorted((option for option in options if option.endswith(f".{last_part}")), key=len)
    if not section or not siblings:
        matches += closest(name, options)
    return f"; did you mean {options[matches[0]]}?" if matches else "."
