"""Model card of a trained model: the README.md of its repository on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pipeline.data.names import pluralize
from pipeline.grouping.text import format_groups
from pipeline.report.metrics import ACCURACY, MAP
from pipeline.report.summary import AVERAGE_ROW, Summary, markdown_table, method_title, percent

_LABELS = {
    ACCURACY: "An image that shows none of a task's classes gets one of them nevertheless, unless a confidence "
    "threshold is set.",
    MAP: "An image gets all classes with a probability of 0.5, or of the threshold, and more: several, one, or none.",
}
_ESCAPED = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#"})


def model_card(
    summary: Summary,
    method: str,
    repository: str,
    labels: Mapping[str, Sequence[str]],
    clip: str,
    base_model: str | None,
    has_own_weights: bool,
    license_id: str | None,
) -> str:
    """Return the card, Markdown with YAML front matter.

    Args:
        summary: of the run.
        method: name of the variant in the summary whose adapter is in the repository.
        repository: OWNER/NAME.
        labels: task → labels of its classes.
        clip: architecture of the CLIP.
        base_model: OWNER/NAME of the CLIP weights on the Hub; None: they are elsewhere.
        has_own_weights: they are a file of the author's, which a user must have.
        license_id: identifier of a license as the Hub has it, such as mit; None: the card names none.
    """
    results, source = summary.methods[method], f"hf-hub:{repository}"
    values, errors, counts = results[summary.metric], results["standard_error"], summary.num_test_images
    rows = [
        [_escape(task), str(len(labels[task])), percent(values[task], errors[task]), f"{counts[task]:,}"]
        for task in summary.tasks
    ]
    average = percent(results["average"], results["average_standard_error"])
    rows.append([AVERAGE_ROW, "", average, f"{sum(counts.values()):,}"])
    pretrained = ', pretrained="CLIP_WEIGHTS"' if has_own_weights else ""
    weights = "come with the package or are downloaded from where open_clip has them"
    if base_model:
        weights = f"are downloaded from [{base_model}](https://huggingface.co/{base_model})"
    elif has_own_weights:
        weights = "are a file of the author's, `CLIP_WEIGHTS`; others than in training are refused"
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(_front_matter(base_model, license_id), sort_keys=False)}---",
            f"# {_escape(repository.partition('/')[2])}",
            "",
            f"{_escape(method_title(method))} of {_escape(summary.name)} on a frozen CLIP ({_escape(clip)}): "
            f"{results['trained_parameters']:,} trained parameters for image classification in "
            f"{pluralize(len(summary.tasks), 'task')}, trained with {pluralize(summary.shots, 'image')} per class, "
            f"seed {summary.seed}. Groups of tasks: {_escape(format_groups(summary.groups))}.",
            "",
            "## Use",
            "",
            "```python",
            "import pipeline  # pip install mmap-clip",
            "",
            f'model = pipeline.load("{source}"{pretrained})',
            f'model.predict("photo.jpg", task={summary.tasks[0]!r})',
            "```",
            "",
            f"The repository has the adapter only. The weights of CLIP {weights}.",
            "",
            f"## Test {summary.metric}",
            "",
            *markdown_table(("task", "classes", f"{summary.metric} (%) ± standard error", "test images"), rows),
            "",
            "The standard error is that of the test set; that of another training is not in it.",
            "",
            "## Classes",
            "",
            *(f"- {_escape(task)}: {', '.join(map(_escape, labels[task]))}" for task in summary.tasks),
            "",
            _LABELS[summary.metric],
            "",
        ]
    )


def _front_matter(base_model: str | None, license_id: str | None) -> dict[str, Any]:
    values: dict[str, Any] = {"license": license_id} if license_id else {}
    values |= {"library_name": "mmap-clip", "pipeline_tag": "image-classification"}
    if base_model:
        values |= {"base_model": base_model, "base_model_relation": "adapter"}
    return values | {"tags": ["clip", "open_clip", "few-shot-learning", "parameter-efficient-fine-tuning"]}


def _escape(text: str) -> str:
    return text.translate(_ESCAPED)
