"""What the package flash_attn offers to Transformers, in plain torch and by definition."""

from itertools import pairwise

import torch


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """Attention of [batch, seq, heads, head_dim]; queries are the last of the keys; window_size counts both ends."""
    assert causal
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    seen = distance >= 0
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", torch.dropout(probabilities, dropout_p, train=True), v)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    """Attention of sequences laid end to end, [total, heads, head_dim], sequence by sequence."""
    outputs = []
    ends = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (q_start, q_end), (k_start, k_end) in ends:
        assert q_end - q_start <= max_seqlen_q
        assert k_end - k_start <= max_seqlen_k
        sequence = q[None, q_start:q_end], k[None, k_start:k_end], v[None, k_start:k_end]
        outputs.append(flash_attn_func(*sequence, dropout_p, softmax_scale, causal, window_size)[0])
    return torch.cat(outputs)


flash_attn_with_kvcache = None
