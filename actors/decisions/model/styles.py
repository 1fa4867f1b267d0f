"""The tensor-parallel styles, by Transformers' names: how each cuts a tensor, and what it means."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Style:
    """How a style cuts the weights [..., out, in] of a module."""

    meaning: str
    cuts: Literal["rows", "columns"] | None = None  # rows: the second last dimension (biases too); columns: the last
    pieces: int = 1  # of a fused tensor: so many tensors one after the other, each cut alike
    together: int = 1  # so many rows or columns in a row are never parted
    is_on_first: bool = False  # the first shard has the values, the others zeros


STYLES = {
    "colwise": Style("each shard computes some of the outputs; nothing is exchanged", "rows"),
    "colwise_gather_output": Style("as colwise, then every shard gets all outputs; a head's logits stay cut", "rows"),
    "rowwise": Style("each shard has some of the inputs; the outputs are summed over the shards", "columns"),
    "rowwise_split_input": Style("as rowwise, from inputs that every shard has whole", "columns"),
    "embedding_rowwise": Style("each shard has some of the vocabulary; the rows found are summed", "rows"),
    "embedding_colwise": Style("each shard has some of the hidden size, then every shard gets all of it", "columns"),
    "packed_colwise": Style("colwise for two matrices in one tensor, such as gate and up", "rows", 2),
    "packed_rowwise": Style("the same where the tensor is stored [in, out]", "columns", 2),
    "interleaved_rowwise": Style("the same where gate and up columns alternate", "columns", together=2),
    "qkv_colwise": Style("colwise for query, key and value in one tensor, cut at whole heads", "rows"),
    "norm_colwise": Style("a root-mean-square norm over what all shards have together; each has some of it", "rows"),
    "moe_tp_experts": Style("on the experts' module: its output is summed over the shards"),
    "moe_identity_expert": Style("on an expert that gives its input back: each shard gives its share of the sum"),
    "added_once": Style("the first shard holds it, the others zeros: a bias of what is summed", is_on_first=True),
    "all_reduce": Style("the module's output is summed over the shards"),
    "replicate": Style("every shard holds it whole"),
    "sequence_parallel": Style("every shard holds it whole: shards have all tokens here, so nothing is exchanged"),
    "replicated_with_grad_allreduce": Style("every shard holds it whole; the all-reduce is for training only"),
    "mla_kv_a_proj": Style("every shard holds it whole: the latent that all heads share"),
    "local_params": Style("on a module whose own parameters are cut by their own entries"),
}
