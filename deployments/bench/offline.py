"""The offline benchmark: starts a gang of each layout on Ray, without Serve and HTTP, and times batches through it.

Each layout has a placement group of its own, and gives it back before the next one starts.
"""

import argparse
import contextlib
import dataclasses
import os
import queue
import random
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.decisions.model.accelerators import ACCELERATORS
from actors.decisions.model.estimate import Estimate
from actors.decisions.model.plan import Plan, make_plan
from actors.decisions.model.spec import ModelSpec
from actors.decisions.schedule.blocks import num_blocks_for
from actors.remote.engine import Engine
from actors.remote.gang import Gang
from actors.tensors.backends.choose import default_block_size, placed_on
from actors.words.errors import GangFailure
from actors.words.messages import Event, Request, SamplingParams
from cluster.placement.nodes import read_nodes, wait_for
from cluster.placement.placement import (
    Device,
    make_bundles,
    make_label_selectors,
    make_needs,
    resolve_device,
    resolve_strategy,
)
from configs.config import Config
from deployments.bench.scaling import BatchSpeed, LayoutFigures, OfflineReport, Round, as_text, speed_of
from deployments.plan.command import config_of

__all__ = ["as_text", "measure"]

_SILENCE_S = 600.0  # without any event; then the gang counts as broken
_WARM_UP_TOKENS = 4


def measure(options: argparse.Namespace) -> OfflineReport:
    """Measure all layouts in turn. Raises ValueError: for options that cannot work, or when a gang fails."""
    configs, spec = _asked(options)
    config = configs[0]
    _check_lengths(options, make_plan(config, spec))
    with _connected_to_ray():
        device = resolve_device(placed_on(config.device), read_nodes())
        block_size = default_block_size(config.device, device)
        plans = [(one, make_plan(one, spec, block_size)) for one in configs]
        if options.gpu and device != "cuda":
            raise ValueError(f"--gpu: the gang runs on {device}, whose limits are not known; leave it out")
        for one, plan in plans:  # InfeasiblePlacement is a ValueError
            needs = make_needs(plan.topology, one.placement, device)
            wait_for(needs, resolve_strategy(one.placement, plan.topology), one.placement.wait_s)
        layouts = tuple(_measure_layout(one, plan, device, options) for one, plan in plans)
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
    spec = read_spec(resolve_source(model.source, model.revision), model.dtype)
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


@contextlib.contextmanager
def _connected_to_ray() -> Iterator[None]:
    """Use the cluster that RAY_ADDRESS names, or one that is started here and ended."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(namespace="bench", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"Ray: {error}; if RAY_ADDRESS names a cluster, it must run") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _reserved(config: Config, plan: Plan, device: Device) -> Iterator[PlacementGroup]:
    """A placement group with one bundle a stage; Ray waits until the last layout's resources are free again."""
    needs = make_needs(plan.topology, config.placement, device)
    strategy = resolve_strategy(config.placement, plan.topology)
    group = placement_group(make_bundles(needs), strategy, bundle_label_selector=make_label_selectors(needs))
    try:
        if not group.wait(config.timeouts.start_s):
            raise ValueError("Ray has not reserved the bundles in time; raise timeouts.start_s")
        yield group
    finally:
        remove_placement_group(group)


def _measure_layout(config: Config, plan: Plan, device: Device, options: argparse.Namespace) -> LayoutFigures:
    topology = plan.topology
    name = f"{topology.tensor_parallel_size} x {topology.pipeline_parallel_size}"
    _say(f"{name}: starting {topology.num_ranks} ranks")
    with _reserved(config, plan, device) as group:
        began = time.perf_counter()
        gang = Gang(config, topology, group, device)
        try:
            gang.start(plan)
            start_s = time.perf_counter() - began
            with _running(gang, plan) as bench:
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


class _Bench:
    """Sends batches of requests to an engine, and notes when their tokens come."""

    def __init__(self, gang: Gang, plan: Plan) -> None:
        self.plan, self.num_blocks = plan, gang.num_blocks
        self._events: queue.SimpleQueue[tuple[float, list[Event]]] = queue.SimpleQueue()
        self.engine = Engine(gang.executor, plan.scheduler, gang.num_blocks, self._deliver)

    def _deliver(self, events: list[Event]) -> None:
        self._events.put((time.perf_counter(), events))

    def round(self, batch: int, input_len: int, output_len: int, rng: random.Random) -> Round:
        """Run one batch, submitted together. Raises ValueError when a request fails."""
        prompts = {uuid.UUID(int=rng.getrandbits(128)).hex: self._prompt(rng, input_len) for _ in range(batch)}
        tokens_s: dict[str, list[float]] = {name: [] for name in prompts}
        sampling = SamplingParams(temperature=0.0)
        began = time.perf_counter()
        for name, ids in prompts.items():
            self.engine.add(Request(name, ids, output_len, sampling))
        num_running = batch
        while num_running:
            try:
                now, events = self._events.get(timeout=_SILENCE_S)
            except queue.Empty:
                raise ValueError(f"the gang has said nothing for {_SILENCE_S:g} s; look at the ranks' logs") from None
            for event in events:
                if event.error:
                    raise ValueError(event.error)
                tokens_s[event.request_id] += [now - began] * len(event.token_ids)
                num_running -= event.finish_reason is not None
        return Round(tuple(map(tuple, tokens_s.values())))

    def _prompt(self, rng: random.Random, input_len: int) -> list[int]:
        return rng.choices(range(self.plan.spec.vocab_size), k=input_len)


@contextlib.contextmanager
def _running(gang: Gang, plan: Plan) -> Iterator[_Bench]:
    bench = _Bench(gang, plan)
    bench.engine.start()
    try:
        yield bench
    finally:
        bench.engine.close()


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
    _say(f"{name}: batch {batch}: {speed.decode_tokens_per_s:.0f} tokens/s")
    return speed


def _best(bench: _Bench, batch: int, config: Config, options: argparse.Namespace) -> tuple[float | None, float | None]:
    """The roofline's limits of prefill and decode, in tokens/s."""
    if options.gpu is None:
        return None, None
    estimate = Estimate(bench.plan, ACCELERATORS[options.gpu], config.cache.memory_share, bench.num_blocks)
    decode = estimate.decode(batch, options.input_len + options.output_len // 2)
    return estimate.prefill_tokens_per_s(), decode.tokens_per_s or None


def _say(words: str) -> None:
    sys.stderr.write(words + "\n")
