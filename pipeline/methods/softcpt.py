"""SoftCPT (Ding et al., 2022): one linear map makes each task's CoOp context from the task's name.

The name, behind a few trained vectors, goes through the frozen text tower; its feature is mapped to the context of the
task's classes. Images are CLIP's own.
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
        """Context vectors that are made for each task."""
        meta_length: PositiveInt = 4
        """Trained vectors before the task's name."""
        training: TrainingOverrides = TrainingOverrides(epochs=50, batch_size=32, learning_rate=0.002)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        self._towers = (towers,)  # in a tuple, so that it is not a part of this module
        self._precision = config.clip.precision
        options, width = config.section(SoftCpt.Options), towers.text_width
        start = partial(normal, std=0.02, seed=config.seed)
        self.meta_prompt = nn.Parameter(start(options.meta_length, width, purpose="softcpt meta"))
        shape = (towers.embed_dim, options.context_length, width)
        self.projection = nn.Parameter(start(*shape, purpose="softcpt projection"))  # (E, M, d_l)
        self.names = class_tokens(
            towers.tokenizer, "{}.", [[task.replace("_", " ")] for task in class_names], options.meta_length
        )

    def forward(self) -> Adaptation:
        (towers,) = self._towers
        meta = self.meta_prompt.expand(len(self.tasks), 1, -1, -1)
        with autocast(towers.device, self._precision):  # also where a trained model is built, outside a training step
            of_tasks = towers.encode_text(self.names.to(towers.device), meta, propagate=True)  # (T, E)
        context = torch.einsum("te,emd->tmd", of_tasks.to(self.projection.dtype), self.projection)
        return Adaptation(text_prompts=context[:, None], text_prompts_propagate=True)

    template = staticmethod(Coop.template)

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(SoftCpt.Options).context_length
