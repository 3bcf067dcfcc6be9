"""Sections of the config: data, CLIP, MmAP, training, grouping, cluster, tracking.

Defaults are the settings of the paper (MmAP, AAAI 2024), or of MaPLe and Dassl where it gives none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config.fields import Fraction, NonNegative, NonNegativeInt, PositiveInt, Section, Template, affects
from pipeline.errors import UserError
from pipeline.grouping.affinities import AFFINITIES, SIMILARITIES
from pipeline.grouping.objectives import OBJECTIVES

if TYPE_CHECKING:
    AffinityName = str
    SimilarityName = str
    ObjectiveName = str
else:
    AffinityName = Literal[*AFFINITIES]
    SimilarityName = Literal[*SIMILARITIES]
    ObjectiveName = Literal[*OBJECTIVES]
_AFFINITIES = "; ".join(f"{affinity.name}: {affinity.summary}" for affinity in AFFINITIES.values())
_SIMILARITIES = "; ".join(f"{similarity.name}: {similarity.summary}" for similarity in SIMILARITIES.values())
_OBJECTIVES = "; ".join(f"{objective.name}: {objective.summary}" for objective in OBJECTIVES.values())

BUILTIN_DIGITS = "builtin:digits"
HUB_PREFIX, FOLDER_PREFIX = "hf-hub:", "local-dir:"  # open_clip's
OPENAI_NAMES = {
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
}
"""OpenAI's name of a model → open_clip's, with the activation of OpenAI's weights."""
ResizeMode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
Precision = Literal["auto", "float32", "bfloat16"]
AggregationName = Literal["sum", "pcgrad", "cagrad", "mgda", "upgrad", "nash_mtl", "uncertainty", "famo"]
MAX_MODEL_NAME = 200
Channels = tuple[float, float, float]
"""A number for each of R, G, B."""
_Positive = Annotated[float, Field(gt=0)]
PositiveChannels = tuple[_Positive, _Positive, _Positive]


class DataConfig(Section, affects=("data",)):
    root: str | None = None
    """Image folder, <root>/<task>/<class>/*, or a manifest: a .csv, .tsv or .parquet file, or a folder of .parquet
    files (docs/datasets.md). Either may be in a bucket, s3://bucket/folder. `builtin:digits`: the built-in handwritten
    digits."""
    layout: Literal[
        "auto", "folders", "split_folders", "manifest", "office_home", "mini_domainnet", "domainnet", "pacs"
    ] = "auto"
    """Layout of the images under root; auto: detected. folders: task/class/image; split_folders: task/split/class/image
    or split/task/class/image; manifest: a table; else a data set as published (the archive of Office-Home; folders
    with the image lists of MiniDomainNet, DomainNet or PACS)."""
    columns: dict[Literal["path", "task", "label", "split"], str] = {}
    """Column names of a manifest, if different from path, task, label and split: {task: domain}."""
    use_official_splits: bool = False
    """Use the official splits of the data set: sample training images only from its train split, evaluate on its test
    split, ignore its validation split. false: pool all images of a class and evaluate on those that are not sampled,
    as in the paper."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks to use (their folders); null: all."""
    expected_images: Annotated[dict[str, PositiveInt] | None, affects()] = None
    """Published number of images by task, or by `a + b` for the sum of tasks. A run reports deviations at its start."""
    class_names: str | dict[str, str] | None = None
    """Text file of the classes to use, one per line: the folder name, optionally followed by a tab and the class name
    for CLIP, or several names separated by `|`. Or a mapping from task to such a file, for tasks with different
    classes. null: all class folders, with `_` replaced by a space."""
    shots: Annotated[PositiveInt, affects("splits")] = 6
    """Training images per class and task; all others are test images (see use_official_splits)."""
    max_broken_fraction: Annotated[Fraction, affects("splits")] = 0.0
    """Maximum fraction of broken images (0 to 1), which are dropped and recorded; above it the run stops."""
    multi_label: bool = False
    """Whether an image may have several labels, in all tasks: each class is then a yes or no of its own, and results
    are mean average precisions (mAP). Needs a table, which names an image's labels in a list, separated by `;`, or in
    several rows (docs/datasets.md). false: one label per image."""
    follow_external_symlinks: bool = True
    """Follow symbolic links, and paths of a manifest, that lead outside root. false: they stop the run; for a folder
    from someone else, which must not expose other files."""


