"""What a method is: a class in a file of its own (docs/methods.md#adding-a-method)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator

from pipeline.config.fields import NonNegative, PositiveInt, Section
from pipeline.lazy_torch import Module
from pipeline.methods.adaptation import Adaptation

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config

ClassNames = Mapping[str, Sequence[str]]
"""Task → words of its classes by label."""
TaskScope = Literal["single-task", "multi-task", "found groups", "random groups"]
REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Variant:
    """A column of the report: a method, trained for these groups of tasks."""

    title: str
    method: str
    scope: TaskScope
    init_from: str | None = None
    """Variant whose trained state each training goes on from."""

    @property
    def uses_grouping(self) -> bool:
        """Whether the tasks' affinities or groups have to be known first."""
        return self.scope in ("found groups", "random groups") or REGISTRY[self.method].uses_affinities


class TrainingOverrides(Section, affects=("method",)):
    """Where a method's training differs from the section `training`; null: it does not."""

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


class MethodConfig(Section, affects=("method",)):
    """A method's section of the config; the defaults are its authors'."""

    training: TrainingOverrides = TrainingOverrides()
    """Where its training differs from `training`: as its authors train it. configs/paper_protocol.yaml trains all
    methods alike."""

    @model_validator(mode="before")
    @classmethod
    def _merge_with_defaults(cls, values: Any) -> Any:
        """Giving one value of a method's training leaves its others as they are."""
        if isinstance(values, dict) and isinstance(values.get("training"), dict):
            defaults = cls.model_fields["training"].default.model_dump()
            values = {**values, "training": {**defaults, **values["training"]}}
        return values


class Method(Module):
    """An object is the module that trains for one group of tasks."""

    name: ClassVar[str]
    """As `@method` registers it."""
    title: ClassVar[str]
    """In reports and messages."""
    Options: ClassVar[type[Section] | None] = None
    """Its section of the config, if it has any; `config.section(Coop.Options)` gives the values."""
    section: ClassVar[str | None] = None
    """Name of that section: that of the method, unless a class says another one."""
    variants: ClassVar[Mapping[str, Variant] | None] = None
    """None: `<name>`, which trains for each task alone, and `<name>_mt`, once for all tasks."""
    trainable: ClassVar[bool] = True
    """Whether there is anything to train."""
    trains_weights: ClassVar[bool] = False
    """Whether weights of the towers train, which are loaded in float32 then."""
    modifies_image_encoder: ClassVar[bool] = True
    """Whether the image tower gives other features than the frozen CLIP's; else those are computed once for all such
    methods."""
    uses_consistency: ClassVar[bool] = False
    """Whether it is held to the frozen CLIP's features of the training images."""
    uses_affinities: ClassVar[bool] = False
    """Whether its `build_tree(affinities)` wants to know how much the tasks' gradients agree."""

    @classmethod
    def build(cls, config: Config, towers: ClipTowers, class_names: ClassNames) -> Self:
        """The module as its training begins."""
        return cls(config, towers, class_names)

    def forward(self) -> Adaptation:
        """What it adds to the frozen towers, made anew in every training step."""
        raise NotImplementedError

    @staticmethod
    def template(of_config: str) -> str:
        """What the method makes of the text of a class."""
        return of_config

    @classmethod
    def templates_by_task(cls, config: Config, tasks: Iterable[str]) -> dict[str, str]:
        """Task → text of its classes, as the method takes it."""
        return {task: cls.template(config.clip.template_for(task)) for task in tasks}

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        """Text prompts that take positions of the model's context."""
        return 0

    @staticmethod
    def check(config: Config, towers: ClipTowers) -> None:
        """Raises: UserError: the options do not fit the towers, of which only the shapes are looked at."""


class WeightsMethod(Method):
    """Trains some weights of the towers, on a copy of its own, and adds nothing else."""

    trains_weights = True

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.towers = towers.trainable_copy(self.is_trained)

    @staticmethod
    def is_trained(name: str) -> bool:
        """Whether the parameter of the towers of that name trains."""
        raise NotImplementedError

    def forward(self) -> Adaptation:
        return Adaptation(towers=self.towers)


M = TypeVar("M", bound=Method)


def method(name: str) -> Callable[[type[M]], type[M]]:
    """Registers a subclass of Method."""

    def register(cls: type[M]) -> type[M]:
        assert name not in REGISTRY, f"two methods are called {name}"
        cls.name, cls.section = name, cls.section or (name if cls.Options else None)
        REGISTRY[name] = cls
        return cls

    return register
