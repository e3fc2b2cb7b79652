"""How much room a device of tensors has left."""

import torch

from fedsim.errors import ScenarioError

__all__ = ["check_room", "free_bytes"]


def free_bytes(device: torch.device) -> int:
    """Return what may still be allocated on a GPU, what torch holds in reserve included."""
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + int(reserve)


def check_room(device: torch.device, size_bytes: int, n_models: int) -> None:
    """Refuse a result that cannot fit on a GPU, before anything is computed.

    Raises
    ------
    ScenarioError
        Says how much is needed and how much there is.
    """
    if device.type != "cuda":
        return
    free = free_bytes(device)
    if size_bytes > 0.9 * free:
        raise ScenarioError(
            f"device: {n_models} trained models need {size_bytes / 1e9:.1f} GB, {device} has "
            f"{free / 1e9:.1f} GB left; take fewer devices a round, a smaller model, or --device "
            "cpu"
        )
