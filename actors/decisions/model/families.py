"""What is known of each model family beside its own plan: better cuts, and what is refused and why."""

# What can be cut, though Transformers' plan leaves it whole on every shard: patterns inside a layer → style.
_ATTENTION = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
_LATENTS = {"self_attn.q_a_proj": "replicate"}  # small, and all heads need all of it: a cut would cost a gather
_LATENT_ATTENTION = _LATENTS | {
    "self_attn.q_proj": "colwise",
    "self_attn.q_b_proj": "colwise",
    "self_attn.kv_b_proj": "colwise",
    "self_attn.o_proj": "rowwise",
}
_FFN = {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"}
_SHARED_EXPERTS = {
    "mlp.shared_experts.gate_proj": "colwise",
    "mlp.shared_experts.up_proj": "colwise",
    "mlp.shared_experts.down_proj": "rowwise",
}
# Alternating gate and up columns, stored [in, out], with biases
_INTERLEAVED_EXPERTS = {
    "mlp.experts": "moe_tp_experts",
    "mlp.experts.gate_up_proj": "interleaved_rowwise",
    "mlp.experts.gate_up_proj_bias": "interleaved_rowwise",
    "mlp.experts.down_proj": "colwise",
    "mlp.experts.down_proj_bias": "added_once",
}
_SHARED_MLP = {"shared_mlp.input_linear": "packed_colwise", "shared_mlp.output_linear": "rowwise"}
_FUSED_FFN = {"mlp.gate_up_proj": "packed_colwise", "mlp.down_proj": "rowwise"}
_FUSED_QKV = {"self_attn.qkv_proj": "qkv_colwise", "self_attn.o_proj": "rowwise"}
_NORMS_BY_HEAD = {"self_attn.q_norm.weight": "colwise", "self_attn.k_norm.weight": "colwise"}
_WIDE_NORMS = {"self_attn.q_norm": "norm_colwise", "self_attn.k_norm": "norm_colwise"}
_BETTER: dict[str, dict[str, str]] = {
    "afmoe": _ATTENTION | {"self_attn.gate_proj": "colwise"} | _FFN | _SHARED_EXPERTS,
    "axk1": _LATENT_ATTENTION,
    "cohere": _NORMS_BY_HEAD,
    "deepseek_v2": _LATENTS,
    "deepseek_v3": _LATENT_ATTENTION,
    "flint": _ATTENTION | {"self_attn.sinks": "colwise"},
    "flex_olmo": _ATTENTION | _WIDE_NORMS,
    "glm": _FUSED_FFN,
    "glm4": _FUSED_FFN,
    "glm4_moe_lite": _LATENTS,
    "gpt_oss": _ATTENTION | {"self_attn.sinks": "colwise"} | _INTERLEAVED_EXPERTS,
    "granitemoe": _ATTENTION,
    "granitemoehybrid": _ATTENTION | _SHARED_MLP,
    "granitemoeshared": _ATTENTION | _SHARED_MLP,
    "hunyuan_v1_dense": _ATTENTION | _FFN,
    "hunyuan_v1_moe": _ATTENTION,
    "minicpm3": _LATENTS,
    "minimax_m2": _ATTENTION | _WIDE_NORMS,
    "minimax_m3_vl_text": _ATTENTION,
    "olmo2": _ATTENTION | _WIDE_NORMS,
    "olmo3": _ATTENTION | _WIDE_NORMS,
    "olmoe": _ATTENTION | _WIDE_NORMS,
    "phi3": _FUSED_QKV | _FUSED_FFN,
    "phimoe": _ATTENTION,
    "qwen3_vl_text": _ATTENTION | _FFN,
    "youtu": _LATENT_ATTENTION,
}


# Families that tests/families shows to be right on tiny checkpoints. Others are refused.
TESTED = frozenset(
    [
        "AXK1ForCausalLM",
        "AfmoeForCausalLM",
        "ApertusForCausalLM",
        "ArceeForCausalLM",
        "AriaTextForCausalLM",
        "BeamForCausalLM",
        "Cohere2ForCausalLM",
        "Cohere2MoeForCausalLM",
        "Cohere2VisionForConditionalGeneration",
        "CohereCompassForCausalLM",
        "CohereForCausalLM",
        "CwmForCausalLM",
        "DeepseekV2ForCausalLM",
        "DeepseekV3ForCausalLM",
        "Dots1ForCausalLM",
        "Ernie4_5ForCausalLM",
        "Ernie4_5_MoeForCausalLM",
        "Exaone4ForCausalLM",
        "ExaoneMoeForCausalLM",
        "FlexOlmoForCausalLM",
        "FlintForCausalLM",
        "GPTNeoXForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Gemma4ForCausalLM",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForCausalLM",
        "GemmaForCausalLM",
        "Glm4ForCausalLM",
        "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM",
        "Glm4vForConditionalGeneration",
        "GlmForCausalLM",
        "GptOssForCausalLM",
        "GraniteForCausalLM",
        "GraniteMoeForCausalLM",
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSharedForCausalLM",
        "GraniteSWAForCausalLM",
        "HYV3ForCausalLM",
        "HeliumForCausalLM",
        "HunYuanDenseV1ForCausalLM",
        "HunYuanMoEV1ForCausalLM",
        "HyperCLOVAXForCausalLM",
        "Idefics3ForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "Jais2ForCausalLM",
        "Kimi_K25ForConditionalGeneration",
        "Kolibri1ForCausalLM",
        "LagunaForCausalLM",
        "Llama4ForCausalLM",
        "Llama4ForConditionalGeneration",
        "LlamaForCausalLM",
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "MellumForCausalLM",
        "MiMoV2FlashForCausalLM",
        "MiniCPM3ForCausalLM",
        "MiniMaxM2ForCausalLM",
        "MiniMaxM3VLForCausalLM",
        "Ministral3ForCausalLM",
        "MinistralForCausalLM",
        "Mistral3ForConditionalGeneration",
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "NanoChatForCausalLM",
        "NemotronForCausalLM",
        "Olmo2ForCausalLM",
        "Olmo3ForCausalLM",
        "OlmoForCausalLM",
        "OlmoeForCausalLM",
        "Phi3ForCausalLM",
        "PhiForCausalLM",
        "PhimoeForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "SeedOssForCausalLM",
        "SmolLM3ForCausalLM",
        "SolarOpenForCausalLM",
        "Starcoder2ForCausalLM",
        "VaultGemmaForCausalLM",
        "VoxtralForConditionalGeneration",
        "YoutuForCausalLM",
    ]
)


def amended_styles(
    model_type: str, styles: dict[str, str], layers_name: str, embedding_name: str, head_name: str
) -> dict[str, str]:
    """The plan of a model (pattern → style) with the better cuts, and with embedding and head cut by vocabulary."""
    better = {f"{layers_name}.*.{pattern}": style for pattern, style in _BETTER.get(model_type, {}).items()}
    return {**styles, embedding_name: "embedding_rowwise", head_name: "colwise_gather_output", **better}
