"""The folder of a run: settings, environment, checkpoints, figures, results."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from torchmto.lab.atomic import plain, write_bytes
from torchmto.lab.folders import FolderError, check_folder, locked
from torchmto.lab.run.config import ConfigError, RunConfig, check_source, config_of, source_now
from torchmto.lab.run.environment import environment


class RunFolder:
    """What a run leaves behind.

    ========================  ====================================================================
    ``config.yaml``           the resolved settings
    ``environment.json``      package versions, git revision, machine; a list, one entry per start
    ``checkpoints/``          ``step-*.ckpt`` and ``best.ckpt``
    ``metrics.csv``           figures over steps: ``step,name,value``
    ``records.jsonl``         groups, affinities, priority shares by layer, at the end of each epoch
    ``tensorboard/``          the same figures for TensorBoard
    ``results.json``          validation and test metrics of the best weights, costs; what each epoch and some single steps gave
    ``model.safetensors``     the best weights
    ========================  ====================================================================

    Args:
        path: The folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path = Path(path)
        self.checkpoints = path / "checkpoints"
        self.settings = path / "config.yaml"
        self.claim = path / ".job"

    @property
    def has_run(self) -> bool:
        """Whether a run was started here."""
        return self.settings.exists() or self.checkpoints.exists()

    @contextlib.contextmanager
    def locked(self, *, must_exist: bool = False) -> Iterator[None]:
        """Keep other processes from training in this folder; the lock goes with the process, however it ends.

        Raises:
            ConfigError: If another process holds it, it is something else's, or it should exist and doesn't.
        """
        if must_exist and not self.path.is_dir():
            raise ConfigError(f"There is no run in `{self.path}` to resume.")
        try:
            check_folder(self.path, "torchmto train")
            with locked(self.path):
                yield
        except FolderError as error:
            raise ConfigError(str(error)) from error

    def claimed_by(self, job: tuple[str, bool] | None) -> bool:
        """Whether a torchrun job began the run in this folder, and so goes on with it after a restart.

        Another start forgets who did, so that a nameless job which was refused the folder isn't let in after a restart.

        Args:
            job: The job's name, and whether it may have started before; None outside of torchrun.
        """
        if job is not None and job[1]:
            return self.claim.is_file() and self.claim.read_text() == job[0]
        self.claim.unlink(missing_ok=True)
        return False

    def write_claim(self, job: tuple[str, bool] | None) -> None:
        """Note the torchrun job that trains here."""
        if job is not None:
            write_bytes(self.claim, job[0].encode())

    def write_settings(self, config: RunConfig, *, resumed: bool, processes: int = 1) -> None:
        """Save the settings and where the run is made."""
        path = self.path / "environment.json"
        starts: list[Any] = []
        if resumed and path.exists():
            with contextlib.suppress(ValueError, TypeError):
                starts = list(json.loads(path.read_text()))
        settings = {"seed": config.seed, "split_seed": config.data.split_seed, "processes": processes}
        starts.append(environment() | settings)
        write_bytes(self.settings, self.settings_text(config).encode())
        write_bytes(path, json.dumps(starts, indent=1).encode())

    @staticmethod
    def settings_text(config: RunConfig) -> str:
        """Settings as ``config.yaml`` holds them, and ``--config`` reads them."""
        text: str = yaml.dump(config.as_dict(), Dumper=Dumper, sort_keys=False, allow_unicode=True)
        return text

    def read_settings(self, given: Mapping[str, Any] | None = None, *, changed_source: bool = False) -> RunConfig:
        """The settings of the run.

        Args:
            given: Some that go over them.
            changed_source: Whether files that define the problem and model may be others than those of the run.

        Raises:
            ConfigError: If there is no run, or its files have changed.
        """
        if not self.settings.is_file():
            raise ConfigError(f"There is no run in `{self.path}`: `{self.settings}` is missing.")
        config = config_of(given or {}, RunConfig.from_dict(read_yaml(self.settings)))
        if not changed_source:
            check_source(config.source, source_now(config), f"The run in `{self.path}`")
        return config

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON file into the folder; numbers that aren't finite become null."""
        path = self.path / name
        write_bytes(path, (json.dumps(plain(content), indent=1, allow_nan=False) + "\n").encode())
        return path

    def write_results(self, results: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Save the results and the model's weights; returns the results."""
        from safetensors.torch import save  # noqa: PLC0415

        # Copies, since the format has no tensors that share memory, and contiguous, as it asks for.
        state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
        weights = save({name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()})
        write_bytes(self.path / "model.safetensors", weights)
        self.write_json("results.json", results)
        return results


class KeyTwiceError(yaml.MarkedYAMLError):
    """A mapping has two values for a key, of which PyYAML would take the last without a word."""


_PLAIN: dict[str | None, list[tuple[str, re.Pattern[str]]]] = {
    None: [  # whatever a text begins with
        (f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"))
        for kind, pattern in {
            "null": "null|Null|NULL|~|",
            "bool": "true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
            "int": "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
            "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
            "merge": "<<",
        }.items()
    ]
}
"""What isn't a text though it has no quotes: the core schema of YAML 1.2, merge keys, and the yes and no of YAML 1.1, which
as texts would both count as true."""


class Dumper(yaml.SafeDumper):
    """Gives quotes to the texts that `Loader` would take for something else."""

    yaml_implicit_resolvers = _PLAIN

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """A text; line breaks that aren't a newline would be read as spaces if they weren't escaped."""
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


Dumper.add_representer(str, Dumper.represent_str)


class Loader(yaml.SafeLoader):
    """As YAML 1.2 reads what has no quotes (1e-3 is a number; 1:30 and 1_000 are texts) and keys (each once); no is false."""

    yaml_implicit_resolvers = _PLAIN

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping.

        Raises:
            KeyTwiceError: If a key is given twice.
        """
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise KeyTwiceError(problem=f"the key `{key.value}` is given twice", problem_mark=key.start_mark)
                keys.add((key.tag, key.value))
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number: 010 is ten."""
        text: str = self.construct_scalar(node)
        return int(text, 0 if text.startswith(("0o", "0x")) else 10)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
HASHES = ("source", "content")
"""Settings that are texts even if they look like numbers: there are files with one that has no quotes."""
LARGEST_SETTINGS = 100_000
"""Values that a file of settings may have, aliases written out."""


def read_yaml(path: Path) -> dict[str, Any]:
    """A file of settings, in bounded time.

    Raises:
        ConfigError: If it isn't text, isn't YAML, holds a key twice, something else than settings, or aliases that never end.
    """
    try:
        text = path.read_text(encoding="utf-8")
        loader = Loader(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}, set()) > LARGEST_SETTINGS:
            raise ConfigError(f"`{path}` should hold settings. Found more than {LARGEST_SETTINGS} values.")
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in HASHES and value.tag.endswith((":int", ":float")):
                value.tag = "tag:yaml.org,2002:str"
        values = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise ConfigError(f"Can't read `{path}`: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        where = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"`{path}` isn't a file of settings{line}: {reason}.") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"`{path}` should hold settings. Found {type(values).__name__}.")
    if odd := [name for name in values or () if not isinstance(name, str)]:
        raise ConfigError(f"`{path}` should hold settings by name. Found the name {odd[0]!r}.")
    return values or {}


def _size(node: yaml.Node, known: dict[int, int], open_: set[int]) -> int:
    """How many values a node has, aliases written out."""
    if id(node) in open_:
        raise ConfigError("Settings should end. Found an alias of what it stands in.")
    if id(node) not in known:
        open_.add(id(node))
        entries = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        children = entries if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(_size(child, known, open_) for child in children)
        open_.remove(id(node))
    return known[id(node)]
