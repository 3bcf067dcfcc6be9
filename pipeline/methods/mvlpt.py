"""MVLPT with unified prompts (Shen et al., WACV 2024): CoOp's context and deep prompts of the image tower, mixed by one
small transformer block; trained on all tasks, then on each task alone.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.coop import Coop
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, Variant, method
from pipeline.seeds import derive_seed, normal

if TYPE_CHECKING:
    from pipeline.clip.towers import ClipTowers
    from pipeline.config import Config


@method("mvlpt")
class Mvlpt(Method):
    title = "MVLPT"
    variants = {
        "mvlpt": Variant("MVLPT", "mvlpt", "single-task", init_from="mvlpt_mt"),
        "mvlpt_mt": Variant("MVLPT, first stage", "mvlpt", "multi-task"),
    }

    class Options(MethodConfig):
        """MVLPT: mixed prompts of both towers, trained on all tasks, then on each."""

        prompt_length: PositiveInt = 4
        """Context vectors, and prompt vectors per layer of the image tower."""
        mixer_width: PositiveInt = 128
        """Width of the transformer block that mixes the prompts."""
        training: TrainingOverrides = TrainingOverrides(epochs=200, batch_size=32, learning_rate=0.002)

    def __init__(self, config: Config, towers: ClipTowers, class_names: ClassNames):
        super().__init__()
        self.tasks = tuple(class_names)
        options = config.section(Mvlpt.Options)
        length, width = options.prompt_length, options.mixer_width
        text_width, vision_width, depth = towers.text_width, towers.vision_width, towers.vision_depth
        init = partial(normal, std=0.02, seed=config.seed)
        self.context = nn.Parameter(init(length, text_width, purpose="mvlpt text"))
        self.vision_prompts = nn.Parameter(init(depth, length, vision_width, purpose="mvlpt vision"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "mvlpt mixer"))
            self.text_in, self.vision_in = nn.Linear(text_width, width), nn.Linear(vision_width, width)
            self.mixer = nn.TransformerEncoderLayer(
                width,
                nhead=1,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            self.text_out, self.vision_out = nn.Linear(width, text_width), nn.Linear(width, vision_width)

    def forward(self) -> Adaptation:
        depth, length, _ = self.vision_prompts.shape
        prompts = torch.cat([self.text_in(self.context), self.vision_in(self.vision_prompts.flatten(0, 1))])
        mixed = self.mixer(prompts[None])[0]  # ((1 + K) b, width), as one sequence
        text, vision = self.text_out(mixed[:length]), self.vision_out(mixed[length:]).unflatten(0, (depth, length))
        text, vision = (prompts.expand(len(self.tasks), -1, -1, -1) for prompts in (text[None], vision))
        return Adaptation(text, vision, text_prompts_propagate=True)

    template = staticmethod(Coop.template)

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(Mvlpt.Options).prompt_length
