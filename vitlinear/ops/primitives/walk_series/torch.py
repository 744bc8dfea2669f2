"""The series of all numbers of steps of a walk, in plain operations, by doubling: (I + B^64) ... (I + B^2) (I + B)."""
import torch


def walk_series(step: torch.Tensor, start: torch.Tensor, num_doublings: int = 7) -> torch.Tensor:
    """`sum_j step^j start` over j < 2^num_doublings, close to `(I - step)^-1 start` for a spectral radius below 1.

    Costs `num_doublings` products of r x r and of r x e matrices; needs no solver, so it exports.

    Args:
        step: (B, heads, r, r).
        start: (B, heads, r, e).
        num_doublings: The first term left out is `step^(2^num_doublings)`.

    Returns:
        (B, heads, r, e).
    """
    power, out = step.flatten(0, 1), start.flatten(0, 1)
    for i in range(num_doublings):
        out = torch.baddbmm(out, power, out)
        if i + 1 < num_doublings:
            power = power @ power
    return out.unflatten(0, [start.shape[0], start.shape[1]])
