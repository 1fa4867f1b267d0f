"""Inputs of batch jobs: forms of rows, odd files, ids that stand twice; each row has an answer, or a named error."""

import datetime
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from deployments.batch import jsonl
from deployments.batch.jsonl import JsonLines
from deployments.batch.parquet import ParquetRows
from deployments.batch.places import InputFile, normalized
from deployments.batch.source import Source
from tests.fakes.batch_jobs import Desk, chat
from tests.fakes.fake_answerer import FakeAnswerer
from tests.fakes.fake_stores import Bucket, now_and_then
from tests.serving import ROOT


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def run_raw(desk, raw):
    desk.input.write_bytes(raw)
    desk.run()
    return desk.lines()


def the_error(desk, row, **config):
    """The error row of an input that is this row alone."""
    raw = row if isinstance(row, bytes) else json.dumps(row).encode()
    answers, [error] = run_raw(desk, raw)
    assert not answers
    return error


# How lines are read


ROWS = [chat(1), {"prompt": "two"}, chat(3)]
PLAIN = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@pytest.mark.parametrize(
    "raw",
    [
        PLAIN,
        PLAIN[:-1],
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        b"\n\n" + PLAIN.replace(b"\n", b"\n \t\n\n"),
    ],
    ids=["plain", "no last newline", "byte-order mark", "CRLF", "empty lines"],
)
def test_how_lines_end_and_empty_ones_change_nothing(desk, raw):
    desk.input.write_bytes(PLAIN)
    desk.run("plain.jsonl", day=datetime.date(2026, 1, 1))
    desk.input.write_bytes(raw)
    desk.run("odd.jsonl", day=datetime.date(2026, 1, 1))
    assert desk.results("odd.jsonl") == desk.results("plain.jsonl")
    assert [one["custom_id"] for one in desk.lines("odd.jsonl")[0]] == ["c1", "row-2", "c3"]


def test_a_row_of_a_megabyte_is_answered_and_a_larger_one_is_an_error_row(desk):
    long, longer = chat(1, user="x" * 1_000_000), chat(2, user="x" * 1_100_000)
    raw = b"\n".join(json.dumps(row).encode() for row in (long, longer, chat(3), longer))
    answers, errors = run_raw(desk, raw)
    assert [one["custom_id"] for one in answers] == ["c1", "c3"]
    assert [one["custom_id"] for one in errors] == ["row-2", "row-4"]
    words = "the row is larger than 1048576 bytes; send less, or raise admission.max_body_bytes"
    for error in errors:
        assert error["response"]["status_code"] == 413 and error["response"]["body"]["error"]["message"] == words


def test_a_row_may_be_as_large_as_a_body_of_the_checkpoints_context(desk):
    (Path(desk.config.model.source) / "config.json").write_text('{"text_config": {"max_position_embeddings": 100000}}')
    answers, errors = run_raw(desk, json.dumps(chat(1, user="x" * 2_000_000)).encode())
    assert [one["custom_id"] for one in answers] == ["c1"] and not errors


def test_lines_that_are_no_rows_are_error_rows_with_their_text(desk):
    answers, errors = run_raw(desk, b'{"prompt": "a"}\n{"prompt": \n\xff\xfe{}\n[1]\n"x"\nnull\n{"prompt": "b"}\n')
    assert [one["custom_id"] for one in answers] == ["row-1", "row-7"]
    assert [one["row"] for one in errors] == ['{"prompt": ', "\ufffd\ufffd{}", "[1]", '"x"', "null"]
    messages = [one["response"]["body"]["error"]["message"] for one in errors]
    assert all("not valid JSON" in message for message in messages[:2])
    assert all("must be a JSON object" in message for message in messages[2:])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (gzip.compress(PLAIN), r"is compressed \(gzip\); unpack it first"),
        (PLAIN.decode().encode("utf-16"), "is UTF-16; write it as UTF-8"),
        (b"PAR1 nothing more", "cannot be read as Parquet"),
        (b"\n \n", "has no rows; write one a line"),
        (b"", "has no rows; write one a line"),
    ],
)
def test_files_of_another_kind_are_refused(desk, raw, words):
    desk.input.write_bytes(raw)
    with pytest.raises(ValueError, match=words):
        desk.run()
    assert not (desk.folder / "out.jsonl.parts").exists()


def test_an_input_that_is_not_there_is_refused(desk):
    with pytest.raises(ValueError, match=r"--input: .* is no file; name a JSONL or Parquet file"):
        desk.run()
    with pytest.raises(ValueError, match="is no file"):
        desk.run(input=desk.folder)


# Ids


@pytest.mark.parametrize("second", [chat(1, seed=3), {"custom_id": "c1", "prompt": "x"}])
def test_ids_that_stand_twice_are_refused_with_both_lines(desk, second):
    desk.write([chat(0), chat(1), chat(2)])
    with desk.input.open("a") as file:
        file.write("\n" + json.dumps(second))
    with pytest.raises(ValueError, match=r"custom_id 'c1' stands in line 2 and in line 5; .*give each row its own"):
        desk.run()
    assert not (desk.folder / "out.jsonl.parts").exists()


