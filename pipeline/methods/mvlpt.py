"""MVLPT with unified prompts (Shen et al., WACV 2024): a text context and deep prompts of the image tower, mixed by one
small transformer block; trained on all tasks, then on each task alone.

Half of the context precedes the class name and half follows it: `[c1] [c2] {} [c3] [c4].` It propagates through all
layers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from pipeline.clip.class_tokens import ClassTokens
from pipeline.config.fields import PositiveInt
from pipeline.lazy_torch import nn, torch
from pipeline.methods.adaptation import Adaptation
from pipeline.methods.method import ClassNames, Method, MethodConfig, TrainingOverrides, Variant, method
from pipeline.seeds import derive_seed, normal, uniform

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
        self._towers = (towers,)  # in a tuple, so that it is not a submodule
        after_name = towers.tokenizer.encode(self.template("", config).removeprefix("{}"))
        self._num_last_tokens = len(after_name) + len(towers.tokenizer.end)
        options = config.section(Mvlpt.Options)
        length, width = options.prompt_length, options.mixer_width
        text_width, vision_width, depth = towers.text_width, towers.vision_width, towers.vision_depth
        self.context = nn.Parameter(normal(length, text_width, std=0.02, seed=config.seed, purpose="mvlpt text"))
        patches = next(module for module in towers.modules() if isinstance(module, nn.Conv2d))
        bound = math.sqrt(6 / (3 * math.prod(patches.kernel_size) + vision_width))  # Glorot's
        prompts = uniform(depth, length, vision_width, bound=bound, seed=config.seed, purpose="mvlpt vision")
        self.vision_prompts = nn.Parameter(prompts)  # (K, b, d_v)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "mvlpt mixer"))
            self.text_in, self.vision_in = nn.Linear(text_width, width), nn.Linear(vision_width, width)
            self.mixer = nn.TransformerEncoderLayer(
                width,
                nhead=1,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation=quick_gelu,
                batch_first=True,
                norm_first=True,
            )
            self.text_out, self.vision_out = nn.Linear(width, text_width), nn.Linear(width, vision_width)

    def forward(self) -> Adaptation:
        depth, length, _ = self.vision_prompts.shape
        prompts = torch.cat([self.text_in(self.context), self.vision_in(self.vision_prompts.flatten(0, 1))])
        mixed = self.mixer(prompts[None])[0]  # ((1 + K) b, width), as one sequence
        text, vision = self.text_out(mixed[:length]), self.vision_out(mixed[length:]).unflatten(0, (depth, length))
        before, after = text.split([length // 2, length - length // 2])
        before, vision = (prompts.expand(len(self.tasks), -1, -1, -1) for prompts in (before[None], vision))
        embeddings = partial(self._embed_suffix, after)
        return Adaptation(before, vision, text_prompts_propagate=True, word_embeddings=embeddings)

    def _embed_suffix(self, context: torch.Tensor, tokens: ClassTokens) -> torch.Tensor:
        """Embed the suffix with context (b, d_l) in place of the placeholders of `template`."""
        (towers,) = self._towers
        embeddings: torch.Tensor = towers.token_embedding(tokens.suffix)  # (R, S, d_l)
        rows = torch.arange(len(embeddings), device=tokens.suffix.device)[:, None]
        first = tokens.eot[:, None] + 1 - self._num_last_tokens
        columns = first + torch.arange(len(context), device=tokens.suffix.device)
        return embeddings.index_put((rows, columns), context.to(embeddings.dtype).expand(len(rows), -1, -1))

    @staticmethod
    def template(config_template: str, config: Config) -> str:
        """Keep only the class name, with placeholders for the context after it."""
        length = config.section(Mvlpt.Options).prompt_length
        return "{}" + " X" * (length - length // 2) + "."

    @staticmethod
    def num_prompt_positions(config: Config) -> int:
        return config.section(Mvlpt.Options).prompt_length // 2


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Activation of OpenAI's CLIP, of whose blocks the mixer is one."""
    return x * torch.sigmoid(1.702 * x)
