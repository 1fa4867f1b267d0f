"""The shapes of decode steps: every step has one, and none is padded to twice its size."""

from actors.decisions.schedule.buckets import Bucket, Buckets


def test_buckets_hold_every_step_and_pad_to_less_than_twice() -> None:
    buckets = Buckets.of(24, 100, 16)
    assert buckets.rows == (1, 2, 4, 8, 16, 24)
    assert buckets.blocks == (16, 32, 64, 100)
    for num_rows in range(1, 25):
        for num_blocks in range(1, 101):
            bucket = buckets.of_step(num_rows, num_blocks)
            assert bucket is not None
            assert num_rows <= bucket.num_rows < 2 * num_rows or bucket.num_rows == 1
            assert num_blocks <= bucket.num_blocks < max(17, 2 * num_blocks)
    assert buckets.of_step(25, 1) is None
    assert buckets.of_step(1, 101) is None
    assert buckets.of_step(0, 1) is None
    assert Buckets.of(1, 7).all() == [Bucket(1, 7)]
    assert buckets.all()[0] == Bucket(24, 100)
    assert len(set(buckets.all())) == 24
