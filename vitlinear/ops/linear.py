"""Plain kernel attention: Katharopoulos et al., 'Transformers are RNNs', arXiv 2006.16236, equations 5 to 7.

The softmax kernel exp(q . k) becomes phi(q) . phi(k) with phi(u) = elu(u) + 1, so the sum over keys can be taken
before it meets the queries: N d^2 operations instead of N^2 d, and no notion of position.
"""
import torch
import torch.nn.functional as F



def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Kernel attention `o_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) . sum_j phi(k_j) + eps)`.

    Sums run in float32 (float64 for float64 input), with autocast off.

    Args:
        q: Queries (B, heads, N, d).
        k: Keys (B, heads, M, d).
        v: Values (B, heads, M, e).
        eps: Added to the denominator.

    Returns:
        (B, heads, N, e) in the dtype of `v`.
    """
    if not torch.jit.is_scripting() and q.device.type != 'meta':
        with torch.autocast(device_type=q.device.type, enabled=False):
            return _linear_attention(q, k, v, eps)
    return _linear_attention(q, k, v, eps)


def _linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eps: float) -> torch.Tensor:
    out_dtype = v.dtype
    if out_dtype != torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    q, k = F.elu(q) + 1, F.elu(k) + 1
    denominator = q @ k.sum(dim=-2).unsqueeze(-1) + eps
    return ((q @ (k.transpose(-2, -1) @ v)) / denominator).to(out_dtype)
