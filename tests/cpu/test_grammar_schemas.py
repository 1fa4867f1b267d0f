"""Many schemas at once over two shards and two stages: answers that end are valid, those that are cut are prefixes."""

import json
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher
from transformers import AutoModelForCausalLM, LlamaConfig

from actors.decisions.grammar import make_vocabulary
from actors.decisions.model.plan import make_plan
from actors.tensors.model.spec_reader import read_spec
from actors.words.messages import Request, SamplingParams
from configs.config import Config
from tests.fakes.large_tokenizer import END_ID, save_large_tokenizer
from tests.fakes.random_schemas import random_schema

ranks = runpy.run_path(str(Path(__file__).with_name("test_engine_on_ranks.py")))
NUM_SCHEMAS, AT_ONCE, MAX_TOKENS = 500, 50, 400
NUM_CUT, FEW_TOKENS = 50, 8  # the first schemas once more, for answers that are cut by length
VOCAB_SIZE = 128_256
CLOSING = ['"', "}", "]", ",", '"}', '",', "]}", "}}", ":"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large_vocabulary")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"intermediate_size": 96, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": END_ID}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **rest, vocab_size=VOCAB_SIZE), dtype=torch.float32)
    model.save_pretrained(folder)
    save_large_tokenizer(folder)
    return folder


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_answers_fulfil_their_schemas(pool: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "tokenizer.json").read_text()
    vocabulary = make_vocabulary(text, VOCAB_SIZE, [END_ID])
    closing = {vocabulary.tokenize_str(mark)[0]: 9.0 for mark in CLOSING} | {END_ID: 9.0}
    config = Config(
        model={"source": str(folder), "max_model_len": 448},
        parallel={"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        cache={"block_size": ranks["BLOCK_SIZE"]},
        scheduler={"depth": 2, "max_num_seqs": AT_ONCE},
    )
    schemas = [random_schema(seed) for seed in range(NUM_SCHEMAS)]
    requests = [_request(number, schema, closing, MAX_TOKENS) for number, schema in enumerate(schemas)]
    requests += [_request(number, schemas[number], closing, FEW_TOKENS) for number in range(NUM_CUT)]
    ends, problems = {(MAX_TOKENS, "stop"): 0, (FEW_TOKENS, "length"): 0}, []
    gang = ranks["LocalGang"](pool, make_plan(config, read_spec(folder)), folder)
    try:
        for first in range(0, len(requests), AT_ONCE):
            asked = requests[first : first + AT_ONCE]
            ids, _ = gang.generate(asked, max_num_seqs=AT_ONCE, depth=2)
            for request, new_ids in zip(asked, ids, strict=True):
                number = int(request.request_id.partition(" ")[0])
                end, problem = _judge(request, new_ids, schemas[number], vocabulary)
                ends[request.max_tokens, end] = ends.get((request.max_tokens, end), 0) + 1
                problems += [f"schema {request.request_id}: {problem}"] if problem else []
    finally:
        gang.close()
    with capsys.disabled():
        print(f"\n{len(requests)} answers by max_tokens and end: {ends}, {len(problems)} problems")
    assert not problems, "\n".join(problems)
    assert ends[MAX_TOKENS, "stop"] >= 0.9 * NUM_SCHEMAS
    assert ends[FEW_TOKENS, "length"] >= 0.5 * NUM_CUT


def _request(number: int, schema: dict[str, Any], closing: dict[int, float], max_tokens: int) -> Request:
    grammar = LLMatcher.grammar_from_json_schema(schema, {"whitespace_flexible": False})
    sampling = SamplingParams(1.0, seed=number, logit_bias=closing, grammar=grammar)
    return Request(f"{number} {max_tokens}", [1 + number, 2, 3], max_tokens, sampling, frozenset([END_ID]))


def _judge(request: Request, ids: list[int], schema: dict[str, Any], vocabulary: Any) -> tuple[str, str]:
    """How an answer ended, and what is wrong with it."""
    grammar = request.sampling.grammar
    assert grammar is not None
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    is_whole = ids[-1] == END_ID
    written = ids[:-1] if is_whole else ids
    if not matcher.consume_tokens(written):
        return "length", f"the matcher refuses {vocabulary.decode_str(written)!r}"
    if not is_whole:
        return "length", "" if len(ids) == request.max_tokens else f"cut after {len(ids)} ids"
    try:
        jsonschema.validate(json.loads(vocabulary.decode_str(written)), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return "stop", f"{vocabulary.decode_str(written)!r}: {str(error)[:200]}"
    return "stop", ""
