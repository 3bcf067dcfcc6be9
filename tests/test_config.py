"""Config from YAML files and the command line, and the messages for invalid values."""

from __future__ import annotations

import pytest
import yaml

from pipeline.config import (
    CONFIGS,
    DEMO_CONFIG,
    Config,
    DataConfig,
    JobParser,
    add_descriptions,
    content_hash,
    fields,
    load_yaml,
    parse_config,
    source_columns,
    to_yaml,
)
from pipeline.errors import UserError


def parse_arguments(*arguments: str) -> Config:
    return JobParser("").parse(arguments).config()


def test_the_demo_is_the_base_only_without_own_data(tmp_path):
    demo = parse_config(load_yaml(DEMO_CONFIG))
    assert parse_arguments() == parse_arguments("--data.root", "builtin:digits") == demo
    assert parse_arguments("--training.epochs", "3").data.root == "builtin:digits"
    for model, weights in (("ViT-B-32", "openai"), ("hf-hub:org/name", "hf-hub:org/name"), ("builtin:digits",) * 2):
        assert parse_arguments("--clip.model", model).clip.pretrained == weights
    (file := tmp_path / "own.yaml").write_text("data:\n  root: /data/shops\n")
    for config in (parse_arguments("--data.root", "/data/shops"), parse_arguments("--config", str(file))):
        assert config == Config(name="shops", data=DataConfig(root="/data/shops"))
        assert config.clip.template == "a photo of a {}." and config.training == Config().training
    assert parse_arguments("--config", str(CONFIGS / "paper_protocol.yaml")).data.root is None


@pytest.mark.parametrize(
    ("root", "name"),
    [
        *(("/data/Shops 2024/", "Shops-2024"), ("/data/shops.v2", "shops.v2"), ("/data/images.parquet", "images")),
        *(("/data/.hidden", "hidden"), ("/data/_é (1)", "e-1"), ("/data/数据", "mmap"), ("/", "mmap"), ("x/..", None)),
        *(("/data/" + "x" * 200, "x" * 80), ("s3://bucket/shops", "shops")),
    ],
)
def test_a_run_is_named_after_its_data(root, name, monkeypatch, tmp_path):
    (folder := tmp_path / "here").mkdir()
    monkeypatch.chdir(folder)
    assert parse_config({"data": {"root": root}}).name == (name or "here")
    assert parse_config({"data": {"root": root}, "name": "given"}).name == "given"


def test_text_of_a_file_is_taken_as_it_is_written(tmp_path):
    (file := tmp_path / "a.yaml").write_text(
        "name: 2024\nstorage: 010\ncache: 1e3\ndata:\n  root: yes\n  tasks: [2019, no, 2024-11-28, 0x1, ~, 1:30]\n"
        "  class_names: {2019: on, no: 1_000}\n  shots: 1_0\nclip: {pretrained: ~, quick_gelu: yes}\nmmap:\n"
        "baselines: vpt\ntraining: {learning_rate: 1e-3, weight_decay: .5}\n"
        "tracking: {experiment: 'null', uri: \"null\"}\n"
    )
    assert parse_config(load_yaml(file)).baselines == ("vpt",)
    config = parse_config(load_yaml(file))
    assert (config.name, config.storage, config.cache, config.data.root) == ("2024", "010", "1e3", "yes")
    assert config.data.tasks == ("2019", "no", "2024-11-28", "0x1", "~", "1:30")
    assert config.data.class_names == {"2019": "on", "no": "1_000"} and config.data.shots == 10
    assert config.clip.pretrained is None and config.clip.quick_gelu is True and config.mmap == Config().mmap
    assert (config.training.learning_rate, config.training.weight_decay) == (0.001, 0.5)
    assert config.tracking.experiment == config.tracking.uri == "null"
    file.write_text(to_yaml(config))
    assert parse_config(load_yaml(file)) == config


