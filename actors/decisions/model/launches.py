"""How many launches a decode step takes on CUDA, by family, and what one costs: kernels, and operators that start one.

Counted on the real step: tests/cpu/interpreted_layers.py holds the families that it builds to these numbers, and
tests/data/launches.json, the table of docs/gpu.md, has all. All-reduces are counted apart.
"""

from actors.decisions.model.spec import ModelSpec

# Inside a CUDA graph, beside what a kernel reads or computes: 1.3 to 2.5 µs on an H100 (docs/gpu.md)
LAUNCH_S = 1.9e-6
OF_A_STEP = 80  # outside the layers: inputs, the last norm, the head, and half of them sampling at a temperature

_OF_A_LAYER = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), 10),
    **dict.fromkeys(("gemma2", "gemma3_text", "phi3", "glm4", "olmo2"), 10),
    "smollm3": 12,
    "granite": 16,
    "mixtral": 27,
    "qwen3_moe": 28,
    "gpt_neox": 29,
    "gpt_oss": 35,
    "cohere": 49,
}
_OTHERS = 30  # where nothing but norms is fused


def launches_of_a_layer(spec: ModelSpec) -> int:
    """Launches of one decoder layer in a decode step, all-reduces left out."""
    return _OF_A_LAYER.get(spec.model_type, _OTHERS)
