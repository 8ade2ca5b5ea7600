"""Weights from safetensors files, which hold numbers and nothing that could run."""

from pathlib import Path

from torch import Tensor, nn

from torchmto.checks import needed


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it isn't a safetensors file.
    """
    safetensors, tensors = (needed("Loading weights", name) for name in ("safetensors", "safetensors.torch"))
    if not Path(path).is_file():
        raise FileNotFoundError(f"There are no weights at {path}.")
    try:
        stored: dict[str, Tensor] = tensors.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} isn't a safetensors file ({error}). Only safetensors can be loaded.") from error
    return stored


def load_weights(module: nn.Module, path: str | Path) -> list[str]:
    """Load a trunk's weights from a ``.safetensors`` file.

    The file has to hold every parameter and running statistic of the module; what else it holds (a classifier) is
    left out.

    Args:
        module: Changed in place; unchanged if anything is wrong.
        path: The file.

    Returns:
        The keys of the file that weren't used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it isn't a safetensors file, or keys are missing or have another shape.
    """
    stored = read_weights(path)
    found, missing, misshapen = [], [], []
    for key, value in module.state_dict().items():
        if key not in stored:
            # A counter that only matters with momentum=None; some tools drop it.
            if not key.endswith("num_batches_tracked"):
                missing.append(key)
        elif stored[key].shape != value.shape:
            misshapen.append(f"{key} {tuple(stored[key].shape)} instead of {tuple(value.shape)}")
        else:
            found.append(key)
    if missing or misshapen:
        raise ValueError(
            f"{path} doesn't fit the model: {len(missing)} keys are missing ({', '.join(missing[:3])}), "
            f"{len(misshapen)} have another shape ({', '.join(misshapen[:3])})."
        )
    module.load_state_dict({key: stored[key] for key in found}, strict=False)
    return sorted(set(stored) - set(found))