def test_an_id_made_of_the_number_meets_one_that_was_chosen(desk):
    desk.write([{"custom_id": "row-2", "prompt": "x"}, {"prompt": "y"}])
    with pytest.raises(ValueError, match="custom_id 'row-2' stands in line 1 and in line 2"):
        desk.run()


def test_ids_whose_hashes_meet_are_told_apart(desk, monkeypatch):
    from deployments.batch import ids

    monkeypatch.setattr(ids, "_hash", len)
    desk.write([chat(number) for number in range(10)])
    assert desk.run().completed == 10


# What is asked


@pytest.mark.parametrize(
    ("row", "param", "words"),
    [
        ({**chat(1), "method": "GET"}, "method", "must be 'POST'"),
        ({**chat(1), "url": "/v1/embeddings"}, "url", "must be '/v1/chat/completions' or '/v1/completions'"),
        ({**chat(1), "custom_id": ""}, "custom_id", "must not be empty"),
        ({**chat(1), "custom_id": 5}, "custom_id", "must be a valid string"),
        ({**chat(1), "custom_id": "x" * 513}, "custom_id", "at most 512"),
        ({"custom_id": "c1", "method": "POST", "url": "/v1/completions"}, "body", "is required"),
        ({**chat(1), "priority": 2}, "priority", "is not a field of this request; leave it out"),
        ({**chat(1), "body": 5}, None, "must be a JSON object"),
        (chat(1, model=None), "model", "is required"),
        (chat(1, stream=True), "stream", "a batch streams nothing; leave it out"),
        (chat(1, timeout=5), "timeout", "rows of a batch have no deadline; leave it out"),
        (chat(1, request_id="x"), "request_id", "custom_id names a row; leave it out"),
        (chat(1, max_new_tokens=3), "max_new_tokens", "is no field of this server; send max_tokens"),
        (chat(1, temperature=3), "temperature", "must be less than or equal to 2"),
        (chat(1, bananas=3), "bananas", "is not a field of this request; leave it out"),
        (chat(1, messages=[]), "messages", "at least 1"),
        ({"prompt": "x", "messages": []}, "prompt", "has both prompt and messages; write one of them"),
        ({"text": "x"}, "prompt", "has no body, no prompt and no messages"),
        ({"prompt": []}, "prompt", "not empty"),
        ({"prompt": "x", "custom_id": 7}, "custom_id", "must be a valid string"),
        ({"prompt": "x", "max_tokens": "4"}, "max_tokens", "must be a valid integer"),
        (b'{"prompt": "x", "temperature": NaN}', None, "not valid JSON"),
        (b'{"prompt": "\\ud800"}', None, "not valid JSON"),
        (b'{"prompt": ' + b"[" * 20_000, None, "more than 10000 lists and objects"),
    ],
)
def test_what_cannot_be_answered_is_an_error_row_with_field_and_remedy(desk, row, param, words):
    error = the_error(desk, row)
    said = error["response"]["body"]["error"]
    assert error["response"]["status_code"] == 400 and said["param"] == param and words in said["message"]


def test_an_error_row_of_what_is_no_utf8_can_be_read(desk):
    error = the_error(desk, b'{"custom_id": "x", "prompt": "caf\xe9", "temperature": 1}')
    assert error["response"]["status_code"] == 400
    assert error["row"] == '{"custom_id": "x", "prompt": "caf\ufffd", "temperature": 1}'


def test_an_error_row_repeats_the_row_as_it_was(desk):
    row = chat(1, temperature=3, logit_bias={"5": 1.50})
    error = the_error(desk, row)
    assert {name: error[name] for name in row} == row
    assert list(error)[:4] == ["id", "custom_id", "response", "error"]


def test_several_answers_to_a_row_and_neutral_values_are_fine(desk):
    desk.write([chat(1, n=3, stream=False, timeout=None, logprobs=None, metadata={"a": "b"}), {"prompt": ["a", "b"]}])
    desk.run()
    answers, errors = desk.lines()
    assert not errors and len(answers[0]["response"]["body"]["choices"]) == 3


def test_the_example_is_answered_but_for_its_broken_row(desk):
    assert desk.run(input=ROOT / "examples/batch.jsonl").completed == 4
    [error] = desk.lines()[1]
    assert error["custom_id"] == "broken" and error["response"]["body"]["error"]["param"] == "temperature"


# Parquet


def test_parquet_gives_what_the_same_rows_as_lines_give(desk):
    rows = [
        {"custom_id": f"c{at}", "prompt": f"text {at}", "max_tokens": at + 1, "temperature": 9.0 if at == 7 else None}
        for at in range(50)
    ]
    desk.write([{name: value for name, value in row.items() if value is not None} for row in rows])
    day = datetime.date(2026, 1, 1)
    desk.run("lines.jsonl", day=day)
    path = desk.folder / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=13)
    summary = desk.run("table.jsonl", FakeAnswerer(window=9), input=path, day=day)
    assert (summary.completed, summary.failed) == (49, 1)

    def answers(name):
        return [
            (one["custom_id"], one["response"]["body"].get("choices", [{}])[0].get("finish_reason"))
            for one in desk.lines(name)[0]
        ]

    assert answers("table.jsonl") == answers("lines.jsonl")
    assert desk.lines("table.jsonl")[1][0]["temperature"] == 9.0


