"""Whether somebody is logged in to W&B on this machine, told from files, without W&B's package and the network."""

import configparser
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # the second one since wandb 0.31


def configured(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether W&B has a key to log in with, and is not switched off (``WANDB_MODE=disabled``, ``wandb disabled``).

    Looks where W&B does: ``WANDB_API_KEY`` or ``WANDB_IDENTITY_TOKEN_FILE``, an entry of W&B's host in netrc, the
    settings files ``~/.config/wandb/settings`` and ``wandb/settings``. A file that cannot be read counts as missing.
    """
    settings = _settings(environment)
    if environment.get("WANDB_MODE", settings.get("mode")) == "disabled":
        return False
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key"):
        return True
    url = environment.get("WANDB_BASE_URL") or settings.get("base_url")
    return _in_netrc([urlsplit(url).netloc] if url else DEFAULT_HOSTS, environment)


def _settings(environment: Mapping[str, str]) -> dict[str, str]:
    config = environment.get("WANDB_CONFIG_DIR")
    found: dict[str, str] = {}
    for file in (Path(config or Path.home() / ".config" / "wandb") / "settings", Path("wandb", "settings")):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue
        if parser.has_section("default"):
            found |= dict(parser.items("default"))
    return found


def _in_netrc(hosts: Sequence[str], environment: Mapping[str, str]) -> bool:
    named = environment.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            known = netrc.netrc(file).hosts
        except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
            continue
        if any(known[host][2] for host in hosts if host in known):  # with a password, which is the key
            return True
    return False
