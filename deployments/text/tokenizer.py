"""Text: the model's tokenizer and chat template. Prompts become token ids, and ids become text."""

import asyncio
import hashlib
import logging
from array import array
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from actors.decisions.model.generation_config import eos_token_ids
from deployments.text.chat_template import ChatTemplate
from deployments.text.control_tokens import ControlTokens
from deployments.text.grammars import Grammars
from deployments.text.prompts import ContentRule, Conversation, ConversationError, Prompt
from deployments.text.response_format import DEFAULT, ResponseFormat, choose_format
from deployments.text.response_reader import ResponseReader
from deployments.text.token_text import TokenTexts
from deployments.text.tool_calls import CallIds, with_call_ids
from deployments.text.transcript import Decoder, Transcript

logger = logging.getLogger(__name__)

_MAX_PREFIX = 256  # ids at the end of a prompt that may belong to the answer: what begins it, and an opened thought
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
        texts = _chat_templates(tokenizer)
        batch = None if self._backend is None else partial(self._encode_batch, add_special_tokens=False)
        self._controls = ControlTokens(tokenizer, "".join(texts), batch)
        self._templates = [
            ChatTemplate(template, tokenizer.special_tokens_map, now, self._controls.mark) for template in texts
        ]
        self._format: ResponseFormat | None = None
        self._grammars = Grammars(tokenizer, self.eos_token_ids)
        self._hashed: tuple[list[int], str] = ([], "")  # a prompt, and its digest
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    @classmethod
    def load(cls, folder: str | Path, tool_format: str = "auto", now: datetime | None = None) -> "Text":
        """The tokenizer of a checkpoint folder. `tool_format`: see the config's `model`; `now`: see __init__.

        Raises ValueError, with the remedy, when it cannot be read, when its chat template does not end, or for a format
        that does not exist.
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
        if not text._templates:
            logger.info("the checkpoint has no chat template: chats are refused, /v1/completions answers")
        else:
            text._templates[0].check()
            text._choose_format(tool_format)
        return text

    @property
    def can_call_tools(self) -> bool:
        """Whether it is known how the model writes tool calls; as DEFAULT where it hears of tools in messages only."""
        if self._format is None or not self._format.has_calls:
            return False
        return self._templates[-1].knows_tools or self._format.name == DEFAULT

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

    def names(self, token_ids: list[int]) -> list[str]:
        """Tokens as the vocabulary writes them; empty for ids that it does not have."""
        return [name or "" for name in self._tokenizer.convert_ids_to_tokens(token_ids)]

    def info(self) -> dict[str, Any]:
        """What clients need of the tokenizer to do its work themselves."""
        tokenizer = self._tokenizer
        ids = {f"{name}_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos_token", "eos_token", "pad_token")}
        templates = _chat_templates(tokenizer)
        return {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": len(tokenizer),
            **{name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str | list)},
            **ids,
            "end_token_ids": sorted(self.eos_token_ids),
            "chat_template": templates[0] if templates else None,
            "tool_chat_template": templates[-1] if templates else None,
        }

    def close(self) -> None:
        """End the processes of chat templates and grammars. May be called twice."""
        self._grammars.close()
        for template in self._templates:
            template.close()

    def transcript(
        self, stops: list[str], min_tokens: int = 0, shows_specials: bool = False, shows_stop: bool = False
    ) -> Transcript:
        """A Transcript, which turns one sequence's ids into text; `shows_specials`: special tokens are text too."""
        if shows_specials:
            decoder = Decoder(partial(self._decode, skip_special_tokens=False))
        else:
            decoder = Decoder(self._decode, self._special_texts)
        return Transcript(decoder, stops, min_tokens, shows_stop)

    def reader(self, conversation: Conversation, prompt_ids: list[int], index: int) -> ResponseReader | None:
        """What reads an answer to a conversation; None where all that the model can write is text.

        `prompt_ids` show what the prompt has of the answer already. Together with `index`, which tells the answers to
        one prompt apart, they also make the ids of calls: the same request has the same ones.
        """
        if self._format is None or not (conversation.tools or self._format.has_thinking):
            return None
        tools = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in conversation.tools}
        salt = f"{self._digest(prompt_ids)} {index}" if tools else ""
        call_ids = CallIds(self._format.call_ids, salt, conversation.num_calls)
        reader = ResponseReader(self._format, self._prefix(prompt_ids), tools, call_ids, conversation.is_single_call)
        if conversation.continues_message:
            reader.go_on()
        return reader

    async def grammar(self, content: ContentRule | None, prompt: Prompt, prompt_ids: list[int]) -> str | None:
        """What an answer to the prompt is held to, in llguidance's form; None: to nothing.

        Raises GrammarError where it cannot be made sure of.
        """
        if content is None and not (isinstance(prompt, Conversation) and prompt.has_held_calls):
            return None
        return await self._grammars.of(content, prompt, self._format, self._prefix(prompt_ids))

    def _prefix(self, prompt_ids: list[int]) -> str:
        """What a prompt has of the answer already."""
        prompt = self._decode(prompt_ids[-_MAX_PREFIX:], skip_special_tokens=False)
        return "" if self._format is None else self._format.prefix(prompt)

    def _digest(self, prompt_ids: list[int]) -> str:
        """A digest of the prompt; hashed once for all answers to it, which follow each other."""
        if self._hashed[0] is not prompt_ids:
            self._hashed = prompt_ids, _hashed(prompt_ids)
        return self._hashed[1]

    def _choose_format(self, tool_format: str) -> None:
        tokenizer, template = self._tokenizer, self._templates[0]
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        own = getattr(tokenizer, "response_template", None)
        templates = "".join(_chat_templates(tokenizer))
        self._format = choose_format(tool_format, own, templates, added, template.generation_prompt())
        logger.info("tool calls and thinking are read as: %s", self._format.name if self._format else "plain text")

    def _encode(self, prompt: Prompt, add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if isinstance(prompt, Conversation):
            text = self._render(prompt)  # with the special tokens that the template writes
            return self._controls.encode(text) if self._controls.are_marked(text) else self._tokenize(text, False)
        return self._tokenize(prompt, add_special_tokens)

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._backend is None:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids)
        return self._encode_batch([text], add_special_tokens)[0]

    def _encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        assert self._backend is not None
        # a batch, because only batches are encoded without holding the interpreter's lock
        return [
            encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        ]

    def _render(self, conversation: Conversation) -> str:
        if not self._templates:
            raise ConversationError("messages: this model has no chat template; use /v1/completions")
        uses_tools = bool(conversation.tools or conversation.num_calls)
        if self._format is not None:
            conversation = with_call_ids(conversation, self._format.call_ids)
        return self._templates[-1 if uses_tools else 0].render(conversation)

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


def _hashed(token_ids: list[int]) -> str:
    return hashlib.sha256(array("q", token_ids).tobytes()).hexdigest()


def _chat_templates(tokenizer: Any) -> list[str]:
    """The chat template; behind it the one for conversations with tools, where that is another; none at all."""
    try:
        template = tokenizer.get_chat_template()
        return list(dict.fromkeys([template, tokenizer.get_chat_template(tools=[])]))
    except ValueError:  # there is none, or several without a default
        return []
