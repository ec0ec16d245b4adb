"""torch's MultiheadAttention as four linear layers that are called, so that each can be calibrated and factored."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention


class PlainAttention(nn.Module):
    """Computes what nn.MultiheadAttention does, in evaluation and training, with linear layers in place of `in_proj`.

    Its `forward` takes and gives the same. It never takes torch's fast path, which reads weights without calling the
    layers; padded positions therefore keep their values where that path writes zeros.
    """

    # what nn.TransformerEncoder asks before its fast path
    _qkv_same_embed_dim = False
    bias_k = bias_v = None
    add_zero_attn = False

    def __init__(self, of: nn.MultiheadAttention, projections: tuple[nn.Linear, nn.Linear, nn.Linear]) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = of.embed_dim, of.kdim, of.vdim
        self.num_heads, self.head_dim = of.num_heads, of.head_dim
        self.dropout, self.batch_first = of.dropout, of.batch_first
        self.q_proj, self.k_proj, self.v_proj = projections
        self.out_proj = of.out_proj

    @property
    def in_proj_weight(self) -> Tensor:
        """The three weights below each other, as nn.MultiheadAttention keeps them where their widths agree."""
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The three biases one after the other; None without."""
        biases: list[Tensor] = [self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]
        return None if biases[0] is None else torch.cat(biases)

    def forward(  # noqa: PLR0913, PLR0917 - as nn.MultiheadAttention takes them
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,  # noqa: FBT001, FBT002 - as above
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,  # noqa: FBT001, FBT002
        is_causal: bool = False,  # noqa: ARG002, FBT001, FBT002 - a hint beside a mask that says so itself
    ) -> tuple[Tensor, Tensor | None]:
        """Attend: the output shaped as the query, and the weights (samples, queries, keys) where they are needed."""
        single = query.ndim == 2  # noqa: PLR2004 - without an axis of samples
        if single:
            query, key, value = (one.unsqueeze(0) for one in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (one.transpose(0, 1) for one in (query, key, value))
        q, k, v = (
            project(one).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for project, one in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )  # (samples, heads, positions, head_dim)
        mask = _join_masks(attn_mask, key_padding_mask, q)
        rate = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = dropout((scores if mask is None else scores + mask).softmax(-1), rate)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = scaled_dot_product_attention(q, k, v, mask, rate)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if single:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights


def rewrite_attention(module: nn.Module) -> nn.Module:
    """A PlainAttention with this MultiheadAttention's weights; the module itself where it appends keys of its own."""
    of = cast("nn.MultiheadAttention", module)
    if of.bias_k is not None or of.add_zero_attn:
        return of
    weights = (
        (of.q_proj_weight, of.k_proj_weight, of.v_proj_weight)
        if of.in_proj_weight is None
        else of.in_proj_weight.chunk(3)
    )
    biases = (None, None, None) if of.in_proj_bias is None else of.in_proj_bias.chunk(3)
    q, k, v = (make_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return PlainAttention(of, (q, k, v))


def make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def _join_masks(attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as one to add to the scores, (samples or 1, heads or 1, queries or 1, keys)."""
    added = []
    if attention is not None:
        one = _as_added(attention, q)
        added.append(one if one.ndim == 2 else one.reshape(*q.shape[:2], *one.shape[1:]))  # noqa: PLR2004
    if padding is not None:
        added.append(_as_added(padding, q)[:, None, None])
    return sum(added[1:], added[0]) if added else None


def _as_added(mask: Tensor, q: Tensor) -> Tensor:
    """A boolean mask, true where nothing is attended to, as minus infinity there."""
    if mask.dtype is not torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