def brings_weights(model: str) -> bool:
    """Return whether a value of clip.model names a folder or a repository, which also has weights: hf-hub:ORG/NAME,
    local-dir:PATH, or a path (with a `/`)."""
    is_path = "/" in model and model not in OPENAI_NAMES and not model.endswith(".json")
    return model.startswith((HUB_PREFIX, FOLDER_PREFIX)) or is_path


class ClipConfig(Section, affects=("clip",)):
    model: str = "ViT-B-16-quickgelu"
    """Architecture: the name of an open_clip model (ViT-B-16; mmap-clip list-models lists them) or OpenAI's (ViT-B/16),
    the path of a model config (JSON), or `builtin:digits`. With weights: a folder (./folder, local-dir:folder) or a
    repository of the Hugging Face Hub (hf-hub:ORG/NAME, hf-hub:ORG/NAME@REVISION), of open_clip or a CLIPModel
    (docs/models.md)."""
    pretrained: str | None = "openai"
    """Weights: an open_clip tag, a file, a folder or a repository of the Hub (docs/models.md), or `builtin:digits`;
    null: random weights. Unless given, those of `model`, if it is a folder, a repository or `builtin:digits`."""
    quick_gelu: bool | None = None
    """Use the QuickGELU activation, as the weights were trained; null: as open_clip records for the tag or model."""
    image_size: PositiveInt | None = None
    """Side of the model's square input in pixels, for which its position embedding is resized; null: the model's."""
    resize_mode: ResizeMode | None = None
    """How images become square. shortest: shorter side to image_size, center crop; longest: longer side to image_size,
    padding; squash: both sides to image_size. null: as recorded for the weights (docs/models.md)."""
    interpolation: Interpolation | None = None
    """Interpolation of resizing, in training too: bicubic or bilinear; null: as recorded for the weights."""
    mean: Channels | None = None
    """Mean of R, G and B (0 to 1) to standardize images with; null: as recorded for the weights."""
    std: PositiveChannels | None = None
    """Standard deviation of R, G and B (0 to 1) to standardize images with; null: as recorded for the weights."""
    fill_color: Annotated[int, Field(ge=0, le=255)] | None = None
    """Gray level (0 to 255) of the padding of resize_mode longest; null: as recorded for the weights."""
    jpeg_draft: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size (Pillow's draft mode), at least twice the size to which they
    are then resized: faster, but pixels differ slightly from open_clip's, in training, test, prediction and serving."""
    template: Annotated[Template, affects("training", "evaluation")] = "a photo of a {}."
    """Prompt template; {} is the placeholder of the class name."""
    task_templates: Annotated[dict[str, Template], affects("training", "evaluation")] = {}
    """Prompt templates by task, which override `template`: {sketch: "a sketch of a {}."}."""
    precision: Annotated[Precision, affects("test_features", "training_features", "training", "evaluation")] = "auto"
    """Precision of the frozen towers; auto: bfloat16 autocast on GPUs that support it; on CPUs with AMX, for evaluation
    and prediction with ViT-B and larger; else float32. Prompts and optimizer state are always float32."""
    activation_memory_gib: Annotated[float, Field(gt=0), affects()] = 6.0
    """Maximum memory in GiB for the activations of each tower. Larger batches use activation checkpointing in chunks: a
    third more time, and memory that no longer grows with the batch."""

    @model_validator(mode="before")
    @classmethod
    def _weights_of_model(cls, values: Any) -> Any:
        if isinstance(values, dict) and "pretrained" not in values:
            model = values.get("model")
            if isinstance(model, str) and (model == BUILTIN_DIGITS or brings_weights(model)):
                return {**values, "pretrained": model}
        return values

    def with_weights(self, pretrained: str | None) -> ClipConfig:
        """Return the config with weights from elsewhere (None: unchanged). If the architecture is from a folder or
        repository, another folder or repository replaces it too: the same model in another place."""
        if pretrained is None:
            return self
        moves = brings_weights(self.model) and brings_weights(pretrained)
        return self.model_copy(update={"pretrained": pretrained, **({"model": pretrained} if moves else {})})

    def with_precision(self, precision: str | None) -> ClipConfig:
        """Return the config with another precision (None: unchanged)."""
        return self if precision is None else self.model_copy(update={"precision": precision})

    def template_for(self, task: str) -> str:
        return self.task_templates.get(task, self.template)


class MmapConfig(Section, affects=("method",)):
    prompt_length: PositiveInt = 8
    """Prompt vectors per layer (b in Eqs. 6-7)."""
    source_rows: PositiveInt = 8
    """Rows of the source prompt (m); must divide prompt_length."""
    source_columns: PositiveInt | None = None
    """Columns of the source prompt (n); must divide the widths of both towers. null: their greatest common divisor."""
    depth: PositiveInt | None = None
    """Number of layers with prompts, from the first; null: as many as the shallower tower has."""
    shared_source: bool = False
    """Share one source prompt between all layers."""
    text_prompt_position: Annotated[Literal["after_sos", "before_sos"], affects("training", "evaluation")] = "after_sos"
    """Position of the text prompts of all methods: after the start token (CoOp, MaPLe), or before it (literally as in
    Eq. 9)."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the normal initialization of source prompts; scaling matrices are initialized to ones."""

    @model_validator(mode="after")
    def _rows_divide_length(self) -> MmapConfig:
        if self.prompt_length % self.source_rows:
            raise ValueError(
                f"mmap.source_rows={self.source_rows} does not divide mmap.prompt_length={self.prompt_length}; "
                f"valid: {_divisors(self.prompt_length)}"
            )
        return self


class AugmentationConfig(Section, affects=("training", "training_features")):
    crop_scale: tuple[Fraction, Fraction] = (0.08, 1.0)
    """Minimum and maximum area of a random resized crop, as a fraction of the image; (1, 1): no crop,
    but the preprocessing of test images."""
    crop_ratio: Annotated[float, Field(ge=1)] = 4 / 3
    """Maximum aspect ratio of a random resized crop; the minimum is its inverse."""
    flip: bool = True
    """Flip images horizontally with probability 0.5."""

    @property
    def random_crop(self) -> bool:
        return self.crop_scale != (1.0, 1.0)

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, crop_scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < crop_scale[0] <= crop_scale[1]:
            raise ValueError("must be increasing and positive, such as 0.08 1")
        return crop_scale


class TrainingConfig(Section, affects=("training",)):
    epochs: Annotated[PositiveInt, affects("training", "training_features")] = 5
    """Epochs over the training images; with a batch of each task (MmAP), over those of the largest task: smaller tasks
    repeat theirs."""
    batch_size: Annotated[PositiveInt, affects("training", "training_features")] = 16
    """Images of a batch, whose mean is the loss. A step of MmAP takes a batch of each task and sums the tasks' means
    (Eq. 11); a step of all other methods takes one batch, with `_mt` from the images of all tasks."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: SGD with momentum, or AdamW."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.0035
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of all trained parameters: L2 penalty in SGD, decoupled in AdamW."""
    warmup_epochs: NonNegativeInt = 1
    """Epochs at warmup_learning_rate, followed by cosine annealing with period `epochs`."""
    warmup_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Learning rate of the warm-up epochs."""
    min_learning_rate: NonNegative = 0.0
    """Learning rate at which the cosine ends."""
    schedule_interval: Literal["epoch", "step"] = "epoch"
    """Whether cosine annealing changes the learning rate after each epoch or after each step."""
    aggregation: AggregationName = "sum"
    """How a step of MmAP weighs the tasks. sum: equally (Eq. 11); pcgrad, cagrad, mgda, upgrad, nash_mtl: by the tasks'
    gradients of the prompt that they share, with TorchJD (pip install 'mmap-clip[aggregation]'); uncertainty, famo: by
    their losses (docs/methods.md#weighing-tasks)."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Data augmentation of the training images."""
    checkpoint_every: Annotated[PositiveInt, affects()] = 1
    """Epochs between checkpoints, from which a training resumes after its worker died."""


class GlobalPromptConfig(Section, affects=("global_prompt",)):
    epochs: PositiveInt | None = None
    """Epochs of the global prompt's training; null: training.epochs."""
    snapshot_every: PositiveInt = 1
    """Steps between snapshots of the tasks' gradients, which need no extra backward pass."""


class GroupingConfig(Section, affects=("grouping",)):
    affinity: Annotated[AffinityName, Field(description=f"Affinity of two tasks. {_AFFINITIES}.")] = "transfer"
    gradient_similarity: Annotated[
        SimilarityName, Field(description=f"Similarity of two tasks' gradients. {_SIMILARITIES}.")
    ] = "dot"
    per_layer: bool = False
    """Compute gradient affinities per layer and average them; with cosine, all layers then have equal weight."""
    scaling_matrices: bool = True
    """Include the gradients of the scaling matrices, beside those of the source prompt, in gradient affinities."""
    objective: Annotated[ObjectiveName, Field(description=f"Objective to maximize. {_OBJECTIVES}.")] = "sum"
    num_groups: PositiveInt | None = None
    """Exact number of groups; null: chosen by the objective."""
    min_size: PositiveInt = 1
    """Minimum number of tasks per group."""
    max_size: PositiveInt | None = None
    """Maximum number of tasks per group; null: no limit."""
    must_link: tuple[tuple[str, ...], ...] = ()
    """Lists of tasks that must be in the same group: [[photo, art], [sketch, clipart]]."""
    cannot_link: tuple[tuple[str, ...], ...] = ()
    """Lists of tasks of which no two may be in the same group."""
    time_limit_s: Annotated[float, Field(gt=0)] = 60.0
    """Time limit in seconds of a search with more than 20 tasks; then its best partition is used, and reported so."""

    @property
    def constraints(self) -> dict[str, Any]:
        """Constraints as keyword arguments of `best_partition`."""
        return {
            name: getattr(self, name) for name in ("num_groups", "min_size", "max_size", "must_link", "cannot_link")
        }


class ClusterConfig(Section, affects=()):
    address: str | None = None
    """Ray cluster to join (`auto`, host:port), or `local`; null: the one that the process is connected to (in a
    notebook), else RAY_ADDRESS, else a local Ray is started."""
    num_cpus: PositiveInt | None = None
    """CPU cores of a local Ray; null: those that the job may use (CPU affinity, quota of the container, Slurm job)."""
    workers_per_training: PositiveInt = 1
    """Data-parallel workers per training (Ray Train), with the results of a single worker. Useful if a step is long;
    several trainings on one GPU each are faster than one training on all."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs per worker (training, prediction, serving), may be fractional; null: 1 if the cluster has GPUs, else 0."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores per worker; on CPU also its threads."""
    min_workers_per_training: PositiveInt | None = None
    """Minimum number of workers with which a data-parallel training continues after a failure; null: all."""
    wait_for_nodes_s: NonNegative = 0
    """Seconds to wait for nodes of an autoscaler before failing because the cluster is too small."""
    max_retries: NonNegativeInt = 3
    """Maximum retries of a task whose worker died."""


def _check_model_name(name: str) -> str:
    if set("/:'\"") & set(name) or name[:1].isspace() or len(name) > MAX_MODEL_NAME:
        raise ValueError(f"must have at most {MAX_MODEL_NAME} characters without / : ' and \", the first no space")
    return name


class TrackingConfig(Section, affects=()):
    uri: str | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, else SQLite and a folder under storage."""
    experiment: str = "mmap-clip"
    """Name of the MLflow experiment."""
    registered_model: Annotated[str, AfterValidator(_check_model_name)] | None = None
    """Name in the MLflow model registry under which the run registers its grouped MmAP; null: not registered
    (`mmap-clip register-model` registers any finished run)."""


def source_columns(config: MmapConfig, text_width: int, vision_width: int) -> int:
    """Return n of Eqs. 6-7 for towers of these widths; UserError if the config's value does not divide both."""
    common = math.gcd(text_width, vision_width)
    n = config.source_columns or common
    if common % n:
        raise UserError(
            f"mmap.source_columns={n} must divide the text width {text_width} and the vision width {vision_width}; "
            f"valid: {_divisors(common)}"
        )
    return n


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
