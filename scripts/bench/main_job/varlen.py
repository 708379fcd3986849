"""Flash attention of PyTorch itself for transformers' packed and padding-free batches.

transformers takes flash attention from the package flash-attn, which is compiled where it is installed. PyTorch has the
same kernels for documents of any lengths (`torch.nn.attention.varlen`); this offers them as an attention implementation,
so that a peer without that package is not measured with a mask of tokens x tokens.
"""

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "torch_varlen"
_last: tuple = (None, None, 0)


def documents(position_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where documents begin and end, and the longest one's length; found once for all layers of a step."""
    global _last
    if _last[0] is not position_ids:
        starts = (position_ids[0] == 0).nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).to(torch.int32)
        _last = (position_ids, bounds, int(bounds.diff().max()))
    return _last[1], _last[2]


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, position_ids=None, **_):
    """Query, key and value are [1, heads, tokens, head size]; so is the result, with tokens and heads exchanged."""
    if attention_mask is not None or position_ids is None or query.shape[0] != 1 or dropout:
        raise ValueError(f"{NAME} is for packed and padding-free batches without dropout")
    bounds, longest = documents(position_ids)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    causal = (-1, 0)
    out = varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=causal)
    return out.unsqueeze(0), None


def mask(*_, attention_mask=None, **__):
    """The bounds of the documents stand for it; a mask over padding is passed on, and refused above."""
    return attention_mask


def register() -> str:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    return NAME
