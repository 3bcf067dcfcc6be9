"""Base classes of methods; each method is a class in its own file (docs/methods.md#adding-a-method)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from pipeline.clip.class_tokens import ClassTokens, class_tokens
from pipeline.clip.tokenizer import Tokenizer
from pipeline.config.fields import NonNegative, NonNegativeInt, PositiveInt, Section
from pipeline.config.sections import AggregationName
from pipeline.lazy_torch import Module, nn, torch
from pipeline.methods.adaptation import Adaptation

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config

ClassNames = Mapping[str, Sequence[str]]
"""Task → names of its classes by label."""
TaskScope = Literal["single-task", "multi-task", "found groups", "random groups"]
REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Variant:
    """A column of the report: a method, and for which groups of tasks it is trained."""

    title: str
    method: str
    scope: TaskScope
    init_from: str | None = None
    """Variant whose trained states of the same tasks each training starts from, or a merged method is merged from."""

    @property
    def uses_grouping(self) -> bool:
        """True if the tasks' groups are needed before the training."""
        return self.scope in ("found groups", "random groups")

    @property
    def uses_gradients(self) -> bool:
        """True if the affinities of the tasks' gradients are needed before the training."""
        return REGISTRY[self.method].uses_affinities


class TrainingOverrides(Section, affects=("method",)):
    """Training settings of a method that override the section `training`; null: not overridden."""

    epochs: PositiveInt | None = None
    """Instead of training.epochs."""
    batch_size: PositiveInt | None = None
    """Instead of training.batch_size."""
    optimizer: Literal["sgd", "adamw"] | None = None
    """Instead of training.optimizer."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Instead of training.learning_rate."""
    weight_decay: NonNegative | None = None
    """Instead of training.weight_decay."""
    warmup_epochs: NonNegativeInt | None = None
    """Instead of training.warmup_epochs."""
    min_learning_rate: NonNegative | None = None
    """Instead of training.min_learning_rate."""
    schedule_interval: Literal["epoch", "step"] | None = None
    """Instead of training.schedule_interval."""
    aggregation: AggregationName | None = None
    """Instead of training.aggregation."""


class MethodConfig(Section, affects=("method",)):
    """A method's section of the config; the defaults are its authors'."""

    training: TrainingOverrides = TrainingOverrides()
    """Overrides of `training`, by default the authors' settings. configs/paper_protocol.yaml trains all methods
    alike."""

    @model_validator(mode="before")
    @classmethod
    def _merge_with_defaults(cls, values: Any) -> Any:
        """Keep the default overrides that are not given."""
        if isinstance(values, dict) and isinstance(values.get("training"), dict):
            defaults = cls.model_fields["training"].default.model_dump()
            values = {**values, "training": {**defaults, **values["training"]}}
        return values


