"""Other names of fields and options: those that people bring from other tools, misspelled ones, old ones."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

RENAMED = {
    "compare": "baselines",
    "full": "full_finetune",
    "full_mt": "full_finetune_mt",
    "data.given_splits": "data.use_official_splits",
    "data.max_dropped_share": "data.max_broken_fraction",
    "data.links_out_of_root": "data.follow_external_symlinks",
    "clip.activations_gib": "clip.activation_memory_gib",
    "mmap.text_order": "mmap.text_prompt_position",
    "training.warmup_rate": "training.warmup_learning_rate",
    "grouping.together": "grouping.must_link",
    "grouping.apart": "grouping.cannot_link",
    "fewest_epochs": "grace_period",
}
"""Config fields and sections, methods, and options of search files and jobs: old name → new name."""


ALIASES = {
    alias: name
    for name, aliases in {
        "training.learning_rate": "lr learning_rate",
        "training.epochs": "epochs num_epochs max_epochs n_epochs num_train_epochs",
        "training.batch_size": "batch bs batchsize train_batch_size per_device_train_batch_size",
        "training.weight_decay": "wd",
        "training.optimizer": "optim opt",
        "seed": "random_seed random_state rng_seed",
        "data.root": "data dataset root data_root dataroot data_dir datadir data_path dataset_dir dataset_path "
        "dataset_root image_dir image_folder images dir folder path source",
        "data.tasks": "task domain domains",
        "data.shots": "k shot num_shots n_shots k_shot shots_per_class",
        "data.class_names": "classes classnames",
        "clip.model": "model model_name arch architecture backbone clip clip_model",
        "clip.pretrained": "weights pretrained_weights",
        "clip.template": "prompt prompt_template",
        "clip.image_size": "img_size imgsz input_size resolution",
        "clip.precision": "dtype",
        "baselines": "baseline method methods",
        "storage": "output out output_dir out_dir outdir output_path save_dir save_path result_dir results_dir "
        "work_dir workdir",
        "name": "run_name exp_name",
        "tracking.uri": "tracking_uri mlflow_uri mlflow_tracking_uri mlflow",
        "tracking.experiment": "experiment_name",
        "cluster.address": "ray_address",
        "cluster.num_cpus": "cpus n_cpus ncpus n_jobs",
        "config": "cfg conf config_file config_path",
    }.items()
    for alias in aliases.split()
}
"""Name in other tools → field or option."""
_UNAVAILABLE = (
    (
        "device devices gpu gpus num_gpus n_gpus ngpu cuda accelerator",
        "cluster.gpus_per_worker",
        "GPUs are used if there are any; {} sets how many each training takes (0: CPU only)",
    ),
    (
        "workers num_workers n_workers threads num_threads",
        "cluster.cpus_per_worker",
        "{} sets the CPU cores of each training, and as many trainings run at once as the cores allow",
    ),
    (
        "early_stopping early_stop patience",
        "training.epochs",
        "all trainings take {}; mmap-clip tune finds the best number, and stops bad trials early",
    ),
    (
        "time_budget time_limit max_time max_hours budget timeout",
        "training.epochs",
        "there is no time budget: set {}; an interrupted run resumes with the same command",
    ),
    (
        "wandb wandb_project tensorboard tb logger report_to log_dir logdir log_path",
        "tracking.uri",
        "all results are logged to MLflow, by default in the storage; {} is its address",
    ),
    ("resume continue", "storage", "the same command with the same {} resumes by itself"),
    ("overwrite force", "storage", "finished work is reused; another {} starts anew"),
    ("amp fp16 bf16 half mixed_precision", "clip.precision", "use {} float32, bfloat16 or auto"),
)
"""Words for what has no option of its own, the option that is closest, and the reason."""


def find_option(name: str, options: Collection[str]) -> str | None:
    """Return the option, with its dashes, that an option without dashes means: itself, also in capitals or with other
    signs between its words; the alias of one; or the last part of exactly one, apart from the methods' own settings of
    `training`."""
    name = name.replace("-", "_").lower()
    section, _, word = name.rpartition(".")
    alias = ALIASES.get(word, word)
    if section:
        candidates = [name, f"{section}.{alias.rpartition('.')[2]}"]
    else:
        candidates = [name, alias, alias.rpartition(".")[2], name.replace("_", "-")]
    for candidate in candidates:
        if f"--{candidate}" in options:
            return f"--{candidate}"
    for similar in (
        [option for option in options if option.lstrip("-").replace(".", "_") == name],
        [option for option in options if option.endswith(f".{name}") and ".training." not in option],
    ):
        if len(similar) == 1 and not section:
            return similar[0]
    return None


def explain_unavailable(name: str, options: Collection[str]) -> str | None:
    """Return what to do instead of an option that no job has, if people look for it."""
    word = name.lstrip("-").replace("-", "_").lower().rpartition(".")[2]
    for words, option, reason in _UNAVAILABLE:
        if word in words.split() and f"--{option}" in options:
            return reason.format(f"--{option}")
    return None


def did_you_mean(name: str, valid_names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: `; did you mean <the closest valid name>?`, or a full stop.

    A dotted name may be misspelled in its last part or in its section.
    """

    def closest(word: str, words: Iterable[str]) -> list[str]:
        by_lower = {valid.lower(): valid for valid in words}
        return [by_lower[match] for match in difflib.get_close_matches(word.lower(), by_lower, n=1)]

    options, name = {option.lstrip("-"): option for option in valid_names}, name.lstrip("-")
    for old, new in RENAMED.items():
        if f"{name}.".startswith(f"{old}.") and (renamed := new + name.removeprefix(old)) in options:
            return f"; it was renamed to {options[renamed]}."
    section, _, last_part = name.rpartition(".")
    alias = ALIASES.get(last_part.replace("-", "_"), last_part)
    if match := options.get(f"{section}.{alias.rpartition('.')[2]}" if section else alias):
        return f"; did you mean {match}?"
    siblings = {option.rpartition(".")[2]: option for option in options if option.rpartition(".")[0] == section}
    matches = [siblings[word] for word in closest(last_part, siblings)]
    matches += [option for option in options if option.endswith(f".{last_part}")]
    if not section or not siblings:
        by_last_part = {option.rpartition(".")[2]: option for option in reversed(options)}
        matches += [by_last_part[word] for word in closest(last_part, by_last_part)] + closest(name, options)
    return f"; did you mean {options[matches[0]]}?" if matches else "."
