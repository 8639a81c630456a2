"""The config of a run: keys and sections, their text in `onward.yaml`, and their JSON schema."""

from onward.config.config import Config, known_keys
from onward.config.sections import RESIDUAL_INITS, NotifyConfig
from onward.config.stored import stored_config

__all__ = ["RESIDUAL_INITS", "Config", "NotifyConfig", "known_keys", "stored_config"]
