"""The memory of a rank beside weights and KV cache: the largest step's, that of graphs, the device's own.

Steps are counted as the CUDA backend runs them, by tensors that are alive at the same time; where the largest step is
run to be measured (Backend.peak_bytes), what is measured counts.
"""

import math

from actors.decisions.model.plan import Plan
from actors.decisions.model.shard_plan import AttentionShard, TensorSlice
from actors.decisions.schedule.blocks import num_blocks_for
from actors.decisions.schedule.buckets import most_captured_tokens
from actors.decisions.schedule.settings import PROMPT_LOGPROBS_CHUNK

RESERVED_BYTES = 1_500_000_000  # of a GPU: its driver, its context, the communicators' buffers
GRAPH_BYTES = 500_000_000  # of all graphs of a rank beside that step's tensors: nodes, static buffers, workspaces
SPLIT_KEYS = 256  # splits of a token's keys begin at multiples of it
SEARCHED_AT_ONCE = 1 << 22  # logits of a shard in which thresholds are searched together

_SPLITS_AND_HEADS = 512  # splits of a token's keys times query heads: bounds their sums, however long a sequence is
_HIDDEN_STATES = 10  # of a layer that are alive at a time: residuals, norms, and what Python still names
# Beside an element of the logits: scores and noise of what is sampled; scores alone, and their search for thresholds;
# log-probabilities. And beside an id of a sequence with penalties.
_NOISE_BYTES, _SCORES_BYTES, _SEARCH_BYTES, _LOGPROBS_BYTES, _HISTORY_BYTES = 33, 16, 62, 8, 20


def max_splits(num_heads: int) -> int:
    """The most splits of a single token's keys, a power of two."""
    return 1 << (min(64, max(8, _SPLITS_AND_HEADS // num_heads)).bit_length() - 1)


def activation_bytes(plan: Plan, rank: int, num_tokens: int) -> int:
    """The most bytes that a step of `num_tokens` tokens takes on a rank at a time."""
    shard, element_bytes = plan.shards[rank], plan.spec.dtype_bytes
    layer = num_tokens * _layer_elements(plan, rank) * element_bytes + _split_bytes(plan, rank, num_tokens)
    if not shard.has_head:
        sent = plan.scheduler.num_lanes * num_tokens * _state_elements(plan) * element_bytes  # kept until the next one
        return layer + sent
    return max(layer, _head_bytes(plan, rank, num_tokens))


def beside_cache_bytes(plan: Plan, rank: int) -> int:
    """Bytes that a step and graphs take on a rank of a GPU, beside weights, KV cache and RESERVED_BYTES."""
    largest = plan.scheduler.max_num_batched_tokens
    captured = most_captured_tokens(plan.scheduler)
    return activation_bytes(plan, rank, largest) + activation_bytes(plan, rank, captured) + GRAPH_BYTES


def _layer_elements(plan: Plan, rank: int) -> int:
    """Elements for each token that are alive in a layer: hidden states, those of its attention, and of its network."""
    spec, shard = plan.spec, plan.shards[rank]
    attention = max(map(_attention_elements, shard.attentions), default=0)
    in_layers = [tensor for tensor in shard.tensors if spec.layer_of(tensor.name) is not None]
    networks = {tensor.shape: tensor for tensor in in_layers if spec.attention_of(tensor.name) is None}.values()
    dense = max((one.shape[1] for one in networks if _is_second_product(one, spec.hidden_size)), default=0)
    columns = {columns for one in networks if (columns := _expert_columns(one, spec.hidden_size)) is not None}
    experts = (spec.experts_per_token or 0) * (spec.hidden_size + 4 * min(columns, default=0))
    return _HIDDEN_STATES * spec.hidden_size + attention + max(3 * dense, experts)


def _attention_elements(attention: AttentionShard) -> int:
    """Of one token: queries, keys and values as they are multiplied, queries as they are rotated, and the result."""
    return attention.num_heads * (2 * attention.spec.key_dim + attention.spec.value_dim) + attention.cached_elements


def _is_second_product(tensor: TensorSlice, hidden_size: int) -> bool:
    """Whether it is the matrix of a network's second product, from its columns to a hidden state."""
    return len(tensor.full_shape) == 2 and tensor.full_shape[0] == hidden_size


def _expert_columns(tensor: TensorSlice, hidden_size: int) -> int | None:
    """The columns of each of the stacked experts, or of two products of them together; None for other tensors."""
    if len(tensor.full_shape) != 3 or hidden_size not in tensor.full_shape[1:]:
        return None
    return tensor.shape[2] if tensor.full_shape[1] == hidden_size else tensor.shape[1]


def _head_bytes(plan: Plan, rank: int, num_tokens: int) -> int:
    """Of logits, and of sampling from them with penalties, top_p and log-probabilities, those of a prompt too."""
    first, end = plan.shards[rank].vocab_rows
    num_rows = min(plan.scheduler.max_num_seqs, num_tokens)
    num_prompt_rows = min(PROMPT_LOGPROBS_CHUNK, num_tokens - num_rows + 1)
    logits = (num_rows + num_prompt_rows) * (end - first) * plan.spec.dtype_bytes
    sampled = num_rows * (end - first)
    search = sampled * _SCORES_BYTES + min(sampled, SEARCHED_AT_ONCE) * _SEARCH_BYTES
    history = num_rows * min(plan.max_model_len, num_tokens) * _HISTORY_BYTES
    of_prompt = num_prompt_rows * (end - first) * _LOGPROBS_BYTES
    return logits + max(max(sampled * _NOISE_BYTES, search) + history, of_prompt)


def _split_bytes(plan: Plan, rank: int, num_tokens: int) -> int:
    """Of the sums over splits of the keys, in float32, for every sequence that has a single token in the step."""
    most = num_blocks_for(plan.max_model_len, SPLIT_KEYS)
    num_single = min(plan.scheduler.max_num_seqs, num_tokens)
    of_one = [
        one.num_heads * (one.spec.value_dim + 2) * min(most, max_splits(one.num_heads))
        for one in plan.shards[rank].attentions
    ]
    return 4 * num_single * max(of_one, default=0)


def _state_elements(plan: Plan) -> int:
    return math.prod(plan.spec.state_shape)
