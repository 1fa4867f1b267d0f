"""Text and token ids: tokenizer, chat template, and incremental decoding."""
