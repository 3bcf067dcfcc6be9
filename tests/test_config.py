"""Config from YAML files and the command line, and the messages for invalid values."""

from __future__ import annotations

import pytest
import yaml

from pipeline.config import (
    CONFIGS,
    DEMO_CONFIG,
    Config,
    JobParser,
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


def test_the_default_config_is_the_demo():
    assert parse_arguments() == parse_config(load_yaml(DEMO_CONFIG))
    assert parse_arguments().data.root == "builtin:digits"


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
    for name, field, _ in fields():
        assert field.description and len(field.description) > 15, name


@pytest.mark.parametrize(
    "values, message",
    [
        ({"trainning": {}}, r"unknown config field trainning; did you mean training\? Valid here: name, seed"),
        ({"training": {"epoch": 3}}, r"unknown config field training\.epoch; did you mean training\.epochs\?"),
        ({"grouping": {"affinity": "euclid"}}, r"grouping\.affinity='euclid'.*'dot' or 'cosine'"),
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
