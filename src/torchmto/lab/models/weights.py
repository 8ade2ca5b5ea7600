"""Weights from safetensors files, which hold numbers and nothing that could run."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from torchmto.checks import needed


def load_weights(module: nn.Module, path: str | Path, *, prefixes: Sequence[str] = ()) -> list[str]:
    """Load a trunk's weights from a ``.safetensors`` file.

    The file has to hold every parameter and running statistic of the module; what else it holds (a classifier) is
    left out.

    Args:
        module: Changed in place; unchanged if anything is wrong.
        path: The file.
        prefixes: Tried in front of each key, such as ``"resnet."``.

    Returns:
        The keys of the file that weren't used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it isn't a safetensors file, or keys are missing or have another shape.
    """
    safetensors, tensors = (needed("Loading weights", name) for name in ("safetensors", "safetensors.torch"))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There are no weights at {path}.")
    try:
        stored = tensors.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} isn't a safetensors file ({error}). Only safetensors can be loaded.") from error
    found, missing, misshapen = {}, [], []
    for key, value in module.state_dict().items():
        source = next((prefix + key for prefix in ("", *prefixes) if prefix + key in stored), None)
        if source is None:
            # A counter that only matters with momentum=None; some tools drop it.
            if not key.endswith("num_batches_tracked"):
                missing.append(key)
        elif stored[source].shape != value.shape:
            misshapen.append(f"{key} {tuple(stored[source].shape)} instead of {tuple(value.shape)}")
        else:
            found[key] = source
    if missing or misshapen:
        raise ValueError(
            f"{path} doesn't fit the model: {len(missing)} keys are missing ({', '.join(missing[:3])}), "
            f"{len(misshapen)} have another shape ({', '.join(misshapen[:3])})."
        )
    module.load_state_dict({key: stored[source] for key, source in found.items()}, strict=False)
    return sorted(set(stored) - set(found.values()))
