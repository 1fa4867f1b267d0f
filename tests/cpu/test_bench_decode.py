"""The benchmark of one GPU runs on CPU with a tiny shape, so that it works on the day there is a GPU."""

import json
import runpy
from pathlib import Path

import pytest

bench = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "bench_decode.py"))
TINY = ["--device", "cpu", "--shape", "tiny", "--dtype", "float32", "--block-size", "16", "--context", "40", "--json"]


def test_ours_beside_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    result = bench["main"]([*TINY, "--steps", "3", "--batch", "1", "3"])
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1]) == result
    assert "cont. batching ms" in said
    for row, peer, batch in zip(result["ours"], result["transformers"], (1, 3), strict=True):
        assert row["batch"] == peer["batch"] == batch
        assert 0 < row["share_of_limit"] == pytest.approx(row["limit_ms"] / row["ms"])
        assert row["times_generate"] == pytest.approx(peer["generate_ms"] / row["ms"])
        assert row["tokens_per_s"] == pytest.approx(1000 * batch / row["ms"])


def test_one_shard_alone_tells_what_the_gang_would_do() -> None:
    shard = ["--steps", "3", "--batch", "2", "--shard", "3", "--of", "4", "--all-reduce-us"]
    results = [bench["main"]([*TINY, *shard, latency]) for latency in ("0", "1000")]
    rows = [result["ours"][0] for result in results]
    assert [row["num_all_reduces"] for row in rows] == [5, 5]  # two a layer, and the embedding
    assert rows[0]["gang_ms"] == rows[0]["ms"]
    assert rows[1]["gang_ms"] == pytest.approx(rows[1]["ms"] + 5)
    moved = rows[0]["limit_ms"] * results[0]["bandwidth_gb_per_s"] * 1e6
    # A quarter of the matrices, and the norms; keys and values of two contexts of 40 + 5 + 3 / 2 tokens, 256 bytes each
    assert moved == pytest.approx(103_680 + 2 * 46.5 * 256)


def test_what_a_step_reads_is_counted_by_shard() -> None:
    def bytes_read(of: int) -> int:
        args = bench["parse"]([*TINY, "--of", str(of), "--batch", "2"])
        with bench["tempfile"].TemporaryDirectory() as folder:
            config = bench["LlamaConfig"](**bench["SHAPES"]["tiny"], architectures=["LlamaForCausalLM"])
            config.save_pretrained(folder)
            plan = bench["plan_of"](args, Path(folder))
        runner = bench["RandomRunner"](
            plan, 0, bench["Alone"](0, of), bench["CUDABackend"](bench["torch"].device("cpu"))
        )
        return int(runner.bytes_read)

    hidden, ffn, vocab, layers = 64, 96, 512, 2
    matrices, norms = layers * (4 * hidden * hidden + 3 * hidden * ffn) + hidden * vocab, (2 * layers + 1) * hidden
    assert bytes_read(1) == 4 * (matrices + norms)
    assert bytes_read(4) == 4 * (matrices // 4 + norms)
