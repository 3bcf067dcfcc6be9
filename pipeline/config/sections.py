"""The sections of the config: data, the frozen CLIP, MmAP, training, grouping, cluster, tracking.

Defaults are the paper's settings (MmAP, AAAI 2024); what the paper leaves open is taken from MaPLe/Dassl.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.fields import Fraction, NonNegative, NonNegativeInt, PositiveInt, Section, Template, affects
from pipeline.errors import UserError
from pipeline.grouping.affinities import AFFINITIES
from pipeline.grouping.objectives import OBJECTIVES

if TYPE_CHECKING:
    AffinityName = str
    ObjectiveName = str
else:
    AffinityName = Literal[*AFFINITIES]
    ObjectiveName = Literal[*OBJECTIVES]
_AFFINITIES = ", or ".join(affinity.summary for affinity in AFFINITIES.values())
_OBJECTIVES = "; ".join(f"{objective.name}: {objective.summary}" for objective in OBJECTIVES.values())

BUILTIN_DIGITS = "builtin:digits"


class DataConfig(Section, affects=("data",)):
    root: str | None = None
    """Folder of the images, <root>/<task>/<class>/*, or a table of them: a .csv, .tsv or .parquet file, or a folder of
    .parquet files (docs/datasets.md). `builtin:digits` writes the embedded handwritten digits."""
    layout: Literal[
        "auto", "folders", "split_folders", "manifest", "office_home", "mini_domainnet", "domainnet", "pacs"
    ] = "auto"
    """How the images lie under root: folders (task/class/image), split_folders (task/split/class/image or
    split/task/class/image), a manifest (table), or a data set as it is published (Office-Home's archive; folders with
    the image lists of MiniDomainNet, DomainNet or PACS). auto: recognized by what is there."""
    columns: dict[Literal["path", "task", "label", "split"], str] = {}
    """What a manifest calls its columns, where that is not path, task, label and split: {task: domain}."""
    use_official_splits: bool = False
    """Whether the data's own splits are respected: only images that it calls train are drawn as training images, and
    the test set is what it calls test; validation images are left out. false: all images of a class are one pool, and
    those that are not drawn test, as in the paper."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks to use (their folders); null: all that the layout has."""
    expected_images: Annotated[dict[str, PositiveInt] | None, affects()] = None
    """Task → number of images that its publishers count, or `a + b` → that of these tasks together. Another number is
    told at the start."""
    class_names: str | dict[str, str] | None = None
    """Text file of the classes to use, one a line: folder name, optionally a tab and the words to show to CLIP;
    `|` between several names of a class. Or task → such a file, for tasks of different classes. null: all class
    folders, `_` read as a space."""
    shots: Annotated[PositiveInt, affects("splits")] = 6
    """Training images of each class in each task; the rest is the test set (see use_official_splits)."""
    max_broken_fraction: Annotated[Fraction, affects("splits")] = 0.0
    """Share of broken images (0 to 1) that may be dropped, recorded with the split; above it the run stops."""
    follow_external_symlinks: bool = False
    """Whether links, and paths of a manifest, may lead out of root, for data sets that are linked together; else such
    a one stops the run, so that a folder of somebody else's cannot show other files of yours."""


class ClipConfig(Section, affects=("clip",)):
    model: str = "ViT-B-16-quickgelu"
    """Name of an open_clip ViT model, path of a model-config JSON, or `builtin:digits`."""
    pretrained: str | None = "openai"
    """open_clip tag, path of a weights file, `builtin:digits`, or null for random weights."""
    quick_gelu: bool | None = None
    """Activation of the weights' training: null takes what open_clip knows of the tag or model."""
    template: Annotated[Template, affects("training", "evaluation")] = "a photo of a {}."
    """Text of a class; {} is the class name."""
    task_templates: Annotated[dict[str, Template], affects("training", "evaluation")] = {}
    """Task → text of its classes, where that is not `template`: {sketch: "a sketch of a {}."}."""
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        affects("test_features", "training_features", "training", "evaluation"),
    ] = "auto"
    """Arithmetic of the frozen towers; auto: bfloat16 autocast on a GPU that has it, float32 elsewhere.
    Prompts and optimizer state are float32 always."""
    activation_memory_gib: Annotated[float, Field(gt=0), affects()] = 6.0
    """GiB that each tower may keep for its backward pass. Images and classes that need more are run in chunks, and
    again in the backward pass: a third more time, and memory that no longer grows with them."""

    def template_for(self, task: str) -> str:
        return self.task_templates.get(task, self.template)


class MmapConfig(Section, affects=("method",)):
    prompt_length: PositiveInt = 8
    """Prompt vectors of one MmAP in a layer (b in Eqs. 6-7)."""
    source_rows: PositiveInt = 8
    """Rows of the source prompt (m); divides prompt_length."""
    source_columns: PositiveInt | None = None
    """Columns of the source prompt (n); divides both towers' widths. null: their greatest common divisor."""
    depth: PositiveInt | None = None
    """Layers, from the first, that get prompts; null: as many as the shallower tower has."""
    shared_source: bool = False
    """One source prompt for all layers instead of one each."""
    text_prompt_position: Annotated[Literal["after_sos", "before_sos"], affects("training", "evaluation")] = "after_sos"
    """Where text prompts stand, those of other methods too: after the start token (CoOp, MaPLe), or before it (Eq. 9
    to the letter)."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the source prompt's Gaussian start; scaling matrices start at one."""

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
    """Smallest and largest share of the image's area that a random resized crop keeps; (1, 1): no random crop."""
    crop_ratio: Annotated[float, Field(ge=1)] = 4 / 3
    """Widest aspect ratio of a crop; the narrowest is its inverse."""
    flip: bool = True
    """Mirror half of the images left to right."""

    @model_validator(mode="after")
    def _ordered(self) -> AugmentationConfig:
        low, high = self.crop_scale
        if not 0 < low <= high:
            raise ValueError(f"augmentation.crop_scale={list(self.crop_scale)} must rise, above 0")
        return self


class TrainingConfig(Section, affects=("training",)):
    epochs: Annotated[PositiveInt, affects("training", "training_features")] = 5
    """Passes over the largest task's training images; smaller tasks repeat theirs."""
    batch_size: Annotated[PositiveInt, affects("training", "training_features")] = 16
    """Images of each task in a step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.0035
    """Peak rate of the optimizer."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Of all trained parameters: SGD's L2 penalty, AdamW's decay."""
    warmup_epochs: NonNegativeInt = 1
    """First epochs at warmup_learning_rate; then a cosine by epoch, whose period is `epochs`."""
    warmup_learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Rate of the warm-up epochs."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random changes of the training images."""
    checkpoint_every: Annotated[PositiveInt, affects()] = 1
    """Epochs between checkpoints, from which a training whose worker died goes on."""


class GlobalPromptConfig(Section, affects=("global_prompt",)):
    epochs: PositiveInt | None = None
    """Epochs of the prompt shared by all tasks; null: training.epochs."""
    snapshot_every: PositiveInt = 1
    """Steps between two snapshots of the tasks' gradients (they cost no extra backward pass)."""


class GroupingConfig(Section, affects=("grouping",)):
    affinity: Annotated[AffinityName, Field(description=f"Affinity of two tasks: {_AFFINITIES}.")] = "dot"
    per_layer: bool = False
    """Affinities of each layer's gradients by themselves, then their mean: under cosine every layer counts alike."""
    scaling_matrices: bool = True
    """Whether the gradients of the scaling matrices count beside those of the source prompt."""
    objective: Annotated[ObjectiveName, Field(description=f"What the best partition maximizes. {_OBJECTIVES}.")] = "sum"
    num_groups: PositiveInt | None = None
    """Exact number of groups; null: whatever is best."""
    min_size: PositiveInt = 1
    """Fewest tasks in a group."""
    max_size: PositiveInt | None = None
    """Most tasks in a group; null: no limit."""
    must_link: tuple[tuple[str, ...], ...] = ()
    """Lists of tasks that must be in one group: [[photo, art], [sketch, clipart]]."""
    cannot_link: tuple[tuple[str, ...], ...] = ()
    """Lists of tasks no two of which may be in one group."""
    time_limit_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds for the search of more than 20 tasks; then the best partition found is taken, and called so."""

    @property
    def constraints(self) -> dict[str, Any]:
        """As `best_partition` takes them."""
        return {
            name: getattr(self, name) for name in ("num_groups", "min_size", "max_size", "must_link", "cannot_link")
        }


class ClusterConfig(Section, affects=()):
    address: str | None = None
    """Ray cluster to join (`auto`, host:port); null: the one that the process has joined already (in a notebook), else
    that of RAY_ADDRESS, else a local Ray is started."""
    workers_per_training: PositiveInt = 1
    """Workers that share each step of one training (data parallel, by Ray Train), with the numbers of one worker.
    Worth it where a step is long; many trainings on one GPU each are faster than one after another on all."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a worker that trains, predicts or serves, or a fraction; null: 1 where the cluster has GPUs, else 0."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores of a worker; on CPU also its threads."""
    min_workers_per_training: PositiveInt | None = None
    """Fewest workers with which a shared training goes on while machines are away; null: all of them."""
    wait_for_nodes_s: NonNegative = 0
    """How long to wait for machines that an autoscaler starts, before a cluster that is too small is refused."""
    max_retries: NonNegativeInt = 3
    """How often a task whose worker died is started again."""


class TrackingConfig(Section, affects=()):
    uri: str | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, else SQLite and a folder under storage."""
    experiment: str = "mmap-clip"
    """Name of the MLflow experiment."""
    registered_model: Annotated[str, Field(pattern=r"^[^\s/:'\"][^/:'\"]*$", max_length=200)] | None = None
    """Name under which the run's last prompts (MmAP, grouped) become a version in MLflow's model registry; null: none
    (`jobs/register_model.py` does it for any finished run)."""


def source_columns(config: MmapConfig, text_width: int, vision_width: int) -> int:
    """n of Eqs. 6-7 for towers of these widths; a value that does not divide both is refused."""
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
