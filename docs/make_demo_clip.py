"""Train the demo's tiny CLIP from scratch: `python docs/make_demo_clip.py` (minutes on 2 cores).

Training images are the base digits reserved for it, with random poses and plain colors, mostly dark on light and
sometimes light on dark; captions name the digit and sometimes the style. An image and a caption are a positive pair
if the caption is true of the image, so an image may have several positives in a batch.
"""

import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from pipeline.clip.torchvision_compat import ensure_torchvision
from pipeline.demo import digits
from pipeline.demo.digits import CLASSES, SIZE, read_base_digits, split_base_digits, strokes

ensure_torchvision()
import open_clip  # noqa: E402 - needs torchvision importable first

CONFIG = Path(digits.__file__).with_name("digits_clip.json")
WEIGHTS = CONFIG.with_suffix(".safetensors")
STEPS = 900
BATCH = 256
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
WARMUP = 100
TEMPLATES_PER_STEP = 3  # more than those of one polarity, so that every image has a true caption
LIGHT_ON_DARK = 0.025
SEED = 0

# Template, and whether it asserts light on dark; None: true of every image.
TEMPLATES = (
    ("a photo of the digit {}.", None),
    ("the digit {}.", None),
    ("a handwritten {}.", None),
    ("a photo of the dark digit {} on light paper.", False),
    ("a dark {} in ink.", False),
    ("a photo of the light digit {} on a dark board.", True),
    ("a bright {} in the dark.", True),
)


def pose(stroke: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn, scale, shear, shift and bend strokes (n, 1, 32, 32) at random."""
    n = len(stroke)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, scale = uniform(-0.25, 0.25), uniform(0.9, 1.25)
    cos, sin, shear = scale * angle.cos(), scale * angle.sin(), uniform(-0.2, 0.2)
    rows = [cos, shear - sin, uniform(-0.15, 0.15), sin, cos, uniform(-0.15, 0.15)]
    affine = torch.stack(rows, 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(stroke.shape), align_corners=False)
    bend = F.interpolate(uniform(-0.12, 0.12, 2, 5, 5), size=SIZE, mode="bicubic", align_corners=True)
    return F.grid_sample(stroke, grid + bend.permute(0, 2, 3, 1), align_corners=False)


def draw(stroke: torch.Tensor, light: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Color strokes (n, 1, 32, 32), light on dark where light (n,) is true → (n, 3, 32, 32) in 0..1."""
    n = len(stroke)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    blurred = F.avg_pool2d(stroke, 3, stride=1, padding=1)
    bolder = F.max_pool2d(stroke, 3, stride=1, padding=1)
    weight = uniform(-0.6, 0.6, 1, 1, 1)
    stroke = stroke + weight.clamp(min=0) * (bolder - stroke) + (-weight).clamp(min=0) * (blurred - stroke)
    dark, bright = uniform(0.0, 0.35, 3, 1, 1), uniform(0.65, 1.0, 3, 1, 1)
    swap = light.view(n, 1, 1, 1)
    color, background = torch.where(swap, bright, dark), torch.where(swap, dark, bright)
    shade = uniform(-0.1, 0.1, 1, 2, 2)
    background = background + F.interpolate(shade, size=SIZE, mode="bilinear", align_corners=True)
    image = background + stroke * (color - background)
    image = image + uniform(0.0, 0.03, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    return image.clamp(0, 1)


def contrastive_loss(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy of logits (images, captions), the target distributed evenly over the positives."""
    image_target = positive / positive.sum(1, keepdim=True)
    caption_target = (positive / positive.sum(0, keepdim=True).clamp(min=1)).T
    return (F.cross_entropy(logits, image_target) + F.cross_entropy(logits.T, caption_target)) / 2


def train() -> torch.nn.Module:
    """Return the trained CLIP, in single precision on the CPU."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    open_clip.add_model_config(CONFIG)
    model = open_clip.create_model(CONFIG.stem)
    model.train()

    images, labels = read_base_digits()
    indices = split_base_digits(labels)["clip", "train"]
    stroke = torch.from_numpy(strokes(images[indices.ravel()])).float().unsqueeze(1)
    label = torch.arange(len(CLASSES)).repeat_interleave(indices.shape[1])

    tokenizer = open_clip.get_tokenizer(CONFIG.stem)
    tokens = torch.stack([tokenizer([text.format(name) for name in CLASSES]) for text, _ in TEMPLATES])
    asserts_light = torch.tensor([polarity is True for _, polarity in TEMPLATES])
    asserts_dark = torch.tensor([polarity is False for _, polarity in TEMPLATES])
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1)

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    undecayed = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": undecayed, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS))),
    )
    started = time.monotonic()
    for step in range(STEPS):
        chosen = torch.randint(len(stroke), (BATCH,), generator=generator)
        light = torch.rand(BATCH, generator=generator) < LIGHT_ON_DARK
        image = (draw(pose(stroke[chosen], generator), light, generator) - mean) / std
        template_indices = torch.randperm(len(TEMPLATES), generator=generator)[:TEMPLATES_PER_STEP]
        contradicted = torch.where(light[:, None], asserts_dark[template_indices], asserts_light[template_indices])
        same_digit = label[chosen][:, None] == torch.arange(len(CLASSES))  # (batch, classes)
        positive = (~contradicted[:, :, None] & same_digit[:, None, :]).flatten(1)

        image_features, text_features, logit_scale = model(image, tokens[template_indices].flatten(0, 1))
        loss = contrastive_loss(logit_scale * image_features @ text_features.T, positive.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:4}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    trained: torch.nn.Module = model.eval()
    return trained


def main() -> None:
    """Train, and write the weights next to the model's config in half precision."""
    torch.set_num_threads(2)
    model = train()
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, WEIGHTS)
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
