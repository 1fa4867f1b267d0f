"""Foreign fields: what other servers and libraries call what a request may ask for, and what to send here instead.

They would change the answer, so they are refused by name and never ignored like other unknown fields.
"""

from collections.abc import Mapping
from types import MappingProxyType

_NOT_BUILT = "it is not built; leave it out"
_CONSTRAINED = "send response_format or structured_outputs"
_GRAMMARS = "json_schema, grammar, regex, ebnf, format, guided_decoding"
_INSTEAD = {
    "max_tokens": "max_new_tokens, max_output_tokens, max_tokens_to_sample, max_length, n_predict, num_predict",
    "min_tokens": "min_new_tokens, min_length",
    "repetition_penalty": "repeat_penalty, rep_pen",
    "stop": "stop_sequences, stop_words, stop_str, stop_strings",
    "n": "num_return_sequences, candidate_count",
    "bad_words": "bad_words_ids, banned_tokens",
    "echo": "return_full_text",
    "seed": "random_seed",
    "reasoning_effort": "reasoning",
    "reasoning_effort or chat_template_kwargs": "thinking, enable_thinking",
    "temperature": "do_sample, temp",
    "include_stop_str_in_output": "no_stop_trim",
    "a message of the role system": "system, instructions",
    "its fields by themselves": "options",
}
_NOT_HERE = (
    "num_beams, typical_p, tfs_z, top_a, mirostat, mirostat_mode, mirostat_tau, mirostat_eta, dry_multiplier, "
    "xtc_probability, xtc_threshold, epsilon_cutoff, eta_cutoff, no_repeat_ngram_size, penalty_alpha, guidance_scale, "
    "negative_prompt, dynatemp_range, smoothing_factor, safe_prompt, lora_request, lora_path, adapter_id, stop_regex, "
    "custom_logit_processor, images, input, thinking_budget"
)

_FOREIGN = (
    {name: f"send {instead}" for instead, names in _INSTEAD.items() for name in names.split(", ")}
    | dict.fromkeys(_NOT_HERE.split(", "), _NOT_BUILT)
    | dict.fromkeys(_GRAMMARS.split(", "), _CONSTRAINED)
)
_OTHER_ROUTE = "use /v1/chat/completions"
OF_CHATS: Mapping[str, str] = MappingProxyType(
    _FOREIGN
    | {
        "prompt": "send messages, or use /v1/completions",
        "suffix": _NOT_BUILT,
        "prompt_embeds": _NOT_BUILT,
    }
)
OF_COMPLETIONS: Mapping[str, str] = MappingProxyType(
    _FOREIGN
    | {
        "messages": "send prompt, or use /v1/chat/completions",
        "max_completion_tokens": "send max_tokens",
        "top_logprobs": "send logprobs with a number",
    }
    | dict.fromkeys(
        (
            *("tools", "tool_choice", "functions", "function_call", "documents", "reasoning_effort", "verbosity"),
            *("chat_template", "chat_template_kwargs", "continue_final_message", "audio", "web_search_options"),
        ),
        _OTHER_ROUTE,
    )
)
_MEDIA = "image, images, image_url, input_image, video, videos, video_url, audio_url, input_audio, file, files"
_TEXT_ONLY = dict.fromkeys(_MEDIA.split(", "), "send text only")
OF_PARTS: Mapping[str, str] = MappingProxyType(_TEXT_ONLY | {"audio": "send text only"})
OF_MESSAGES: Mapping[str, str] = MappingProxyType(_TEXT_ONLY)
OF_FUNCTIONS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("input_schema", "parametersJsonSchema", "inputSchema", "schema"), "send parameters")
)
OF_TOOLS: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("name", "parameters", "input_schema", "strict"), "send it within function")
)