def test_errors_in_a_file_are_reported_with_the_line(tmp_path):
    (file := tmp_path / "a.yaml").write_text(
        "seed: 3\ntraining:\n  epochs: many\n  lr: 1\nname:\ntraining.epochs: 2\nlr: 1\n"
    )
    with pytest.raises(UserError) as error:
        parse_config(load_yaml(file))
    for message in (
        f"training.epochs='many': must be a whole number ({file}:3)",
        "unknown config field training.lr; did you mean training.learning_rate?",
        f"name='': is empty: give a value ({file}:5)",
        "unknown config field training.epochs; a file has it as `training: {epochs: ...}`.",
        "unknown config field lr; a file has it as `training: {learning_rate: ...}`.",
    ):
        assert message in str(error.value)


def test_files_and_command_line_override_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text("training: {epochs: 3, batch_size: 2}\nseed: 7\n")
    (tmp_path / "b.yaml").write_text("training: {epochs: 4}\n")
    files = ["--config", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    config = parse_arguments(
        *files, "--seed", "8", "--training.learning_rate", "1e-3", "--data.tasks", "[Art, Real World]"
    )
    assert (config.training.epochs, config.training.batch_size, config.seed) == (4, 2, 8)
    assert config.training.learning_rate == 0.001
    assert config.data.tasks == ("Art", "Real World")
    assert parse_arguments("--clip.pretrained", "null").clip.pretrained is None


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_configs_in_the_repository_are_valid(file):
    parse_config(load_yaml(file))


def test_every_field_has_help():
    add_descriptions(Config)
    for name, field, _ in fields():
        assert field.description and len(field.description) > 15, name


@pytest.mark.parametrize(
    "values, message",
    [
        ({"trainning": {}}, r"unknown config field trainning; did you mean training\? Valid here: name, seed"),
        ({"training": {"epoch": 3}}, r"unknown config field training\.epoch; did you mean training\.epochs\?"),
        ({"grouping": {"affinity": "euclid"}}, r"grouping\.affinity='euclid'.*'transfer', 'gradient' or 'features'"),
        ({"training": {"epochs": 0}}, r"training\.epochs=0.*greater than or equal to 1"),
        ({"training": {"learning_rate": "fast"}}, r"training\.learning_rate='fast'"),
        ({"mmap": {"prompt_length": 8, "source_rows": 3}}, r"source_rows=3 does not divide.*valid: \[1, 2, 4, 8\]"),
        ({"clip": {"template": "a photo"}}, r"clip\.template='a photo'.*\{\} exactly once"),
        ({"training": {"augmentation": {"crop_scale": [0.9, 0.1]}}}, r"crop_scale"),
        ({"data": {"max_broken_fraction": 2}}, r"data\.max_broken_fraction=2"),
        ({"name": "../x"}, r"name='\.\./x'"),
    ],
)
def test_errors_name_the_valid_values(values, message):
    with pytest.raises(UserError, match=message):
        parse_config(values)


def test_unknown_options_are_reported():
    with pytest.raises(UserError, match=r"unknown option --training\.epoch; did you mean --training\.epochs\?"):
        parse_arguments("--training.epoch", "3")


def test_all_errors_are_reported_at_once():
    with pytest.raises(UserError, match=r"(?s)seed=.*training\.epochs="):
        parse_config({"seed": "x", "training": {"epochs": -1}})


def test_yaml_cannot_create_objects(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text("name: !!python/object/apply:os.system ['echo x']\n")
    with pytest.raises(UserError, match="not plain YAML"):
        load_yaml(file)
    with pytest.raises(UserError, match="does not exist"):
        load_yaml(tmp_path / "absent.yaml")


def test_source_columns_divide_both_widths():
    mmap = Config().mmap
    assert source_columns(mmap, 512, 768) == 256
    with pytest.raises(UserError, match=r"source_columns=100.*valid: \[1, 2, 4, .*256\]"):
        source_columns(mmap.model_copy(update={"source_columns": 100}), 512, 768)


def test_round_trip_and_hash():
    config = parse_arguments("--seed", "5")
    assert parse_config(yaml.safe_load(to_yaml(config))) == config
    assert content_hash(config) == content_hash(parse_config(yaml.safe_load(to_yaml(config))))
    assert content_hash(config) != content_hash(config.model_copy(update={"seed": 6}))
