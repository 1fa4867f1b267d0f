"""What `stagemesh verify` says, as data: what was compared, what was found, and what to do about it."""

from dataclasses import dataclass
from typing import Literal

from actors.tensors.verify.findings import Difference, Findings

Verdict = Literal["right", "wrong", "wrong by a substitution"]


@dataclass(frozen=True)
class VerifyReport:
    """A whole verification."""

    model: str
    architecture: str
    device: str
    dtype: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    num_layers: int
    prompts: int
    shortest_prompt: int  # tokens
    longest_prompt: int
    new_tokens: int  # after each prompt
    substitutions: tuple[str, ...]  # kernels of the device that stand for the model's own modules
    as_served: Findings
    without_substitutions: Findings | None  # a second run, which looks closer; None: the first was right
    not_exercised: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Right, or who is at fault."""
        if self.as_served.is_right:
            return "right"
        is_right_without = self.without_substitutions is not None and self.without_substitutions.is_right
        return "wrong by a substitution" if is_right_without and self.substitutions else "wrong"

    @property
    def findings(self) -> Findings:
        """Those that say most of what differs."""
        closer = self.without_substitutions
        return closer if closer is not None and not closer.is_right else self.as_served

    @property
    def first_difference(self) -> Difference | None:
        """The first place that differs; None where there is none, or only logits and ids do."""
        return self.findings.differences[0] if self.findings.differences else None

    @property
    def remedy(self) -> tuple[str, ...]:
        """What to do next."""
        if self.verdict == "right":
            return ()
        if self.verdict == "wrong by a substitution":
            return (
                "set `substitutions: none` in the config, with which this layout is right",
                f"report it: one of {', '.join(self.substitutions)} computes something else here",
            )
        if self.tensor_parallel_size * self.pipeline_parallel_size > 1:
            return (
                "do not serve this layout",
                "verify again with --tp 1 --pp 1: if that is right the cut is wrong, else how the model is read",
                "compare the checkpoint's files on all nodes; where they are the same, report it with this text",
            )
        return (
            "do not serve this model here",
            "compare the checkpoint's files with their source; where they are the same, report it with this text",
        )
