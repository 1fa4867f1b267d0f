"""The offline benchmark: starts a gang of each layout on Ray, without Serve and HTTP, and times batches through it.

Each layout has a placement group of its own, and gives it back before the next one starts.
"""

import argparse
import dataclasses
import random
import time
import uuid
from pathlib import Path

import ray

from actors.decisions.model.accelerators import ACCELERATORS
from actors.decisions.model.estimate import Estimate
from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.spec import ModelSpec
from actors.decisions.schedule.blocks import num_blocks_for
from actors.remote.gang import Gang
from actors.words.errors import GangFailure
from actors.words.messages import Request, SamplingParams
from cluster.placement.placement import Device
from configs.config import Config
from deployments.bench.scaling import BatchSpeed, LayoutFigures, OfflineReport, Round, as_text, speed_of
from deployments.gangs import Session, connected_to_ray, plan_for_cluster, reserved, say
from deployments.plan.command import config_of

__all__ = ["as_text", "measure"]

_WARM_UP_TOKENS = 4


def measure(options: argparse.Namespace) -> OfflineReport:
    """Measure all layouts in turn. Raises ValueError: for options that cannot work, or when a gang fails."""
    configs, spec = _asked(options)
    config = configs[0]
    _check_lengths(options, make_plan(config, spec))
    with connected_to_ray("bench"):
        plans = [plan_for_cluster(one, spec) for one in configs]  # all, before anything starts
        device = plans[0][1]
        if options.gpu and device != "cuda":
            raise ValueError(f"--gpu: the gang runs on {device}, whose limits are not known; leave it out")
        layouts = tuple(
            _measure_layout(one, plan, device, options) for one, (plan, _) in zip(configs, plans, strict=True)
        )
    return OfflineReport(
        model=config.served_name,
        device=device,
        dtype=spec.dtype,
        input_len=options.input_len,
        output_len=options.output_len,
        rounds=options.rounds,
        seed=options.seed,
        accelerator=options.gpu,
        layouts=layouts,
    )


def _asked(options: argparse.Namespace) -> tuple[list[Config], ModelSpec]:
    """The config of each layout, and the model. Raises ValueError for layouts that cannot be."""
    from actors.tensors.model.spec_reader import read_spec
    from actors.tensors.weights.source import resolve_source

    layouts = [dataclasses.astuple(one) for one in options.layouts or []] or [(None, None)]
    configs = [config_of(options.target, *layout) for layout in layouts]
    model = configs[0].model
    spec = read_spec(resolve_source(model), model.dtype)
    for config in configs:
        make_plan(config, spec)
    return configs, spec


def _check_lengths(options: argparse.Namespace, most: Plan) -> None:
    """Raises ValueError for batches and lengths that do not fit a plan."""
    tokens = options.input_len + options.output_len
    if max(options.batch) > most.scheduler.max_num_seqs:
        raise ValueError(f"--batch: {max(options.batch)}, but scheduler.max_num_seqs is {most.scheduler.max_num_seqs}")
    if tokens > most.max_model_len:
        raise ValueError(
            f"--input-len and --output-len: {tokens} tokens together, but model.max_model_len is {most.max_model_len}"
        )


def _measure_layout(config: Config, plan: Plan, device: Device, options: argparse.Namespace) -> LayoutFigures:
    topology = plan.topology
    name = f"{topology.tensor_parallel_size} x {topology.pipeline_parallel_size}"
    say(f"{name}: starting {topology.num_ranks} ranks")
    with reserved(config, plan.topology, device) as group:
        began = time.perf_counter()
        gang = Gang(config, topology, group, device)
        try:
            gang.start(plan)
            start_s = time.perf_counter() - began
            with _Bench(gang, plan) as bench:
                speeds = tuple(_measure_batch(bench, name, batch, config, options) for batch in options.batch)
            return _figures(gang, plan, start_s, speeds)
        except GangFailure as error:
            raise ValueError(f"{name}: {error}") from None
        finally:
            gang.close()


def _figures(gang: Gang, plan: Plan, start_s: float, speeds: tuple[BatchSpeed, ...]) -> LayoutFigures:
    here = ray.get_runtime_context().get_node_id()
    ranks = gang.ranks()
    return LayoutFigures(
        tensor_parallel_size=plan.topology.tensor_parallel_size,
        pipeline_parallel_size=plan.topology.pipeline_parallel_size,
        start_s=start_s,
        load_s=max(one.load_s for one in ranks),
        num_blocks=gang.num_blocks,
        weight_bytes=tuple(one.weight_bytes for one in ranks),
        cache_bytes=tuple(gang.num_blocks * plan.kv_bytes_per_block(one.rank) for one in ranks),
        process_bytes=tuple(_private_bytes(one.pid) if one.node == here else None for one in ranks),
        speeds=speeds,
    )


def _private_bytes(pid: int) -> int | None:
    """Bytes of a process's memory that are no mapped file: packed weights, cache, activations, the interpreter."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return None


class _Bench(Session):
    """Sends batches of requests to an engine, and notes when their tokens come."""

    def round(self, batch: int, input_len: int, output_len: int, rng: random.Random) -> Round:
        """Run one batch, submitted together. Raises ValueError when a request fails."""
        prompts = {uuid.UUID(int=rng.getrandbits(128)).hex: self._prompt(rng, input_len) for _ in range(batch)}
        tokens_s: dict[str, list[float]] = {name: [] for name in prompts}
        sampling = SamplingParams(temperature=0.0)
        began = time.perf_counter()
        requests = [Request(name, ids, output_len, sampling) for name, ids in prompts.items()]
        for now, event in self.answer(requests):
            if event.error:
                raise ValueError(event.error)
            tokens_s[event.request_id] += [now - began] * len(event.token_ids)
        return Round(tuple(map(tuple, tokens_s.values())))

    def _prompt(self, rng: random.Random, input_len: int) -> list[int]:
        return rng.choices(range(self.plan.spec.vocab_size), k=input_len)


def _measure_batch(bench: _Bench, name: str, batch: int, config: Config, options: argparse.Namespace) -> BatchSpeed:
    """Run the rounds, with new prompts each so that no prefix is cached, after a short one that does not count."""
    plan, length = bench.plan, options.input_len + options.output_len
    needed = batch * num_blocks_for(length, plan.block_size)
    if needed > bench.num_blocks:
        raise ValueError(
            f"--batch: {batch} sequences of {length} tokens take {needed} KV blocks, but the cache has "
            f"{bench.num_blocks}; ask for less, or raise cache.num_blocks or cache.memory_share"
        )
    rng = random.Random(f"{options.seed} {batch}")  # noqa: S311 - load, no secrets
    bench.round(batch, options.input_len, _WARM_UP_TOKENS, rng)
    rounds = [bench.round(batch, options.input_len, options.output_len, rng) for _ in range(options.rounds)]
    speed = speed_of(batch, options.input_len, rounds, _best(bench, batch, config, options))
    say(f"{name}: batch {batch}: {speed.decode_tokens_per_s:.0f} tokens/s")
    return speed


def _best(bench: _Bench, batch: int, config: Config, options: argparse.Namespace) -> tuple[float | None, float | None]:
    """The estimates of prefill and decode, in tokens/s."""
    if options.gpu is None:
        return None, None
    estimate = Estimate(bench.plan, ACCELERATORS[options.gpu], config.cache.memory_share, bench.num_blocks)
    decode = estimate.decode(batch, options.input_len + options.output_len // 2)
    return estimate.prefill_tokens_per_s(), decode.tokens_per_s or None
