"""vLLM's own server with Penstock inside, and the real ``openai`` client, under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

import httpx
import openai
import torch
from safetensors.torch import save_file

from penstock.bench.local import free_port
from tests.vllm.engine import DEMO

SETTINGS = {
    "scheduler": {"preset": "vllm"},
    "admission": {"max_waiting": 6},
    # Not ttft: the second of two choices may then be refused because the first still waits.
    "slo": {
        "strict": {"e2e": 0.000_1, "on_miss": "expire"},
        "easy": {"ttft": 60, "gap": 60},
        "brief": {"e2e": 0.4, "on_miss": "expire"},
    },
}


class Served:
    """A server that runs."""

    def __init__(self, log: Path, *flags: str, settings: dict[str, Any] | None = None) -> None:
        self.port, self.metrics = free_port(), free_port()
        more: list[str] = []
        if settings is not None:
            config = {"penstock": {**settings, "metrics_port": self.metrics}}
            more = ["--scheduler-cls", "penstock.vllm.Scheduler"]
            more += ["--middleware", "penstock.vllm.Middleware"]
            more += ["--additional-config", json.dumps(config)]
        self._log = log
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(DEMO), "--served-model-name", "demo", "--port", str(self.port),
            "--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32",
            "--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "64",
            "--block-size", "32", "--num-gpu-blocks-override", "25", *more, *flags,
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # for its routes that pause
        environment["VLLM_ENABLE_RESPONSES_API_STORE"] = "1"  # for work in background
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 150
        while time.monotonic() < end:
            assert self._process.poll() is None, self.log[-4000:]
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health"):
                    return
            except URLError:
                time.sleep(0.25)
        self.stop()
        raise AssertionError(self.log[-4000:])

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        url = f"http://127.0.0.1:{self.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client

    def scrape(self, engine: int = 0) -> dict[str, float]:
        with urlopen(f"http://127.0.0.1:{self.metrics + engine}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    one = Served(tmp_path_factory.mktemp("vllm") / "log", settings=SETTINGS)
    yield one
    one.stop()


async def complete(client: Any, prompt: str, tokens: int, **more: Any) -> Any:
    more.setdefault("temperature", 0 if more.get("n", 1) == 1 else 0.8)
    return await client.completions.create(model="demo", prompt=prompt, max_tokens=tokens, **more)


PROMPTS = [f"Once upon a time {i} there was" for i in range(6)]


async def test_texts_are_vllms_own(served: Served, tmp_path: Path) -> None:
    plain = Served(tmp_path / "log")
    try:
        texts = []
        for server in (served, plain):
            async with server.client() as client:
                # One at a time: what shares a step may be rounded otherwise.
                answers = [await complete(client, prompt, 40) for prompt in PROMPTS]
            texts.append([one.choices[0].text for one in answers])
    finally:
        plain.stop()
    assert texts[0] == texts[1]
    assert all(texts[0])


async def test_under_load_everybody_gets_an_answer_or_an_honest_refusal(served: Served) -> None:
    outcomes: Counter[object] = Counter()
    refusals: list[tuple[int, str]] = []

    async def one(client: Any, i: int) -> None:
        kind = client.chat.completions if i % 3 == 0 else client.completions
        told = {"messages": [{"role": "user", "content": f"Tell {i}"}]} if i % 3 == 0 else {}
        if not told:
            told = {"prompt": f"Once {i}"}
        # All at once they could reach the scheduler between two steps, and only six may wait.
        await asyncio.sleep(0.02 * i)
        try:
            answer = await kind.create(
                model="demo", max_tokens=120, temperature=0, stream=i % 2 == 0, **told,
                extra_headers={"x-slo-class": "easy"}, extra_body={"ignore_eos": True},
            )  # fmt: skip
        except openai.RateLimitError as error:
            refusals.append((int(error.response.headers["retry-after"]), error.body["limit"]))
            outcomes["refused"] += 1
            return
        if i % 2:
            reason = answer.choices[0].finish_reason
        else:
            reason = [c.choices[0].finish_reason async for c in answer if c.choices][-1]
        outcomes[reason] += 1

    async with served.client() as client:
        await asyncio.gather(*(one(client, i) for i in range(40)))
    assert all(after >= 1 and limit == "max_waiting" for after, limit in refusals)
    assert set(outcomes) == {"length", "refused"}
    assert outcomes["length"] >= 10
    assert sum(outcomes.values()) == 40
    numbers = served.scrape()
    met = 'penstock:slo_requests_total{model_name="demo",outcome="met",slo_class="easy"}'
    assert numbers[met] == outcomes["length"]
    goodput = 'penstock:goodput_tokens_total{model_name="demo",slo_class="easy"}'
    assert numbers[goodput] == 120 * outcomes["length"]
    assert numbers['penstock:num_preemptions_total{model_name="demo"}'] > 0


@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"echo": True}, {"n": 2}])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_expired_promise_is_504(
    served: Served, *, stream: bool, more: dict[str, Any]
) -> None:
    body = {"slo": {"class": "strict"}}
    async with served.client() as client:
        with pytest.raises(openai.APIStatusError) as caught:
            await complete(client, "Once", 8, stream=stream, extra_body=body, **more)
    assert caught.value.status_code == 504
    assert caught.value.body["code"] == "deadline_exceeded"


async def test_a_chat_with_logprobs_too(served: Served) -> None:
    async with served.client() as client:
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as caught:
                await client.chat.completions.create(
                    model="demo", messages=[{"role": "user", "content": "x"}], stream=stream,
                    logprobs=True, top_logprobs=2, extra_headers={"x-slo-class": "strict"},
                )  # fmt: skip
            assert caught.value.status_code == 504


ROUTES = [
    ("/v1/responses", {"input": "Once", "max_output_tokens": 8}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 8}),
    ("/v1/completions", {"prompt": "Once", "max_tokens": 8, "echo": True, "logprobs": 1}),
    ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "x"}]] * 2}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_promises_and_verdicts_hold_on_every_route_that_generates(
    served: Served, path: str, body: dict[str, Any]
) -> None:
    url = f"http://127.0.0.1:{served.port}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        body = {"model": "demo", **body}
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        assert "error" not in answer.json() or answer.json()["error"] is None
        answer = await client.post(path, json={**body, "slo": {"class": "strict"}})
        assert answer.status_code == 504, answer.text
        assert answer.json()["error"]["code"] == "deadline_exceeded"
        answer = await client.post(path, json=body, headers={"x-slo-class": "nobody"})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "x-slo-class"
    assert "Exception in ASGI application" not in served.log


async def test_a_stream_of_another_route_breaks_off_as_its_client_expects(served: Served) -> None:
    events: list[str] = []

    async def read(client: Any) -> None:
        stream = await client.responses.create(
            model="demo", input="Once", max_output_tokens=480, stream=True,
            extra_headers={"x-slo-class": "brief"}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for event in stream:
            events.append(event.type)  # noqa: PERF401

    async with served.client() as client:
        # A machine that is very busy may miss it before the first token: that is a status.
        with pytest.raises(openai.APIError) as broken:
            await read(client)
        assert broken.value.body["code"] == "deadline_exceeded"
        assert not events or "response.output_text.delta" in events
        assert "response.completed" not in events


async def test_work_in_background_fails_by_a_verdict(served: Served) -> None:
    async with served.client() as client:
        begun = await client.responses.create(
            model="demo", input="x", background=True, extra_body={"slo": {"class": "strict"}}
        )
        assert begun.status == "queued"
        end = time.monotonic() + 20
        while time.monotonic() < end:
            status = (await client.responses.retrieve(begun.id)).status
            if status != "queued":
                break
            await asyncio.sleep(0.05)
    assert status == "failed"


async def test_beam_search_works_and_waits_like_everybody(served: Served) -> None:
    async with served.client() as client:
        beams = await complete(
            client, "Once", 4, n=2, temperature=0,
            extra_body={"use_beam_search": True, "slo": {"class": "strict"}},
        )  # fmt: skip
    assert len(beams.choices) == 2


async def test_why_a_request_waits_can_be_asked(served: Served) -> None:
    name = "why-1"
    async with served.client() as client:
        stream = await complete(
            client, "Once", 300, stream=True, extra_body={"ignore_eos": True},
            extra_headers={"x-request-id": name},
        )  # fmt: skip
        event = await anext(aiter(stream))
        for known in (name, event.id):
            url = f"http://127.0.0.1:{served.metrics}/v1/penstock/requests/{known}"
            async with httpx.AsyncClient() as asking:
                answer = await asking.get(url)
            (choice,) = answer.json()["choices"]
            assert choice["prompt_tokens"] >= 1
            assert "of at most 300 output tokens" in choice["explanation"]
        await stream.close()


async def test_nothing_in_a_request_ends_the_engine(served: Served) -> None:
    async with served.client() as client:
        with pytest.raises(openai.BadRequestError):
            await complete(client, "x", 4, extra_body={"vllm_xargs": {"slo_class": ["a"]}})
        deep: list[Any] = []
        for _ in range(600):
            deep = [deep]
        for odd in (deep, 10**30, -1):
            # Without the hook for benchmarks, as unknown as any other member.
            assert (await complete(client, "x", 4, extra_body={"trace_output_tokens": odd})).choices
        assert (await complete(client, "x", 4)).choices[0].text


async def test_an_answer_whose_parts_do_not_fit_is_refused_at_once(served: Served) -> None:
    async with served.client() as client:
        with pytest.raises(openai.RateLimitError):
            await complete(client, "Once", 300, n=20, extra_body={"ignore_eos": True})
        name = 'penstock:num_requests_waiting{model_name="demo"}'
        await complete(client, "Once", 1)
    assert served.scrape()[name] == 0


async def test_a_client_that_leaves_gives_its_memory_back(served: Served) -> None:
    name = 'penstock:num_requests_running{model_name="demo"}'
    async with served.client() as client:
        stream = await complete(client, "Once", 400, stream=True, extra_body={"ignore_eos": True})
        async for _ in stream:
            break
        await stream.close()
        end = time.monotonic() + 20
        while served.scrape()[name] and time.monotonic() < end:
            # The gauges move with steps.
            await complete(client, "Once", 1)
            await asyncio.sleep(0.1)
    assert served.scrape()[name] == 0


async def test_stop_strings_and_grammars_work(served: Served) -> None:
    async with served.client() as client:
        whole = (await complete(client, "Once upon", 30)).choices[0].text
        word = whole.split()[3]
        cut = await complete(client, "Once upon", 30, stop=[word])
        assert cut.choices[0].finish_reason == "stop"
        assert cut.choices[0].text == whole[: whole.index(word)]
        grammar = {"structured_outputs": {"choice": ["red", "blue"]}}
        choice = await complete(client, "Once", 8, extra_body=grammar)
        assert choice.choices[0].text in {"red", "blue"}


async def test_what_the_plug_in_does_not_serve_is_refused_at_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(AssertionError):
        Served(log, "--long-prefill-token-threshold", "16", settings=SETTINGS)
    told = "penstock.vllm.Scheduler: --long-prefill-token-threshold is not supported"
    assert told in log.read_text(encoding="utf-8")


async def test_data_parallel_engines_have_a_scheduler_each(tmp_path: Path) -> None:
    server = Served(tmp_path / "log", "--data-parallel-size", "2", settings=SETTINGS)
    try:
        async with server.client() as client:
            more = {"ignore_eos": True, "slo": {"class": "easy"}}
            asked = (complete(client, one, 60, extra_body=more) for one in PROMPTS)
            answers = await asyncio.gather(*asked)
            with pytest.raises(openai.APIStatusError) as caught:
                await complete(client, "Once", 8, n=4, extra_body={"slo": {"class": "strict"}})
        met = 'penstock:slo_requests_total{model_name="demo",outcome="met",slo_class="easy"}'
        served = [server.scrape(engine)[met] for engine in (0, 1)]
    finally:
        server.stop()
    assert {one.choices[0].finish_reason for one in answers} == {"length"}
    assert caught.value.status_code == 504
    assert sum(served) == len(PROMPTS)
    assert min(served) > 0


def lora(folder: Path, seed: int) -> str:
    """A random adapter of the included model, as PEFT keeps them; as a flag's value."""
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    width, head = config["hidden_size"], config["head_dim"]
    outputs = {"q_proj": config["num_attention_heads"], "v_proj": config["num_key_value_heads"]}
    source = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, heads in outputs.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            a, b = (8, width), (heads * head, 8)
            weights[f"{name}.lora_A.weight"] = torch.randn(*a, generator=source) * 0.1
            weights[f"{name}.lora_B.weight"] = torch.randn(*b, generator=source) * 0.1
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(outputs)}
    (folder / "adapter_config.json").write_text(json.dumps(said), encoding="utf-8")
    return f"{folder.name}={folder}"


