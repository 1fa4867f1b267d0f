"""Text: the model's tokenizer and chat template. Prompts become token ids, and ids become text."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from deployments.text.chat_template import ChatTemplate
from deployments.text.control_tokens import ControlTokens
from deployments.text.generation_config import eos_token_ids
from deployments.text.prompts import Conversation, ConversationError, Prompt
from deployments.text.response_format import ResponseFormat, choose_format
from deployments.text.response_reader import ResponseReader
from deployments.text.token_text import TokenTexts
from deployments.text.transcript import Decoder, Transcript

logger = logging.getLogger(__name__)

INLINE_CHARS = 4096  # of a request's prompts together; more takes milliseconds, and is tokenized in another thread


class Text:
    """Used in the event loop's thread; long texts and conversations are encoded in another thread, one at a time."""

    def __init__(
        self, tokenizer: Any, eos_token_ids: frozenset[int] = frozenset(), now: datetime | None = None
    ) -> None:
        """`tokenizer` is one of Transformers'; `eos_token_ids` end an answer beside the tokenizer's own.

        `now`: the time that chat templates are told; none: that of each conversation.
        """
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:  # prompts that are too long are refused, never cut
            self._backend.no_truncation()
            self._backend.no_padding()
        own_eos = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
        self.eos_token_ids = frozenset(eos_token_ids | own_eos)
        added = tokenizer.added_tokens_decoder
        self._special_texts = {token_id: token.content for token_id, token in added.items() if token.special}
        self.token_texts = self._token_texts()
        self._templates = _chat_templates(tokenizer)
        self._controls = ControlTokens(tokenizer, "\n".join(self._templates.values()), self._encode_batch)
        self._template = self._chat_template(now)
        self._format: ResponseFormat | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    @classmethod
    def load(cls, folder: str | Path, now: datetime | None = None) -> "Text":
        """The tokenizer of a checkpoint folder. `now`: see __init__.

        Raises ValueError, with the remedy, when it cannot be read, or when its chat template does not end.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # noqa: BLE001 - those of a library in Rust have no class of their own
            reason = " ".join(str(error).split())[:400]
            raise ValueError(
                f"{folder}: holds no tokenizer that Transformers can read ({reason}); copy tokenizer.json and "
                "tokenizer_config.json from the checkpoint's source, whole"
            ) from None
        text = cls(tokenizer, eos_token_ids(Path(folder)), now)
        if text._template is None:
            logger.info("the checkpoint has no chat template: chats are refused, /v1/completions answers")
        else:
            text._template.check()
        return text

    async def encode(self, prompts: list[Prompt], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of prompts, as the tokenizer and for messages the chat template make them; ids pass as they are.

        Messages have the special tokens that the template writes, never more. Raises ConversationError when the
        template refuses the messages, or there is none.
        """
        encode = partial(self._encode, add_special_tokens=add_special_tokens)
        has_conversation = any(isinstance(prompt, Conversation) for prompt in prompts)
        num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        if self._backend is not None and not has_conversation and num_chars <= INLINE_CHARS:
            return list(map(encode, prompts))
        loop = asyncio.get_running_loop()
        return [await loop.run_in_executor(self._thread, encode, prompt) for prompt in prompts]

    async def decode(self, token_ids: list[int]) -> str:
        """The text of ids, special tokens included."""
        if len(token_ids) <= INLINE_CHARS and self._backend is not None:
            return self._decode(token_ids, skip_special_tokens=False)
        decode = partial(self._decode, token_ids, skip_special_tokens=False)
        return await asyncio.get_running_loop().run_in_executor(self._thread, decode)

    def close(self) -> None:
        """End the process of the chat template. May be called twice."""
        if self._template is not None:
            self._template.close()

    def transcript(self, stops: list[str], min_tokens: int = 0) -> Transcript:
        """A Transcript, which turns one sequence's ids into text."""
        return Transcript(Decoder(self._decode, self._special_ids), stops, min_tokens)

    def _encode(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, Conversation):
            return self._tokenize(self._render(prompt), add_special_tokens=False)  # the template writes its own
        return self._tokenize(prompt, add_special_tokens)

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._backend is None:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        # a batch, because only batches are encoded without holding the interpreter's lock
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def _render(self, conversation: Conversation) -> str:
        if self._template is None:
            raise ConversationError("messages: this model has no chat template; use /v1/completions")
        return self._template.render(conversation.messages)

    def _decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        if self._backend is None:
            text = self._tokenizer.decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces=False)
        else:
            text = self._backend.decode(token_ids, skip_special_tokens)
        return str(text)

    def _token_texts(self) -> TokenTexts:
        decode = partial(self._decode, skip_special_tokens=False)
        before = self._tokenize("a", add_special_tokens=False)
        if self._backend is None:
            return TokenTexts(decode, self._tokenizer.convert_ids_to_tokens, False, before)
        decoder = self._backend.decoder
        is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()  # its JSON
        return TokenTexts(decode, self._backend.id_to_token, is_byte_level, before)


def _chat_template(tokenizer: Any, now: datetime | None) -> ChatTemplate | None:
    try:
        template = tokenizer.get_chat_template()
    except ValueError:  # there is none, or several without a default
        return None
    return ChatTemplate(template, tokenizer.special_tokens_map, now)
