"""Settings: every key with its default and checks (schema), and reading them from YAML and command lines (files)."""

from routingvl.config.checks import ConfigError, check_choice, from_dict, nearest
from routingvl.config.routing import RoutingConfig

__all__ = ["ConfigError", "RoutingConfig", "check_choice", "from_dict", "nearest"]