async def test_lora_adapters_share_the_places_that_there_are(tmp_path: Path) -> None:
    names = ["a0", "a1", "a2"]
    flags = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--max-cpu-loras", "3"]
    flags += ["--lora-modules", *(lora(tmp_path / name, i) for i, name in enumerate(names))]
    settings = {"scheduler": {"preset": "past-future"}}
    server = Served(tmp_path / "log", *flags, settings=settings)

    async def say(client: Any, name: str) -> list[int]:
        answer = await client.completions.create(
            model=name, prompt="Once upon a time", max_tokens=12, temperature=0,
            extra_body={"return_token_ids": True},
        )  # fmt: skip
        # Later ones may differ: what shares a step may be rounded otherwise.
        return list(answer.choices[0].token_ids[:3])

    try:
        async with server.client() as client:
            alone = [await say(client, name) for name in names]
            together = await asyncio.gather(*(say(client, name) for name in names * 10))
    finally:
        server.stop()
    assert len({tuple(one) for one in alone}) == 3
    assert together == alone * 10


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
async def test_vllms_pause_works_and_what_waits_meanwhile_is_served(
    served: Served, mode: str
) -> None:
    url = f"http://127.0.0.1:{served.port}"
    async with served.client() as client, httpx.AsyncClient(base_url=url, timeout=30) as admin:
        body = {"ignore_eos": True}
        inside = asyncio.create_task(complete(client, "Once", 60, extra_body=body))
        await asyncio.sleep(0.1)
        assert (await admin.post("/pause", params={"mode": mode})).status_code == 200
        outside = asyncio.create_task(complete(client, "Twice", 5, extra_body=body))
        await asyncio.sleep(0.3)
        assert not outside.done()
        assert (await admin.post("/resume")).status_code == 200
        assert (await outside).choices[0].finish_reason == "length"
        reason = (await inside).choices[0].finish_reason
        assert reason in ({"abort", "length"} if mode == "abort" else {"length"})


def test_offline_requests_are_told_why(tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(
        f"""
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    settings = {{"slo": {{"strict": {{"ttft": 0.0001, "on_miss": "expire"}}}}}}
    llm = LLM(
        {str(DEMO)!r}, enforce_eager=True, dtype="float32", max_model_len=512, max_num_seqs=8,
        max_num_batched_tokens=64, num_gpu_blocks_override=25, block_size=32,
        scheduler_cls="penstock.vllm.Scheduler", additional_config={{"penstock": settings}},
    )
    strict = SamplingParams(max_tokens=5, extra_args={{"slo_class": "strict"}})
    for answer in llm.generate(["Once", "Twice"], [SamplingParams(max_tokens=5), strict]):
        print("END", answer.outputs[0].finish_reason, answer.outputs[0].stop_reason)
""",
        encoding="utf-8",
    )
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=True
    )
    ends = [line for line in done.stdout.splitlines() if line.startswith("END")]
    assert ends[0].split()[1] in {"length", "stop"}
    assert ends[1].startswith("END error penstock: expired: the ttft promise")
