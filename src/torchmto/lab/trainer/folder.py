"""The folder of a run: settings, environment, checkpoints, figures, results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from torchmto.lab.atomic import plain, try_lock, write_bytes
from torchmto.lab.trainer.config import ConfigError, TrainConfig
from torchmto.lab.trainer.environment import environment


class RunFolder:
    """What a run leaves behind.

    ========================  ====================================================================
    ``config.yaml``           the resolved settings
    ``environment.json``      package versions, git revision, machine; a list, one entry per start
    ``checkpoints/``          ``step-*.ckpt`` and ``best.ckpt``
    ``metrics.csv``           figures over steps: ``step,name,value``
    ``records.jsonl``         groups, affinities, priority shares by layer, at the end of each epoch
    ``tensorboard/``          the same figures for TensorBoard
    ``results.json``          validation and test metrics of the best weights, costs
    ``model.safetensors``     the best weights
    ========================  ====================================================================

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
            ConfigError: If another process holds it, or the folder should exist and doesn't.
        """
        if must_exist and not self.path.is_dir():
            raise ConfigError(f"There is no run in `{self.path}` to resume.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ConfigError(f"Parameter `out` should be a folder. Found the file `{self.path}`.") from error
        with (self.path / ".lock").open("a") as file:
            if not try_lock(file):
                raise ConfigError(f"Another process is training in `{self.path}`.")
            yield

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

    def write_settings(self, config: TrainConfig, *, resumed: bool, processes: int = 1) -> None:
        """Save the settings and where the run is made."""
        path = self.path / "environment.json"
        starts: list[Any] = []
        if resumed and path.exists():
            with contextlib.suppress(ValueError):
                starts = list(json.loads(path.read_text()))
        settings = {"seed": config.seed, "split_seed": config.data.split_seed, "processes": processes}
        starts.append(environment() | settings)
        write_bytes(self.settings, yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True).encode())
        write_bytes(path, json.dumps(starts, indent=1).encode())

    def read_settings(self) -> TrainConfig:
        """The settings of the run.

        Raises:
            ConfigError: If there is no run.
        """
        if not self.settings.is_file():
            raise ConfigError(f"There is no run in `{self.path}`: `{self.settings}` is missing.")
        values = yaml.safe_load(self.settings.read_text())
        if not isinstance(values, dict):
            raise ConfigError(f"`{self.settings}` should hold settings.")
        return TrainConfig.from_dict(values)

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON file into the folder; numbers that aren't finite become null."""
        path = self.path / name
        write_bytes(path, (json.dumps(plain(content), indent=1, allow_nan=False) + "\n").encode())
        return path

    def write_results(self, results: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Save the results and the model's weights; returns the results."""
        from safetensors.torch import save  # noqa: PLC0415

        # Copies, since the format has no tensors that share memory.
        weights = save({name: value.detach().cpu().clone() for name, value in model.state_dict().items()})
        write_bytes(self.path / "model.safetensors", weights)
        self.write_json("results.json", results)
        return results


__all__ = ["RunFolder"]
