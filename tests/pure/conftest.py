"""What the HTTP tests share: a small tokenizer, and a replica whose model can be computed by hand."""

import asyncio
import contextlib
import json
import threading
import time

import httpx
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from actors.decisions.schedule.settings import SchedulerSettings
from actors.remote.engine import Engine
from cluster.topology import Topology
from configs.config import AdmissionConfig
from configs.monitoring import MonitoringConfig
from deployments.api.outbox import Outbox
from deployments.api.routes import build_app
from deployments.api.sampling_defaults import SamplingDefaults
from deployments.api.service import Identity, Limits, Service
from deployments.text.tokenizer import Text
from tests.fakes.fake_executor import FakeExecutor, next_id

MODEL = "tiny"
VOCAB_SIZE = 400
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.content == 'fail' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """A byte-level BPE tokenizer as a checkpoint folder has it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["the quick brown fox jumps over the lazy dog, one two three " * 4, "stage shard rank lane 你好 héllo 👋"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>", "<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.enable_truncation(8)  # some checkpoints carry one; prompts must not be cut
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(str(folder))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return folder


@pytest.fixture(scope="session")
def text(tokenizer_folder):
    text = Text.load(tokenizer_folder)
    yield text
    text.close()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return PreTrainedTokenizerFast.from_pretrained(str(tokenizer_folder))


class ScriptedExecutor(FakeExecutor):
    """Says the ids of a script, whatever the prompt; after its end, what FakeExecutor says."""

    def __init__(self, script=(), **options):
        super().__init__(**options)
        self.script = list(script)

    def _draw(self, row, ids):
        at = len(row.last_ids)
        return self.script[at] if at < len(self.script) else super()._draw(row, ids)


class World:
    """One replica without Ray: engine, service and app over an executor."""

    def __init__(
        self,
        text,
        executor=None,
        ranks=list,
        defaults=SamplingDefaults(),
        ring=None,
        cors_origins=(),
        monitoring=MonitoringConfig(),
        num_spares=list,
        num_blocks=256,
        **limits,
    ):
        self.text = text
        self.executor = executor or FakeExecutor(vocab_size=VOCAB_SIZE)
        self.outbox = Outbox()
        settings = SchedulerSettings(block_size=16, max_num_seqs=8, max_num_batched_tokens=64, num_lanes=2)
        self.engine = Engine(self.executor, settings, num_blocks, self.outbox.deliver)
        admission = {"max_requests": 16, "max_body_bytes": 65536}
        admission |= {name: limits.pop(name) for name in list(limits) if name in AdmissionConfig.model_fields}
        admission = AdmissionConfig(**admission)
        values = {"max_model_len": 128, "vocab_size": VOCAB_SIZE, "admission": admission, "request_s": 600.0} | limits
        identity = Identity(MODEL, "replica-1", "0.1.0", 1, Topology(2, 2))
        self.service = Service(
            self.engine, self.outbox, text, identity, Limits(**values), ranks, defaults, monitoring, num_spares
        )
        self.app = build_app(self.service, ring, cors_origins)
        self.engine.start()

    def close(self):
        self.engine.close()

    def expected_ids(self, prompt_ids, count, seed=0):
        """What FakeExecutor says after these ids."""
        ids = list(prompt_ids)
        for _ in range(count):
            ids.append(next_id(ids, self.executor.vocab_size, seed))
        return ids[len(prompt_ids) :]

    def ids(self, words):
        """Token ids of a text."""
        return asyncio.run(self.text.encode([words]))[0]

    def http(self):
        """An httpx client that calls the app without a socket."""
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    def post(self, path, body=None, raw=None, headers=None):
        """One request on an event loop of its own; dicts are sent as JSON."""

        async def go():
            async with self.http() as client:
                content = json.dumps(body).encode() if raw is None else raw
                return await client.post(
                    path, content=content, headers={"content-type": "application/json"} if headers is None else headers
                )

        return asyncio.run(go())

    def get(self, path, method="GET", headers=None):
        async def go():
            async with self.http() as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(go())

    def wait_until_idle(self):
        """No request holds anything any more, at either side."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            snapshot = self.engine.snapshot()
            if not (
                snapshot.running or snapshot.waiting or snapshot.blocks_used or self.service.admission.num_admitted
            ):
                return
            time.sleep(0.005)
        raise AssertionError(f"{self.engine.snapshot()}, {self.service.admission.num_admitted} admitted")

    @contextlib.contextmanager
    def serve(self, loop="auto"):
        """The app behind uvicorn on a loopback port; gives its base URL. `loop`: which event loop uvicorn takes."""
        options = {"host": "127.0.0.1", "port": 0, "log_level": "warning", "lifespan": "off", "loop": loop}
        server = uvicorn.Server(uvicorn.Config(self.app, **options))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)


@pytest.fixture(scope="session")
def world_type():
    """For worlds that outlive a test; whoever makes one closes it."""
    return World


@pytest.fixture
def make_world(text):
    worlds = []

    def make(script=None, **options):
        executor = options.pop("executor", None)
        if script is not None:
            executor = ScriptedExecutor(script, vocab_size=VOCAB_SIZE)
        worlds.append(World(text, executor, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world):
    return make_world()


@pytest.fixture
def scripted_executor():
    return ScriptedExecutor


@pytest.fixture
def error_of():
    """Checks that a response is an OpenAI error object as promised, and returns it."""

    def check(response, status):
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        assert len(response.content) <= 4096
        body = response.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["message"]
        kind = "rate_limit_error" if status == 429 else "invalid_request_error"
        assert body["error"]["type"] == (kind if status < 500 else "server_error")
        for secret in ("Traceback", "0x", "/etc", "site-packages"):
            assert secret not in response.text
        return body["error"]

    return check
