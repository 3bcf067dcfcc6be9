"""Everything a run can be told: its fields and sections, YAML files, and the command line."""

from pipeline.config.arguments import Given, JobOptions, JobParser
from pipeline.config.fields import PositiveInt, Section, Share, content_hash
from pipeline.config.files import (
    CONFIGS,
    DEMO_CONFIG,
    MAX_TEXT_BYTES,
    MAX_YAML_BYTES,
    given_or_shipped,
    load_yaml,
    read_text,
)
from pipeline.config.schema import (
    Config,
    choices,
    fields,
    parse_config,
    section_description,
    to_yaml,
)
from pipeline.config.sections import (
    BUILTIN_DIGITS,
    AugmentationConfig,
    ClipConfig,
    ClusterConfig,
    DataConfig,
    GroupingConfig,
    MmapConfig,
    TrackingConfig,
    TrainingConfig,
    source_columns,
)

__all__ = [
    "AugmentationConfig",
    "BUILTIN_DIGITS",
    "CONFIGS",
    "ClipConfig",
    "ClusterConfig",
    "Config",
    "DEMO_CONFIG",
    "DataConfig",
    "GroupingConfig",
    "MAX_TEXT_BYTES",
    "MAX_YAML_BYTES",
    "MmapConfig",
    "PositiveInt",
    "Section",
    "Share",
    "TrackingConfig",
    "TrainingConfig",
    "Given",
    "JobOptions",
    "choices",
    "JobParser",
    "content_hash",
    "fields",
    "given_or_shipped",
    "load_yaml",
    "parse_config",
    "read_text",
    "section_description",
    "source_columns",
    "to_yaml",
]
