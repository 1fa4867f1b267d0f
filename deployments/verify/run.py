"""A verification on Ray: serves the prompts by a gang that records, then compares with plain Transformers.

The comparison runs on the first stage's node, on a device that the gang has given back.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from actors.decisions.model.plan import Plan
from actors.decisions.model.spec import ModelSpec
from actors.remote.actor_pool import actor_options
from actors.remote.gang import Gang
from actors.remote.recording_actor import recording_actor
from actors.tensors.verify.findings import Findings, Served
from actors.words.errors import GangFailure
from actors.words.messages import Request, SamplingParams
from cluster.placement.devices import own_device
from cluster.placement.placement import Device
from configs.config import Config
from deployments.gangs import Session, connected_to_ray, plan_for_cluster, reserved, say
from deployments.verify.prompts import Prompts
from deployments.verify.report import VerifyReport

Places = frozenset[tuple[int, int]]  # of tokens: sequence, position


def verify(config: Config, spec: ModelSpec, prompts: Prompts, num_new: int) -> VerifyReport:
    """Serve the prompts and compare; again, closer and without substitutions, where something differs.

    Raises ValueError where the gang or the comparison cannot run.
    """
    with connected_to_ray("verify"):
        plan, device = plan_for_cluster(config, spec)
        with reserved(config, plan.topology, device) as placement:
            run = _Run(plan, device, placement, prompts, num_new)
            found, substitutions = run.findings(config, frozenset())
            closer = None
            if not found.is_right:
                say("something differs; once more without substitutions, with more of the tokens that differ")
                plain = config.model_copy(update={"substitutions": "none"})
                closer, _ = run.findings(plain, found.furthest)
    lengths = list(map(len, prompts.ids))
    return VerifyReport(
        model=config.served_name,
        architecture=spec.architecture,
        device=device,
        dtype=spec.dtype,
        tensor_parallel_size=plan.topology.tensor_parallel_size,
        pipeline_parallel_size=plan.topology.pipeline_parallel_size,
        num_layers=spec.num_layers,
        prompts=len(lengths),
        shortest_prompt=min(lengths),
        longest_prompt=max(lengths),
        new_tokens=num_new,
        substitutions=substitutions,
        as_served=found,
        without_substitutions=closer,
        not_exercised=prompts.not_exercised,
    )


class _Run:
    """Runs gangs and comparisons in one reservation."""

    def __init__(self, plan: Plan, device: Device, placement: PlacementGroup, prompts: Prompts, num_new: int) -> None:
        self._plan = plan
        self._device = device
        self._placement = placement
        self._prompts = prompts.ids
        self._num_new = num_new

    def findings(self, config: Config, places: Places) -> tuple[Findings, tuple[str, ...]]:
        """What is found of one gang, and the substitutions that were in use."""
        try:
            with self._started(config, places) as gang:
                used = {one.what for rank in gang.ranks() for one in rank.substitutions if one.count}
                served = self._serve(gang)
                recordings = gang.ask("recording")  # the ranks have left their loops
                ray.wait(recordings, num_returns=len(recordings), timeout=config.timeouts.start_s, fetch_local=False)
        except GangFailure as error:
            raise ValueError(f"the gang failed: {error}") from None
        return self._compare(config, served, recordings), tuple(sorted(used))

    @contextlib.contextmanager
    def _started(self, config: Config, places: Places) -> Iterator[Gang]:
        class RecordingGang(Gang):
            actor_class = recording_actor(places)

        say(f"starting {self._plan.topology.num_ranks} ranks")
        gang = RecordingGang(config, self._plan.topology, self._placement, self._device)
        try:
            gang.start(self._plan)
            yield gang
        finally:
            gang.close()

    def _serve(self, gang: Gang) -> list[Served]:
        """Greedy answers to all prompts at once. Logits that are no numbers end an answer: the comparison finds why."""
        say(f"serving {len(self._prompts)} prompts, {sum(map(len, self._prompts))} tokens")
        greedy, new_ids = SamplingParams(temperature=0.0), dict[str, list[int]]()
        with Session(gang, self._plan) as session:
            requests = [Request(str(i), list(ids), self._num_new, greedy) for i, ids in enumerate(self._prompts)]
            for _, event in session.answer(requests):
                if event.error and event.code != "numerical_error":
                    raise ValueError(event.error)
                new_ids.setdefault(event.request_id, []).extend(event.token_ids)
        return [Served(ids, tuple(new_ids[str(i)])) for i, ids in enumerate(self._prompts)]

    def _compare(self, config: Config, served: list[Served], recordings: Sequence[Any]) -> Findings:
        cpus = config.placement.cpus_per_rank * self._plan.topology.tensor_parallel_size
        options = actor_options(self._placement, 0, self._device)
        reference: Any = ray.remote(_ReferenceActor).options(**options).remote(max(1, int(cpus)))
        try:
            say("loading the same model by Transformers")
            ray.get(reference.load.remote(config, self._plan, served, *recordings))
            for index in range(len(served)):
                say(f"comparing prompt {index + 1} of {len(served)}")
                ray.get(reference.compare.remote(index))
            found: Findings = ray.get(reference.findings.remote())
            return found
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise error.cause from None
            raise ValueError(f"the comparison failed: {error.cause!r}") from None
        finally:
            ray.kill(reference)


class _ReferenceActor:
    """The process of the reference, on one device or on some threads."""

    def __init__(self, num_threads: int) -> None:
        self._device, _ = own_device()
        self._num_threads = num_threads

    def load(self, config: Config, plan: Plan, served: list[Served], *recordings: Any) -> None:
        """Load Transformers' own model."""
        from actors.tensors.verify.verification import Verification
        from actors.tensors.weights.source import resolve_source

        folder: Path = resolve_source(config.model, plan.spec.revision)
        unpacked = [recording.unpacked() for recording in recordings]
        self._verification = Verification(folder, plan, self._device, self._num_threads, unpacked, served)

    def compare(self, sequence: int) -> None:
        """Compare one sequence."""
        self._verification.compare(sequence)

    def findings(self) -> Findings:
        """What was found of all sequences that were compared."""
        return self._verification.findings()
