"""The shapes of small steps: every step has one, and padding is small."""

import random

from actors.decisions.schedule.buckets import Buckets, most_captured_tokens
from actors.decisions.schedule.settings import SchedulerSettings
from actors.words.messages import Bucket, Entry

SETTINGS = SchedulerSettings(block_size=16, max_num_seqs=30, max_num_batched_tokens=2048, num_lanes=1)


def entries(*counts: int, start: int = 0, **fields: bool) -> list[Entry]:
    return [Entry(seq, start, [1] * count, [], True, **fields) for seq, count in enumerate(counts)]


def test_decode_steps_have_rows_in_steps_of_eight() -> None:
    buckets = Buckets.of(SETTINGS, 100, 512)
    decode = [shape for shape in buckets.shapes if shape.is_decode]
    assert [shape.num_tokens for shape in decode] == [1, 2, 4, 8, 16, 24, 30]
    assert all(shape.num_seqs == shape.num_tokens and shape.num_blocks == 100 for shape in decode)
    for num_rows in range(1, 31):
        shape = buckets.of_step([Entry(seq, 5, [], [], True) for seq in range(num_rows)])
        assert shape is not None and shape.is_decode
        assert num_rows <= shape.num_tokens < max(num_rows + 8, 2)
    assert buckets.of_step([Entry(seq, 5, [], [], True) for seq in range(31)]) is None


def test_mixed_steps_have_few_sizes_and_room_for_every_sequence() -> None:
    buckets = Buckets.of(SETTINGS, 100, 512)
    mixed = [shape for shape in buckets.shapes if not shape.is_decode]
    assert [(shape.num_tokens, shape.num_seqs) for shape in mixed] == [
        (16, 16), (32, 30), (64, 30), (128, 30), (256, 30), (512, 30),
    ]  # fmt: skip
    numbers = random.Random(0)
    for _ in range(300):
        counts = [1] * numbers.randrange(20) + [numbers.randrange(2, 200) for _ in range(numbers.randrange(1, 4))]
        shape = buckets.of_step(entries(*counts))
        if sum(counts) > 512:
            assert shape is None
        else:
            assert shape is not None and not shape.is_decode
            assert sum(counts) <= shape.num_tokens < max(17, 2 * sum(counts)) and len(counts) <= shape.num_seqs


def test_no_shape_is_larger_than_a_step_may_be() -> None:
    few = SchedulerSettings(block_size=4, max_num_seqs=1, max_num_batched_tokens=20, num_lanes=1)
    assert Buckets.of(few, 7, 512).shapes == (
        Bucket(1, 1, 7, True), Bucket(16, 1, 7, False), Bucket(20, 1, 7, False),
    )  # fmt: skip


def test_where_tables_are_gathered_they_are_padded_to_less_than_twice() -> None:
    buckets = Buckets.of(SETTINGS, 100, 64, first_blocks=16)
    assert {shape.num_blocks for shape in buckets.shapes} == {16, 32, 64, 100}
    for num_blocks in range(1, 101):
        shape = buckets.of_step(entries(1, start=num_blocks * 16 - 1))
        assert shape is not None and num_blocks <= shape.num_blocks < max(17, 2 * num_blocks)
    assert buckets.of_step(entries(1, start=1600)) is None


def test_what_gathers_more_than_the_largest_step_has_no_shape() -> None:
    buckets = Buckets.of(SETTINGS, 100, 64, first_blocks=16)
    few = buckets.gathering_at_most(8 * 32 * 16)
    assert set(few.shapes) == {one for one in buckets.shapes if one.num_tokens * one.num_blocks <= 8 * 32}
    assert few.of_step(entries(1, start=1500)) == Bucket(1, 1, 100, True)
    assert few.of_step(entries(*[1] * 8, start=1500)) is None
    assert len(buckets.gathering_at_most(1).shapes) == 1


def test_graphs_are_as_large_as_a_mixed_step_or_as_the_rows() -> None:
    assert most_captured_tokens(SETTINGS) == max(shape.num_tokens for shape in Buckets.of(SETTINGS, 9, 512).shapes)
    many = SchedulerSettings(block_size=16, max_num_seqs=700, max_num_batched_tokens=8192, num_lanes=1)
    assert most_captured_tokens(many) == 700


def test_a_table_holds_the_padding_of_a_mixed_step() -> None:
    shapes = Buckets.of(SETTINGS, 3, 512).shapes
    assert all(shape.num_blocks * 16 >= shape.num_tokens for shape in shapes if not shape.is_decode)


def test_logits_of_prompt_ids_have_no_shape() -> None:
    buckets = Buckets.of(SETTINGS, 100, 512)
    assert buckets.of_step([]) is None
    assert buckets.of_step(entries(5, prompt_logprobs=True)) is None
    assert buckets.of_step(entries(5, 1)) == Bucket(16, 16, 100, False)