@pytest.mark.parametrize("is_text", [False, True])
def test_parquet_in_openai_form(desk, is_text):
    rows = [chat(at) for at in range(5)]
    table = [{**row, "body": json.dumps(row["body"]) if is_text else row["body"]} for row in rows]
    path = desk.folder / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    assert desk.run(input=path).completed == 5
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        desk.run("other.jsonl", input=path)


def test_a_row_of_parquet_is_not_larger_than_a_line_may_be(desk):
    path = desk.folder / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat(0), chat(1, user="x" * 1_100_000)]), path)
    summary = desk.run(input=path)
    assert (summary.completed, summary.failed) == (1, 1)
    [error] = desk.lines()[1]
    assert error["custom_id"] == "c1" and error["response"]["status_code"] == 413


def test_ids_that_stand_twice_in_parquet(desk):
    path = desk.folder / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat(1), chat(2), chat(1)]), path)
    with pytest.raises(ValueError, match="custom_id 'c1' stands in row 1 and in row 3"):
        desk.run(input=path)


@pytest.mark.parametrize("reader", [ParquetRows, JsonLines])
def test_the_input_is_read_on_from_part_to_part(desk, monkeypatch, reader):
    path = desk.input
    desk.write(rows := [chat(at) for at in range(100)])
    if reader is ParquetRows:
        path = desk.folder / "in.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    begun, rows_of = [], reader.rows
    monkeypatch.setattr(reader, "rows", lambda self, mark: (begun.append(mark.number), rows_of(self, mark))[1])
    assert desk.run(input=path, part_rows=10).completed == 100
    assert begun == [0, 0]  # the survey, and all parts
    source = Source(str(path), 10, 1 << 20)
    assert len(list(source.survey())) == 100
    begun.clear()
    next(source.part(3))
    assert [line.number for part in (4, 5, 8) for line in source.part(part)] == [*range(40, 60), *range(80, 90)]
    assert begun == [30, 40, 80]


# Places


def test_an_object_is_read_in_ranges_that_are_tried_again():
    bucket = Bucket(now_and_then(3, 0.3))
    bucket.objects["b/in"] = bytes(range(256)) * 100
    file = InputFile("bucket://b/in", bucket, pause=lambda seconds: None)
    assert file.read() == bucket.objects["b/in"]
    file.seek(100)
    assert file.read(5) == bytes(range(100, 105))
    with pytest.raises(ValueError, match="--input: reading bucket://b/none"):
        InputFile("bucket://b/none", bucket, pause=lambda seconds: None)


def test_a_relative_output_of_a_ray_job_is_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert normalized("out.jsonl", "--output") == str(tmp_path / "out.jsonl")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert normalized("in.jsonl", "--input") == str(tmp_path / "in.jsonl")
    assert normalized("s3://b/out", "--output") == "s3://b/out"
    with pytest.raises(ValueError, match=r"--output: out.jsonl is relative, but this is a Ray job"):
        normalized("out.jsonl", "--output")


@pytest.mark.parametrize(
    ("place", "words"),
    [("s3://bucket/in.jsonl", "pip install s3fs"), ("nothing://x", "use a path, or a URL that fsspec knows")],
)
def test_a_url_says_what_it_needs(desk, place, words):
    with pytest.raises(ValueError, match=words):
        desk.run(input=place)


def test_a_million_characters_without_a_newline_are_not_held(desk, monkeypatch):
    monkeypatch.setattr(jsonl, "_CHUNK", 64)
    raw = b'{"prompt": "' + b"x" * 3_000_000 + b'"}\n{"prompt": "a"}'
    answers, errors = run_raw(desk, raw)
    assert [one["custom_id"] for one in answers] == ["row-2"] and "row" not in errors[0]


# Memory


def peak(num_rows: int) -> int:
    """Bytes of memory that a driver takes at most, over a job of so many rows."""
    program = f"""
import tempfile, json
from pathlib import Path
from tests.fakes.batch_jobs import Desk, chat
from tests.fakes.fake_answerer import FakeAnswerer
desk = Desk(Path(tempfile.mkdtemp()))
with desk.input.open("w") as file:
    for number in range({num_rows}):
        file.write(json.dumps(chat(number, temperature=7 if number % 50 == 0 else 1)) + "\\n")
summary = desk.run(answerer=FakeAnswerer(window=500), part_rows=None)
assert summary.rows == {num_rows}
[peak] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
print(int(peak.split()[1]) * 1024)  # ru_maxrss would be that of the process which started this one
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_does_not_grow_with_the_rows():
    assert peak(6_000) - peak(1_000) < 5e6


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_many_rows():
    assert peak(100_000) - peak(1_000) < 20e6
