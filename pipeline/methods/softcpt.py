"""SoftCPT (Ding et al., 2022): a linear map from the feature of each task's name to its CoOp context.

The name, after a few trained vectors, goes through the frozen text tower; its feature is mapped to the context of the
task's classes. Image features are CLIP's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pipeline.clip.class_tokens import class_tokens
from pipeline.clip.precision import autocast
from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.coop import Coop
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, Variant, method
from pipeline.seeds import normal

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("softcpt")
class SoftCpt(Method):
    title = "SoftCPT"
    modifies_image_encoder = False
    variants = {"softcpt": Variant("SoftCPT", "softcpt", "multi-task")}

    class Options(MethodConfig):
        """SoftCPT: contexts made from the tasks' names."""

        context_length: PositiveInt = 16
        """Context vectors per task."""
        meta_length: PositiveInt = 4
        """Trained vectors before the task's name."""
        training: TrainingOverrides = TrainingOverrides(epochs=50, batch_size=32, learning_rate=0.002)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        self._towers = (towers,)  # in a tuple, so that it is not a submodule
        self._precision = config.clip.precision
        options, width = config.section(SoftCpt.Options), towers.text_width
        init = partial(normal, std=0.02, seed=config.seed)
        self.meta_prompt = nn.Parameter(init(options.meta_length, width, purpose="softcpt meta"))
        shape = (towers.embed_dim, options.context_length, width)
        self.projection = nn.Parameter(init(*shape, purpose="softcpt projection"))  # (E, M, d_l)
        self.task_tokens = class_tokens(
            towers.tokenizer, "{}.", [[task.replace("_", " ")] for task in class_names], options.meta_length
        )

    def forward(self) -> Adaptation:
        (towers,) = self._towers
        meta = self.meta_prompt.expand(len(self.tasks), 1, -1, -1)
        with autocast(towers, self._precision):  # also outside a training step
            task_features = towers.encode_text(self.task_tokens.to(towers.device), meta, propagate=True)  # (T, E)
        context = torch.einsum("te,emd->tmd", task_features.to(self.projection.dtype), self.projection)
        return Adaptation(text_prompts=context[:, None], text_prompts_propagate=True)

    template = staticmethod(Coop.template)

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(SoftCpt.Options).context_length