class Method(Module):
    """A module that trains for one group of tasks."""

    name: ClassVar[str]
    """Name given to `@method`."""
    title: ClassVar[str]
    """Name in reports and messages."""
    Options: ClassVar[type[Section] | None] = None
    """Its section of the config, if any; `config.section(Coop.Options)` returns the values."""
    section: ClassVar[str | None] = None
    """Name of that section, by default the method's."""
    variants: ClassVar[Mapping[str, Variant] | None] = None
    """None: `<name>` (single-task) and `<name>_mt` (multi-task)."""
    trainable: ClassVar[bool] = True
    """Whether it learns from the training images."""
    takes_steps: ClassVar[bool] = True
    """Whether training steps update its parameters; a FittedMethod may do without."""
    merges: ClassVar[bool] = False
    """Whether its parameters are merged from the trained states of `Variant.init_from`, and not trained."""
    mixes_tasks: ClassVar[bool] = True
    """Whether a step's batch is drawn from the images of all tasks, with one mean loss; otherwise each task has its own
    batch, and the loss is the sum of the tasks' means (Eq. 11)."""
    trains_weights: ClassVar[bool] = False
    """Whether it trains weights of the towers, which are then loaded in float32."""
    exports_weights: ClassVar[bool] = False
    """Whether what it trains are weights of the towers, or updates that can be merged into them, and nothing else."""
    modifies_image_encoder: ClassVar[bool] = True
    """Whether image features differ from the frozen CLIP's, which are otherwise computed once and shared."""
    uses_consistency: ClassVar[bool] = False
    """Whether its loss compares with the frozen CLIP's features of the training images."""
    takes_several_labels: ClassVar[bool] = True
    """Whether it can train where images may have several labels, and each class has a probability of its own."""
    uses_affinities: ClassVar[bool] = False
    """Whether it has a `build_tree(affinities)`, which takes the tasks' gradient affinities."""

    @classmethod
    def build(cls, config: Config, towers: ClipTowers, class_names: ClassNames) -> Self:
        """Build the module at the start of its training."""
        return cls(config, towers, class_names)

    def forward(self) -> Adaptation:
        """Return the adaptation of the frozen towers, in every training step."""
        raise NotImplementedError

    def shared_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that all tasks share, of a method that does not mix tasks; each other parameter has an
        entry per task along its axis 0."""
        raise NotImplementedError

    def task_gradients(self) -> torch.Tensor:
        """Return each task's gradient (T, P) of the shared parameters, in their order, after one backward pass through
        the sum of the tasks' losses."""
        raise NotImplementedError

    @classmethod
    def tasks_per_set(cls, tasks: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the tasks of each training set of a training of `tasks`."""
        return [tuple(tasks)] if cls.mixes_tasks else [(task,) for task in tasks]

    @staticmethod
    def epoch_weights(epochs: int) -> Sequence[float] | None:
        """Return the weight of each epoch in the average of the parameters that a training ends with; None: it ends
        with those of the last epoch."""
        return None

    def stage_steps(self, num_steps: int) -> Sequence[int]:
        """Return the number of steps of each stage of a training of `num_steps` steps; a stage has its own schedule of
        the learning rate."""
        return (num_steps,)

    def start_stage(self, stage: int, class_features: Sequence[torch.Tensor]) -> None:
        """Prepare the module for a stage after the first, before its first step; not called for a stage without steps.

        Args:
            stage: its number, from 1.
            class_features: (C, E) of each task, at the end of the stage before.
        """

    @staticmethod
    def template(config_template: str, config: Config) -> str:
        """Return the template that the method uses instead of the config's."""
        return config_template

    @classmethod
    def has_parameters(cls) -> bool:
        """Return True if the method has parameters to save, trained or merged."""
        return cls.trainable or cls.merges

    @classmethod
    def needs_image_layers(cls) -> bool:
        """Return True if the method adds to the layers of the image tower, which some towers do not offer."""
        return cls.modifies_image_encoder

    @classmethod
    def num_views(cls, config: Config) -> int:
        """Return the number of augmented views of each training image whose frozen features it is fitted to."""
        return 0

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        """Return the number of text prompts that take positions of the model's context."""
        return 0

    @staticmethod
    def num_replaced_tokens(config: Config) -> int:
        """Return the number of the template's first tokens that text prompts replace."""
        return 0

    @classmethod
    def tokenize(cls, config: Config, tokenizer: Tokenizer, class_names: ClassNames) -> ClassTokens:
        """Tokenize the tasks' classes in their templates, as the method uses them.

        Raises:
            UserError: as `class_tokens`.
        """
        return class_tokens(
            tokenizer,
            [cls.template(config.clip.template_for(task), config) for task in class_names],
            list(class_names.values()),
            cls.num_prompt_positions(config),
            cls.num_replaced_tokens(config),
        )

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: the options do not fit the towers, of which only the shapes are used."""


class FitConfig(Section, affects=("method",)):
    """Section of a FittedMethod; the defaults are its authors'."""

    views: PositiveInt = 10
    """Augmented views of each training image, to whose features the method is fitted."""


class FittedMethod(Method):
    """A method that is fitted to the frozen CLIP's features of the training images, before any training steps.

    Classes with equal names are one class, also across tasks: the images of all tasks count, and each task is predicted
    among its own classes. Parameters that are computed without a loss require no gradient, and are not counted as
    trained.
    """

    modifies_image_encoder = False
    takes_steps = False
    takes_several_labels = False  # it is fitted to one class per image
    Options: ClassVar[type[FitConfig]]
    per_image: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors with a row for each training image, whose number it has only after `fit` or loading."""

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        names = dict.fromkeys(name for task in class_names for name in class_names[task])
        index_by_name = {name: index for index, name in enumerate(names)}
        self.num_classes = len(index_by_name)
        self.classes = [[index_by_name[name] for name in class_names[task]] for task in class_names]
        """Of each task, the indices of its classes among those of all tasks."""
        self.views = self.num_views(config)
        dtype = torch.promote_types(towers.logit_scale.dtype, torch.float32)
        self.zeros = partial(torch.zeros, dtype=dtype, device=towers.device)

    @classmethod
    def num_views(cls, config: Config) -> int:
        return config.section(cls.Options).views

    def fit(
        self, features: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], text_features: Sequence[torch.Tensor]
    ) -> None:
        """Compute the parameters from all tasks' training images, in float64.

        Args:
            features: of each task's images (n, V, E), by the frozen image tower, of V augmented views.
            labels: (n,) of each task's images.
            text_features: of each task's classes (C, E), by the frozen text tower.
        """
        raise NotImplementedError

    def class_indices(self, labels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the labels (n,) of each task's images as indices among the classes of all tasks."""
        return [torch.tensor(classes, device=indices.device)[indices] for classes, indices in zip(self.classes, labels)]

    def logits(self, classes: list[int], x: torch.Tensor, z: torch.Tensor, clip_logits: torch.Tensor) -> torch.Tensor:
        """Return logits (B, C) for the classes of a task; other arguments as of `Adaptation.task_logits`."""
        raise NotImplementedError

    def forward(self) -> Adaptation:
        return Adaptation(task_logits=tuple(partial(self.logits, classes) for classes in self.classes))

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *arguments: Any) -> None:
        """Take the number of training images from the state."""
        present = [state_dict[prefix + name] for name in self.per_image if prefix + name in state_dict]
        rows = present[0].shape[:1] if present else (0,)
        for name in self.per_image:
            tensor: torch.Tensor = getattr(self, name)
            tensor.data = tensor.new_empty(*rows, *tensor.shape[1:])
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class WeightsMethod(Method):
    """A method that trains some weights of the towers, on its own copy, and adds nothing else."""

    trains_weights = True
    exports_weights = True

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.towers = towers.trainable_copy(self.is_trained)

    @classmethod
    def needs_image_layers(cls) -> bool:
        return False

    @staticmethod
    def is_trained(module: nn.Module, name: str) -> bool:
        """Return True if the parameter of this name in a module of the towers is trained."""
        raise NotImplementedError

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)


M = TypeVar("M", bound=Method)


def method(name: str) -> Callable[[type[M]], type[M]]:
    """Register a subclass of Method under `name`."""

    def register(cls: type[M]) -> type[M]:
        assert name not in REGISTRY, f"two methods are called {name}"
        cls.name, cls.section = name, cls.section or (name if cls.Options else None)
        REGISTRY[name] = cls
        return cls

    return register
