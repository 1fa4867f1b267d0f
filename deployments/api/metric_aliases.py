"""Metric aliases: vLLM's names for what vLLM counts too, for boards, autoscalers and gateways that ask for those."""

from prometheus_client.core import Metric

# By our name without stagemesh_; see vllm/v1/metrics/loggers.py. Histograms of seconds have the same bounds there.
VLLM = {
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "kv_usage_ratio": "kv_cache_usage_perc",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "preemptions": "num_preemptions",
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "requests_finished": "request_success",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "request_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "request_decode_time_seconds": "request_decode_time_seconds",
    "request_queue_time_seconds": "request_queue_time_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
    "step_tokens": "iteration_tokens_total",
}


def vllm_twin(family: Metric) -> Metric | None:
    """The same numbers under vLLM's name, with its label `engine`; None for what vLLM does not count."""
    name = VLLM.get(family.name.removeprefix("stagemesh_"))
    if name is None:
        return None
    twin = Metric(f"vllm:{name}", family.documentation, family.type)
    for sample in family.samples:
        twin.add_sample(
            twin.name + sample.name.removeprefix(family.name), {**sample.labels, "engine": "0"}, sample.value
        )
    return twin
