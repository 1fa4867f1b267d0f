"""Sampling defaults: what requests get for fields that they leave out, as generation_config.json says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, ValidationError

from actors.decisions.model.generation_config import GENERATION_CONFIG, read_generation_config
from deployments.api.sampling_fields import SamplingBody
from deployments.api.strict_body import as_api_error

# Of a request's fields, those that the file may set; max_tokens too, by the name max_new_tokens
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
# Keys beside token ids that change nothing of an answer: how Transformers computes, and in which form it returns it
_INERT = {"transformers_version", "use_cache", "cache_implementation", "return_dict_in_generate", "output_scores"}
_INERT |= {"output_attentions", "output_hidden_states", "output_logits", "remove_invalid_values", "disable_compile"}

AnyBody = TypeVar("AnyBody", bound=SamplingBody)


class _File(SamplingBody):
    """The keys that are read. Their bounds are those of a request's fields."""

    do_sample: bool = True
    max_new_tokens: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class SamplingDefaults:
    """What the checkpoint sets; whatever else a request leaves out has the API's own default."""

    fields: Mapping[str, float] = field(default_factory=dict)  # by the request's name for it, one of FIELDS
    max_tokens: int | None = None
    not_applied: tuple[str, ...] = ()  # other keys of the file that would change an answer

    @classmethod
    def read(cls, folder: Path, wanted: Literal["auto", "none"] = "auto") -> "SamplingDefaults":
        """Those of a checkpoint folder, or with `none` no defaults at all.

        `do_sample: false` is temperature 0: whoever writes it wants greedy answers, whatever else the file has. Without
        that key a temperature in the file holds. Raises ValueError: one line a problem, by file and key, with a remedy.
        """
        if wanted == "none":
            return cls()
        keys = read_generation_config(folder)
        known = {key: value for key, value in keys.items() if key in FIELDS or key in ("do_sample", "max_new_tokens")}
        try:
            checked = _File.model_validate(known)
        except ValidationError as error:
            problems = error.errors(include_url=False, include_input=False)
            raise ValueError(
                "\n".join(
                    f"{folder / GENERATION_CONFIG}: {as_api_error(problem).message}; correct it, or set "
                    "model.generation_config: none to leave its defaults out"
                    for problem in problems
                )
            ) from None
        fields = {name: getattr(checked, name) for name in FIELDS if name in known}
        if not checked.do_sample:
            fields["temperature"] = 0.0
        others = (key for key in keys if key not in known and key not in _INERT and not key.startswith("_"))
        not_applied = tuple(key for key in others if not key.endswith("_token_id") or key.startswith("forced_"))
        return cls(fields, checked.max_new_tokens, not_applied)

    def fill(self, body: AnyBody) -> AnyBody:
        """The body, where it names none of `fields`, with the checkpoint's; null is as good as absent."""
        left_out = {name: value for name, value in self.fields.items() if name not in body.model_fields_set}
        return body.model_copy(update=left_out) if left_out else body

    def in_force(self) -> dict[str, float | None]:
        """What each field is when a request leaves it out; max_tokens None: the route's own."""
        own = {name: SamplingBody.model_fields[name].default for name in FIELDS}
        return {**own, **self.fields, "max_tokens": self.max_tokens}

    def __str__(self) -> str:
        """For the log of a start."""
        found = {**self.fields, **({} if self.max_tokens is None else {"max_tokens": self.max_tokens})}
        words = ", ".join(f"{name} {value:g}" for name, value in found.items()) or "none"
        return words + (f"; not applied: {', '.join(self.not_applied)}" if self.not_applied else "")
