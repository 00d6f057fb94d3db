"""All settings of a config, with their types, defaults, allowed ranges and documentation.

A config is frozen, an unknown key is an error, and every field is read somewhere in the code (a test checks this).
`configs.load` loads a config file. `python -m configs.schema` prints all settings as a Markdown table.
"""

from configs.schema.aug import (
    AugConfig,
    AutoAugmentConfig,
    BlurConfig,
    ColorJitterConfig,
    EraseConfig,
    MixConfig,
    PaddingMode,
)
from configs.schema.config import Config, all_settings, settings_by_key
from configs.schema.data import DataConfig, OnBadSample, StageConfig
from configs.schema.eval import EvalConfig
from configs.schema.log import LogConfig, WandbConfig
from configs.schema.model import ModelConfig
from configs.schema.optim import EmaConfig, LookaheadConfig, OptimizerConfig, ScheduleConfig
from configs.schema.section import Effect, Section, effect, is_section
from configs.schema.train import ProxyConfig, TrainConfig

__all__ = [
    "AugConfig",
    "AutoAugmentConfig",
    "BlurConfig",
    "ColorJitterConfig",
    "Config",
    "DataConfig",
    "Effect",
    "EmaConfig",
    "EraseConfig",
    "EvalConfig",
    "LogConfig",
    "LookaheadConfig",
    "MixConfig",
    "ModelConfig",
    "OnBadSample",
    "OptimizerConfig",
    "PaddingMode",
    "ProxyConfig",
    "ScheduleConfig",
    "Section",
    "StageConfig",
    "TrainConfig",
    "WandbConfig",
    "all_settings",
    "effect",
    "is_section",
    "settings_by_key",
]
