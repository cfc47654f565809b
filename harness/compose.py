"""The YAML files of ``conf/`` composed by Hydra, whose own error messages never reach the user as they are.

Only group choices go through Hydra (50 ms a combination); lists, ranges and values are handled by ``harness/sweep.py``,
because Hydra's compose API refuses lists and takes ranges for plain texts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.context import UserError
from harness.schema import FIXED, GROUPS

CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass(frozen=True)
class Composed:
    """One combination of group choices: the config before value overrides and the choice of each group."""

    tree: Any  # omegaconf.DictConfig
    choices: dict[str, str]

    def get(self, key: str) -> tuple[bool, Any]:
        """Whether the dotted key exists, and its unresolved value."""
        node: Any = self.plain
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return False, None
            node = node[part]
        return True, node

    @property
    def plain(self) -> dict[str, Any]:
        from omegaconf import OmegaConf

        return OmegaConf.to_container(self.tree, resolve=False)  # type: ignore[return-value]

    @property
    def keys(self) -> list[str]:
        """All dotted keys that a command line may set."""

        def walk(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
            for name, value in node.items():
                if isinstance(value, Mapping):
                    yield from walk(value, f"{prefix}{name}.")
                elif not name.startswith("_") and prefix + name not in FIXED:
                    yield prefix + name

        return list(walk(self.plain, ""))


class Conf:
    """The folder of YAML files. Composes with Hydra; a combination of choices is composed once."""

    def __init__(self, folder: Path = CONF):
        self.folder = folder
        self._composed: dict[tuple[tuple[str, str], ...], Composed] = {}

    def choices(self, group: str) -> list[str]:
        return sorted(file.stem for file in (self.folder / group).glob("*.yaml"))

    def compose(self, chosen: Mapping[str, str]) -> Composed:
        """Compose with these choices (the YAML files' defaults for the other groups)."""
        key = tuple(sorted(chosen.items()))
        if key not in self._composed:
            self._composed[key] = self._compose(chosen)
        return self._composed[key]

    def _compose(self, chosen: Mapping[str, str]) -> Composed:
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import open_dict
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        words = [f"{group}={choice}" for group, choice in chosen.items()]
        try:
            with initialize_config_dir(str(self.folder.resolve()), version_base="1.3"):
                tree = compose("config", overrides=words, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            reason = " ".join(str(error).split())
            asked = " ".join(words) or "the defaults"
            raise UserError(f"the YAML files in {self.folder} do not compose for {asked}: {reason}") from None
        choices = {group: tree.hydra.runtime.choices[group] for group in GROUPS}
        with open_dict(tree):
            tree.pop("hydra")
            tree.pop("sweep", None)
        return Composed(tree, choices)

    def sweep_lists(self, experiment: str | None) -> list[list[str]]:
        """``sweep:`` of an experiment: lists of overrides, each list a product. One empty list if there is none."""
        if experiment is None:
            return [[]]
        from omegaconf import OmegaConf

        file = self.folder / "experiment" / f"{experiment}.yaml"
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        lists = content.get("sweep", [[]]) if isinstance(content, dict) else [[]]
        well_formed = isinstance(lists, list) and all(isinstance(words, list) for words in lists)
        if not (well_formed and lists and all(isinstance(word, str) for words in lists for word in words)):
            raise UserError(f"{file}: sweep must be a list of lists of overrides, each a text such as 'seed=0..49'")
        return lists


def resolved(tree: Any) -> dict[str, Any]:
    """A composed tree as plain containers, interpolations replaced."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(tree, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"the YAML files do not compose: {str(error).splitlines()[0]}") from None
