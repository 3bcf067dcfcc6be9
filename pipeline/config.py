"""Everything a run can be told, as one frozen tree: validated, from YAML and the command line, hashed.

Choices:
- the docstring under a field is its help text, on the command line and in docs/configuration.md;
- an unknown field or impossible value is refused by name, with the valid ones, before anything starts;
- defaults are the paper's settings (MmAP, AAAI 2024); what the paper leaves open is taken from MaPLe/Dassl.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import math
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from pipeline.errors import UserError, escaped

MAX_YAML_BYTES = 1 << 18
MAX_TEXT_BYTES = 256 << 20
_ROOT = Path(__file__).resolve().parent.parent
CONFIGS = next(
    (
        folder / "configs"
        for folder in (_ROOT, *(place / "share" / "mmap-clip" for place in (_ROOT, Path(sys.prefix))))
        if (folder / "configs" / "demo.yaml").is_file()
    ),
    _ROOT / "configs",
)
"""In a clone, or where a wheel puts it."""
DEMO_CONFIG = CONFIGS / "demo.yaml"
BUILTIN_DIGITS = "builtin:digits"

Share = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
NonNegative = Annotated[float, Field(ge=0)]


def _one_class_field(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("must contain {} exactly once, where the class name goes")
    return template


Template = Annotated[str, AfterValidator(_one_class_field)]

Method = Literal[
    "coop",
    "vpt",
    "maple",
    "clip_adapter",
    "joint_prompts",
    "mlp_prompts",
    "linear_probe",
    "lamm",
    "promptsrc",
    "bitfit",
    "full",
    "clip_lora",
    "coop_mt",
    "vpt_mt",
    "maple_mt",
    "clip_adapter_mt",
    "joint_prompts_mt",
    "mlp_prompts_mt",
    "linear_probe_mt",
    "lamm_mt",
    "promptsrc_mt",
    "bitfit_mt",
    "full_mt",
    "clip_lora_mt",
    "mvlpt",
    "mvlpt_mt",
    "softcpt",
    "hipro",
    "mmap_task_only",
    "mmap_group_only",
    "mmap_random_groups",
]
METHODS = ("zero_shot", *typing.get_args(Method), "all_in_one", "grouped")
"""The names of registry.VERSIONS, in its order, without the torch that it imports."""


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    def __hash__(self) -> int:
        return hash(content_hash(self))  # a mapping among the fields has none of its own

    @field_validator("*")
    @classmethod
    def _plain_text(cls, value: Any) -> Any:
        if isinstance(value, str) and value != escaped(value):
            raise ValueError("holds control characters, or is not UTF-8")
        return value


class DataConfig(Section):
    root: str | None = None
    """Folder of the images, <root>/<task>/<class>/*, or a table of them: a .csv, .tsv or .parquet file, or a folder of
    .parquet files (docs/datasets.md). `builtin:digits` writes the embedded handwritten digits."""
    layout: Literal[
        "auto", "folders", "split_folders", "manifest", "office_home", "mini_domainnet", "domainnet", "pacs"
    ] = "auto"
    """How the images lie under root: folders (task/class/image), split_folders (task/split/class/image or
    split/task/class/image), a manifest (table), or a data set as it is published (Office-Home's archive; folders with
    the image lists of MiniDomainNet, DomainNet or PACS). auto: recognised by what is there."""
    columns: dict[Literal["path", "task", "label", "split"], str] = {}
    """What a manifest calls its columns, where that is not path, task, label and split: {task: domain}."""
    given_splits: bool = False
    """Whether the data's own splits are respected: only images that it calls train are drawn as training images, and
    the test set is what it calls test; validation images are left out. false: all images of a class are one pool, and
    those that are not drawn test, as in the paper."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks to use (their folders); null: all that the layout has."""
    expected_images: dict[str, PositiveInt] | None = None
    """Task → number of images that its publishers count, or `a + b` → that of these tasks together. Another number is
    told at the start."""
    class_names: str | dict[str, str] | None = None
    """Text file of the classes to use, one a line: folder name, optionally a tab and the words to show to CLIP;
    `|` between several names of a class. Or task → such a file, for tasks of different classes. null: all class
    folders, `_` read as a space."""
    shots: PositiveInt = 6
    """Training images of each class in each task; the rest is the test set (see given_splits)."""
    max_dropped_share: Share = 0.0
    """Share of broken images (0 to 1) that may be dropped, recorded with the split; above it the run stops."""
    links_out_of_root: bool = False
    """Whether links, and paths of a manifest, may lead out of root, for data sets that are linked together; else such
    a one stops the run, so that a folder of somebody else's cannot show other files of yours."""


class ClipConfig(Section):
    model: str = "ViT-B-16-quickgelu"
    """Name of an open_clip ViT model, path of a model-config JSON, or `builtin:digits`."""
    pretrained: str | None = "openai"
    """open_clip tag, path of a weights file, `builtin:digits`, or null for random weights."""
    quick_gelu: bool | None = None
    """Activation of the weights' training: null takes what open_clip knows of the tag or model."""
    template: Template = "a photo of a {}."
    """Text of a class; {} is the class name."""
    task_templates: dict[str, Template] = {}
    """Task → text of its classes, where that is not `template`: {sketch: "a sketch of a {}."}."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the frozen towers; auto: bfloat16 autocast on a GPU that has it, float32 elsewhere.
    Prompts and optimizer state are float32 always."""
    activations_gib: Annotated[float, Field(gt=0)] = 6.0
    """GiB that each tower may keep for its backward pass. Images and classes that need more are run in chunks, and
    again in the backward pass: a third more time, and memory that no longer grows with them."""

    def template_of(self, task: str) -> str:
        return self.task_templates.get(task, self.template)


class MmapConfig(Section):
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
    text_order: Literal["after_sos", "before_sos"] = "after_sos"
    """Where text prompts stand: after the start token (CoOp, MaPLe), or before it (Eq. 9 to the letter)."""
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


class AugmentationConfig(Section):
    crop_scale: tuple[Share, Share] = (0.08, 1.0)
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


class TrainingConfig(Section):
    epochs: PositiveInt = 5
    """Passes over the largest task's training images; smaller tasks repeat theirs."""
    batch_size: PositiveInt = 16
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
    """First epochs at warmup_rate; then a cosine by epoch, whose period is `epochs`."""
    warmup_rate: Annotated[float, Field(gt=0)] = 1e-5
    """Rate of the warm-up epochs."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random changes of the training images."""
    checkpoint_every: PositiveInt = 1
    """Epochs between checkpoints, from which a training whose worker died goes on."""


class OwnTraining(Section):
    """Where a method's training differs from the section `training`; null: it does not."""

    epochs: PositiveInt | None = None
    """Instead of training.epochs."""
    batch_size: PositiveInt | None = None
    """Instead of training.batch_size."""
    optimizer: Literal["sgd", "adamw"] | None = None
    """Instead of training.optimizer."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Instead of training.learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Instead of training.weight_decay."""


class MethodConfig(Section):
    """Options of one method beside MmAP; the defaults are its authors'."""

    training: OwnTraining = OwnTraining()
    """Where its training differs from `training`: as its authors train it. configs/paper_protocol.yaml trains all
    methods alike."""

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, values: Any) -> Any:
        """Giving one value of a method's training leaves its others as they are."""
        if isinstance(values, dict) and isinstance(values.get("training"), dict):
            defaults = cls.model_fields["training"].default.model_dump()
            values = {**values, "training": {**defaults, **values["training"]}}
        return values


class CoopConfig(MethodConfig):
    context_length: PositiveInt = 16
    """Context vectors, which take the place of the template's words before the class name."""
    training: OwnTraining = OwnTraining(epochs=200, batch_size=32, learning_rate=0.002)


class VptConfig(MethodConfig):
    prompt_length: PositiveInt = 8
    """Prompt vectors in each layer of the image tower."""
    training: OwnTraining = OwnTraining(epochs=5, batch_size=4, learning_rate=0.0025)


class MapleConfig(MethodConfig):
    prompt_length: PositiveInt = 2
    """Text prompt vectors in a layer; those of the first layer start as the template's first words."""
    depth: PositiveInt = 9
    """Layers, from the first, that get new prompts."""
    training: OwnTraining = OwnTraining(epochs=5, batch_size=4, learning_rate=0.0035)


class ClipAdapterConfig(MethodConfig):
    reduction: PositiveInt = 4
    """How much narrower the bottleneck is than the image feature."""
    ratio: Share = 0.2
    """Share of the bottleneck's output in the adapted feature."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=32, learning_rate=0.002)


class JointPromptsConfig(MethodConfig):
    prompt_length: PositiveInt = 8
    """Prompt vectors in each layer of each tower."""


class MlpPromptsConfig(MethodConfig):
    prompt_length: PositiveInt = 4
    """Prompt vectors in each layer."""
    source_width: PositiveInt = 256
    """Width of the source prompt that the linear layers map to both towers."""


class ClipLoraConfig(MethodConfig):
    rank: PositiveInt = 2
    """Rank of the update of each query, key and value matrix."""
    alpha: Annotated[float, Field(gt=0)] = 1.0
    """The update is scaled by alpha over the rank's root."""
    training: OwnTraining = OwnTraining(
        epochs=250, batch_size=32, optimizer="adamw", learning_rate=2e-4, weight_decay=0.01
    )


class LinearProbeConfig(MethodConfig):
    training: OwnTraining = OwnTraining(epochs=20, batch_size=32, optimizer="adamw", learning_rate=1e-3)


class LammConfig(MethodConfig):
    embedding_weight: NonNegative = 1.0
    """Weight of the squared distance of the trained embeddings from their start."""
    text_weight: NonNegative = 1.0
    """Weight of the cosine distance from the frozen text features."""
    logits_weight: NonNegative = 0.05
    """Weight of the divergence from the frozen CLIP's logits."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=32, learning_rate=0.002)


class PromptSrcConfig(MethodConfig):
    prompt_length: PositiveInt = 4
    """Prompt vectors in a layer of each tower; the first text layer's start as the template's first words."""
    depth: PositiveInt = 9
    """Layers, from the first, that get new prompts."""
    image_weight: NonNegative = 10.0
    """Weight of the mean absolute distance from the frozen image features."""
    text_weight: NonNegative = 25.0
    """Weight of the mean absolute distance from the frozen text features."""
    logits_weight: NonNegative = 1.0
    """Weight of the divergence from the frozen CLIP's logits."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=4, learning_rate=0.0025)


class MvlptConfig(MethodConfig):
    prompt_length: PositiveInt = 4
    """Context vectors, and prompt vectors in each layer of the image tower."""
    mixer_width: PositiveInt = 128
    """Width of the transformer block that mixes the prompts."""
    training: OwnTraining = OwnTraining(epochs=200, batch_size=32, learning_rate=0.002)


class SoftCptConfig(MethodConfig):
    context_length: PositiveInt = 16
    """Context vectors that are made for each task."""
    meta_length: PositiveInt = 4
    """Trained vectors before the task's name."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=32, learning_rate=0.002)


class HiProConfig(MethodConfig):
    context_length: PositiveInt = 16
    """Context vectors of each node of the tree of tasks."""
    training: OwnTraining = OwnTraining(epochs=50, batch_size=32, learning_rate=0.002)


class BitFitConfig(MethodConfig):
    training: OwnTraining = OwnTraining(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01)


class FullConfig(MethodConfig):
    training: OwnTraining = OwnTraining(optimizer="adamw", learning_rate=1e-5, weight_decay=0.1)


class GlobalPromptConfig(Section):
    epochs: PositiveInt | None = None
    """Epochs of the prompt shared by all tasks; null: training.epochs."""
    snapshot_every: PositiveInt = 1
    """Steps between two snapshots of the tasks' gradients (they cost no extra backward pass)."""


class GroupingConfig(Section):
    affinity: Literal["dot", "cosine"] = "dot"
    """Dot product of the tasks' gradients (Eq. 8), or their cosine."""
    per_layer: bool = False
    """Affinities of each layer's gradients by themselves, then their mean: under cosine every layer counts alike."""
    scaling_matrices: bool = True
    """Whether the gradients of the scaling matrices count beside those of the source prompt."""
    objective: Literal["sum", "mean", "density"] = "sum"
    """What the best partition maximises: sum of the pairwise affinities in groups (the paper); the sum of each task's
    mean affinity to its group (TAG), which favours groups of two and three; or density, the affinities in a group over
    its number of tasks, in between."""
    num_groups: PositiveInt | None = None
    """Exact number of groups; null: whatever is best."""
    min_size: PositiveInt = 1
    """Fewest tasks in a group."""
    max_size: PositiveInt | None = None
    """Most tasks in a group; null: no limit."""
    together: tuple[tuple[str, ...], ...] = ()
    """Lists of tasks that must be in one group: [[photo, art], [sketch, clipart]]."""
    apart: tuple[tuple[str, ...], ...] = ()
    """Lists of tasks no two of which may be in one group."""
    time_limit_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds for the search of more than 20 tasks; then the best partition found is taken, and called so."""

    @property
    def constraints(self) -> dict[str, Any]:
        """As `best_partition` takes them."""
        return {name: getattr(self, name) for name in ("num_groups", "min_size", "max_size", "together", "apart")}


class ClusterConfig(Section):
    address: str | None = None
    """Ray cluster to join (`auto`, host:port); null: the one that the process has joined already (in a notebook), else
    that of RAY_ADDRESS, else a local Ray is started."""
    workers_per_training: PositiveInt = 1
    """Workers that share each step of one training (data parallel, by Ray Train), with the numbers of one worker.
    Worth it where a step is long; many trainings on one GPU each are faster than one after another on all."""
    gpus_per_training: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a training's worker, whole or a fraction; null: 1 where the cluster has GPUs, else 0."""
    cpus_per_training: PositiveInt = 1
    """CPU cores of a training's worker; on CPU also its threads."""
    min_workers_per_training: PositiveInt | None = None
    """Fewest workers with which a shared training goes on while machines are away; null: all of them."""
    wait_for_nodes_s: NonNegative = 0
    """How long to wait for machines that an autoscaler starts, before a cluster that is too small is refused."""
    max_retries: NonNegativeInt = 3
    """How often a task whose worker died is started again."""


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, else SQLite and a folder under storage."""
    experiment: str = "mmap-clip"
    """Name of the MLflow experiment."""
    registered_model: Annotated[str, Field(pattern=r"^[^\s/:'\"][^/:'\"]*$", max_length=200)] | None = None
    """Name under which the run's last prompts (MmAP, grouped) become a version in MLflow's model registry; null: none
    (`jobs/register_model.py` does it for any finished run)."""


class Config(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)] = "mmap"
    """Name of the run in reports and MLflow."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 1
    """Seed of the few-shot sampling, the prompts' start, batches and augmentation."""
    storage: str = "mmap-runs"
    """Where everything made goes: a folder, on a cluster one that all machines share, or a bucket (s3://bucket/folder;
    credentials and AWS_ENDPOINT_URL come from the environment). A relative folder lies in the working directory, or in
    the home directory for a submitted Ray job, whose working directory is a passing copy."""
    cache: str = "~/.cache/mmap-clip"
    """Folder on every machine for copies of what lies in a bucket; may be emptied when no run is at work."""
    data: DataConfig = DataConfig()
    """Images and few-shot splits (stage 1)."""
    clip: ClipConfig = ClipConfig()
    """The frozen CLIP."""
    mmap: MmapConfig = MmapConfig()
    """Shape of the multi-modal alignment prompts."""
    compare: tuple[Method, ...] = ()
    """Other methods to train and evaluate beside MmAP, each task for itself, or with `_mt` one for all tasks; and
    MmAP's own ablations (docs/methods.md)."""
    coop: CoopConfig = CoopConfig()
    """CoOp: text context."""
    vpt: VptConfig = VptConfig()
    """VPT: prompts of the image tower."""
    maple: MapleConfig = MapleConfig()
    """MaPLe: text prompts mapped into the image tower."""
    clip_adapter: ClipAdapterConfig = ClipAdapterConfig()
    """CLIP-Adapter: a bottleneck on image features."""
    joint_prompts: JointPromptsConfig = JointPromptsConfig()
    """Prompts of both towers with nothing in common (ablation)."""
    mlp_prompts: MlpPromptsConfig = MlpPromptsConfig()
    """Prompts of both towers made by linear layers (ablation)."""
    clip_lora: ClipLoraConfig = ClipLoraConfig()
    """CLIP-LoRA: low-rank updates of the attention matrices of both towers."""
    linear_probe: LinearProbeConfig = LinearProbeConfig()
    """Linear probe: a weight vector for each class."""
    lamm: LammConfig = LammConfig()
    """LAMM: trained class names."""
    promptsrc: PromptSrcConfig = PromptSrcConfig()
    """PromptSRC: prompts of both towers, held to the frozen CLIP."""
    mvlpt: MvlptConfig = MvlptConfig()
    """MVLPT: mixed prompts of both towers, trained on all tasks, then on each."""
    softcpt: SoftCptConfig = SoftCptConfig()
    """SoftCPT: contexts made from the tasks' names."""
    hipro: HiProConfig = HiProConfig()
    """HiPro: a tree of contexts."""
    bitfit: BitFitConfig = BitFitConfig()
    """BitFit: the biases of both towers."""
    full: FullConfig = FullConfig()
    """Full fine-tuning."""
    training: TrainingConfig = TrainingConfig()
    """How prompts are trained (stages 2 and 4)."""
    global_prompt: GlobalPromptConfig = GlobalPromptConfig()
    """The prompt shared by all tasks and its gradient snapshots (stage 2)."""
    grouping: GroupingConfig = GroupingConfig()
    """How tasks are partitioned (stage 3)."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""


_DEFAULTS = Config()


def content_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of a JSON-like value or config section; equal values hash equally."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def parse_config(values: dict[str, Any]) -> Config:
    """Config from nested plain values; every fault is named in one UserError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        section = _section_at(path[:-1])
        valid = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], valid, n=1)
        hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else ""
        return f"unknown config field {name}{hint} Valid here: {', '.join(valid)}"
    message: str = fault["msg"].removeprefix("Value error, ")
    if name and not message.startswith(path[0] + "."):
        value = repr(fault["input"])
        return f"{name}={value if len(value) <= 200 else value[:200] + '...'}: {message}"
    return message


def _section_at(path: Sequence[str]) -> type[Section]:
    section: type[Section] = Config
    for part in path:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, Section)
        section = annotation
    return section


def read_text(path: Path, name: str, errors: str = "strict", limit: int = MAX_TEXT_BYTES) -> str:
    """A text file of the user's; `name` is what faults call it.

    Raises:
        UserError: no file, larger than `limit` bytes, not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{name} is no file")
    try:
        if (size := path.stat().st_size) > limit:
            raise UserError(f"{name} has {size:,} bytes, more than {limit:,}: it is no such text file")
        data = path.read_bytes()
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} is not UTF-8 text: line {line}: {error.reason}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None


class _PlainYaml(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML brings no types
    """Plain values only. Neither tags that make Python objects, nor a name given twice, of which YAML takes the last,
    nor aliases, by which a few lines make billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.MarkedYAMLError(problem=f"*{alias.anchor}: write the value out", problem_mark=alias.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and (name.tag, name.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"{name.value[:80]} is given twice", problem_mark=name.start_mark)
            seen.add((name.tag, str(name.value)))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > 64:
                raise ValueError
            return value
        except (ValueError, LookupError, AttributeError):  # PyYAML's own on `!!int x`, 2024-13-45, 5000 digits
            kind, value = node.tag.rpartition(":")[2], str(node.value)[:40]
            raise yaml.MarkedYAMLError(problem=f"{value!r} is no {kind}", problem_mark=node.start_mark) from None


def _parse_yaml(text: str, name: str) -> Any:
    """Raises: yaml.YAMLError"""
    try:
        loader = _PlainYaml(text)
        loader.name = name
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def load_yaml(path: Path) -> dict[str, Any]:
    """Nested values of a YAML file.

    Raises:
        UserError: no file, more than MAX_YAML_BYTES, not UTF-8, not plain YAML (by its line), no fields and values.
    """
    if not path.is_file():
        raise UserError(f"config file {path} does not exist")
    try:
        values = _parse_yaml(read_text(path, f"config file {path}", limit=MAX_YAML_BYTES), str(path))
    except yaml.YAMLError as error:
        raise UserError(f"config file {path} is not plain YAML: {error}") from None
    if not isinstance(values, dict | None):
        raise UserError(f"config file {path} must hold fields and values, not {type(values).__name__}")
    return values or {}


def given_or_shipped(path: Path) -> Path:
    """The path itself, or, where there is no such file and it begins with `configs`, the one that comes with this
    package."""
    shipped = CONFIGS.parent / path
    is_shipped = path.parts[:1] == (CONFIGS.name,) and not path.exists() and shipped.exists()
    return shipped if is_shipped else path


def to_yaml(config: Config) -> str:
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def fields(defaults: Section = _DEFAULTS, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """All leaf fields as (dotted name, field, default), in order."""
    for name, field in type(defaults).model_fields.items():
        default = getattr(defaults, name)
        if isinstance(default, Section):
            yield from fields(default, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field, default


def add_config_arguments(parser: argparse.ArgumentParser, base: str = "configs/demo.yaml, the embedded digits") -> None:
    """`--config FILE` and one `--section.field VALUE` for every field, with its documentation and default; `base` says
    which values these go over."""
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=f"YAML files of the run, later ones over earlier ones (without: {base})",
    )
    groups: dict[str, Any] = {}
    for name, field, default in fields():
        section = name.rpartition(".")[0]
        if section not in groups:
            title = f"config: {section}" if section else "config"
            groups[section] = parser.add_argument_group(title, _section_help(section))
        text = " ".join((field.description or "").split()).replace("%", "%%")
        valid = f" One of: {', '.join(map(str, choices(field)))}." if choices(field) else ""
        groups[section].add_argument(
            f"--{name}",
            dest=f"config.{name}",
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{text}{valid} (default: {json.dumps(default)})",
        )


def _section_help(path: str) -> str | None:
    if not path:
        return "Values on the command line go before those of the file; lists are written [a, b]."
    parent, _, name = path.rpartition(".")
    field = _section_at(parent.split(".") if parent else []).model_fields[name]
    return field.description or field.annotation.__doc__


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """Values of a field that has only these."""
    return typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()


def arguments_of(parser: argparse.ArgumentParser, command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line gives; `parser` has the config arguments.

    Raises:
        UserError: an option that is not known.
    """
    arguments, unknown = parser.parse_known_args(command_line)
    if unknown:
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name, [f"--{field}" for field, *_ in fields()], n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown option {name}{hint} --help lists them all")
    return arguments


def config_from_command_line(
    parser: argparse.ArgumentParser, command_line: Sequence[str] | None = None, base: Path | None = None
) -> Config:
    """The values of --config (without: of the demo), and of the command line over them, validated; `parser` has the
    config arguments. `base`: a file under those of --config, instead of the demo."""
    arguments = arguments_of(parser, command_line)
    values: dict[str, Any] = {}
    files = arguments.config or ([] if base else [DEMO_CONFIG])
    for file in ([base] if base else []) + files:
        values = _over(values, load_yaml(given_or_shipped(file)))
    for key, text in vars(arguments).items():
        if key.startswith("config."):
            *path, name = key.removeprefix("config.").split(".")
            try:
                nested: Any = {name: _parse_yaml(text, f"--{'.'.join([*path, name])}")}
            except yaml.YAMLError:
                nested = {name: text}
            for part in reversed(path):
                nested = {part: nested}
            values = _over(values, nested)
    return parse_config(values)


def _over(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for name, value in changes.items():
        before = merged.get(name)
        merged[name] = _over(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged
