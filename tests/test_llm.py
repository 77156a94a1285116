"""The Python API, with a scripted engine for the mechanics and with the embedded model."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from penstock.core.engine import Ticket, Work
from penstock.core.policies import presets
from penstock.core.sampling import SamplingParams
from penstock.core.types import (
    SLO,
    Capabilities,
    FinishReason,
    RequestError,
    StepPlan,
    StepResult,
)
from penstock.llm import LLM, Completion
from penstock.models import demo_path
from penstock.testing import ScriptedEngine
from penstock.text import load_tokenizer

GREEDY = SamplingParams(temperature=0.0)
VOCAB = 4096


def capabilities(**changes: int) -> Capabilities:
    values = {
        "kv_blocks": 64,
        "block_size": 16,
        "max_batch": 8,
        "max_step_tokens": 64,
        "max_request_tokens": 512,
        "prefix_cache": True,
    }
    return Capabilities(**{**values, **changes})


def scripted(**changes: int) -> LLM:
    return LLM(engine=ScriptedEngine(capabilities(**changes), vocab_size=VOCAB))


def idle(llm: LLM) -> bool:
    scheduler = llm.runtime.scheduler
    scheduler.check()
    stats = scheduler.stats(0.0)
    return stats.waiting == stats.running == stats.kv_used == 0


@pytest.mark.parametrize("preset", ["past-future", "past-future-artifact", "vllm", "tgi"])
def test_outputs_come_in_the_order_of_the_prompts(preset: str) -> None:
    engine = ScriptedEngine(capabilities(kv_blocks=24), vocab_size=VOCAB)
    llm = LLM(engine=engine, preset=preset)
    prompts = [[10 + i] * (5 * i + 3) for i in range(12)]
    expected = [engine.expected_text(Work(prompt), 64) for prompt in prompts]
    done = llm.generate(prompts, max_tokens=64)
    assert [list(one.token_ids) for one in done] == expected
    assert [one.prompt_tokens for one in done] == [len(prompt) for prompt in prompts]
    for one in done:
        if len(one.token_ids) < 64:
            assert one.finish_reason is FinishReason.STOP
        assert one.text == llm.tokenizer.decode(list(one.token_ids))
        assert one.ttft is not None
        assert 0 < one.ttft <= one.e2e
    assert idle(llm)
    assert engine.open_requests == 0


def test_one_text_is_a_list_of_one() -> None:
    llm = scripted()
    [one] = llm.generate("The gate", max_tokens=3)
    assert one.prompt_tokens == len(llm.tokenizer.encode("The gate"))
    assert llm.generate([]) == []


def test_a_stop_string_ends_the_request_in_the_scheduler() -> None:
    llm = scripted()
    [whole] = llm.generate([[5, 6, 7]], max_tokens=40)
    stop = whole.text[6:9]
    [cut] = llm.generate([[5, 6, 7]], max_tokens=40, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert len(cut.token_ids) < len(whole.token_ids)
    assert whole.token_ids[: len(cut.token_ids)] == cut.token_ids
    assert idle(llm)


@pytest.mark.parametrize("depth", [1, 2])
def test_memory_is_free_afterwards(depth: int) -> None:
    llm = scripted(depth=depth)
    for _ in range(3):
        llm.generate([[1, 2, 3], [4, 5, 6] * 9], max_tokens=20, stop=["a", "e"])
        assert idle(llm)


def test_each_prompt_may_have_its_own_parameters() -> None:
    llm = scripted()
    done = llm.generate(
        [[3] * 4, [4] * 4], [GREEDY, SamplingParams(seed=1)], max_tokens=[2, 5], slo=[SLO(), SLO()]
    )
    assert len(done[0].token_ids) <= 2
    assert len(done[1].token_ids) <= 5
    with pytest.raises(ValueError, match="max_tokens has 3 entries for 2 prompts"):
        llm.generate([[3], [4]], max_tokens=[1, 2, 3])
    with pytest.raises(ValueError, match="slo has 1 entries for 2 prompts"):
        llm.generate([[3], [4]], slo=[SLO()])


@pytest.mark.parametrize(
    ("bad", "max_tokens", "field"),
    [([1] * 600, None, "prompts"), ([1] * 10, 1000, "max_tokens"), ([VOCAB], 5, "prompt")],
)
def test_a_bad_prompt_takes_the_whole_call_back(
    bad: list[int], max_tokens: int | None, field: str
) -> None:
    llm = scripted()
    with pytest.raises(RequestError) as refused:
        llm.generate([[1, 2], bad, [3]], max_tokens=max_tokens)
    assert refused.value.field == field
    assert idle(llm)
    assert len(llm.generate([[1, 2]], max_tokens=4)[0].token_ids) >= 1


@pytest.mark.parametrize(
    ("arguments", "field", "words"),
    [
        ({"prompts": 5}, "prompts", "prompts is 5"),
        ({"prompts": None}, "prompts", "prompts is None"),
        ({"prompts": b"abc"}, "prompts", "a text, texts, or"),
        ({"prompts": [1, 2, 3]}, "prompts", r"prompts\[0\] is 1"),
        ({"prompts": [["a"]]}, "prompts", "token ids"),
        ({"prompts": [[1.5]]}, "prompts", "token ids"),
        ({"prompts": [[-1]]}, "prompts", "at least 0"),
        ({"prompts": [[10**30]]}, "prompts", "token ids"),
        ({"prompts": [[]]}, "prompts", "at least one"),
        ({"sampling": {}}, "sampling", "SamplingParams"),
        ({"sampling": [GREEDY, {}]}, "sampling", "SamplingParams"),
        ({"max_tokens": 2.5}, "max_tokens", "2.5"),
        ({"max_tokens": True}, "max_tokens", "True"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": [3, "3"]}, "max_tokens", "'3'"),
        ({"max_tokens": [3, None]}, "max_tokens", "None"),
        ({"stop": 5}, "stop", "a text or a list"),
        ({"stop": [5]}, "stop", "a text or a list"),
        ({"stop": ""}, "stop", "none of them empty"),
        ({"slo": {"ttft": 1}}, "slo", "SLO"),
        ({"slo": 0.5}, "slo", "SLO"),
        ({"on_miss": "nope"}, "on_miss", "keep, demote, expire"),
        ({"on_miss": None}, "on_miss", "keep, demote, expire"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(
    arguments: dict[str, object], field: str, words: str
) -> None:
    llm = scripted()
    with pytest.raises(RequestError, match=words) as refused:
        llm.generate(**{"prompts": [[1, 2], [3]], "max_tokens": 5, **arguments})
    assert refused.value.field == field
    assert llm.runtime.scheduler.stats(0.0).plans == 0
    assert len(llm.generate([[1, 2]], max_tokens=4)) == 1


@pytest.mark.parametrize("messages", [{"role": "user"}, "hi", 5, [], [[]], ["hi"], [5]])
def test_what_is_no_chat_is_named(messages: object) -> None:
    with pytest.raises(RequestError, match="role and content") as refused:
        scripted().chat(messages)
    assert refused.value.field == "messages"


def test_after_a_step_that_broke_off_it_is_closed_and_says_why() -> None:
    class Breaking(ScriptedEngine):
        def collect(self, ticket: Ticket) -> StepResult:
            if ticket.number == 3:
                msg = "no more memory"
                raise RuntimeError(msg)
            return super().collect(ticket)

    llm = LLM(engine=Breaking(capabilities(), vocab_size=VOCAB, mean_length=10_000))
    with pytest.raises(RuntimeError, match="no more memory"):
        llm.generate([[1, 2]], max_tokens=50)
    with pytest.raises(ValueError, match=r"closed, since a step broke off: .*no more memory"):
        llm.generate([[1, 2]], max_tokens=50)
    llm.close()


def test_the_default_cap_is_what_the_context_leaves() -> None:
    llm = LLM(engine=ScriptedEngine(capabilities(), vocab_size=VOCAB, mean_length=10_000))
    short, long = llm.generate([[1] * 10, [2] * 500])
    assert (len(short.token_ids), len(long.token_ids)) == (256, 12)


class Interrupting(ScriptedEngine):
    """Presses Ctrl-C in the middle of a step."""

    interrupt_at: int | None = None
    after = 0

    def submit(self, plan: StepPlan) -> Ticket:
        ticket = super().submit(plan)
        if self.interrupt_at is not None:
            self.after += 1
            if self.after == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
        return ticket


def test_an_interrupt_waits_for_the_step_and_leaves_a_usable_model() -> None:
    # Whoever started the tests may have had it ignored, as shells do for what runs behind them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    engine = Interrupting(capabilities(depth=2), vocab_size=VOCAB, mean_length=10_000)
    llm = LLM(engine=engine)
    engine.interrupt_at = 7
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1, 2], [3, 4]], max_tokens=300)
    assert engine.after < 15
    assert idle(llm)
    assert engine.open_requests == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(llm.generate([[1, 2]], max_tokens=5)[0].token_ids) == 5


def test_an_expired_request_is_not_a_completion_of_full_length() -> None:
    class Slow(ScriptedEngine):
        def collect(self, ticket: Ticket) -> StepResult:
            time.sleep(0.01)
            return super().collect(ticket)

    engine = Slow(capabilities(max_batch=1), vocab_size=VOCAB, mean_length=10_000)
    llm = LLM(engine=engine, preset="vllm")
    kept, late = llm.generate(
        [[1], [2]], max_tokens=[20, 20], slo=[SLO(), SLO(ttft=0.05)], on_miss="expire"
    )
    assert kept.finish_reason is FinishReason.LENGTH
    assert late.finish_reason is FinishReason.EXPIRED
    assert late.detail
    assert late.ttft is late.tpot is None
    assert late.text == ""
    assert idle(llm)


def test_closing() -> None:
    with scripted() as llm:
        llm.generate([[1]], max_tokens=2)
    llm.close()
    with pytest.raises(ValueError, match="this LLM is closed"):
        llm.generate([[1]])


def test_what_a_model_may_be() -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere' is no folder"):
        LLM("nowhere")
    with pytest.raises(ValueError, match="preset"):
        LLM("demo", preset="best")
    with pytest.raises(ValueError, match="preset is 5"):
        LLM("demo", preset=5)
    with pytest.raises(ValueError, match="max_batch is an option of the native engine"):
        LLM("demo", engine=ScriptedEngine(capabilities()), max_batch=3)


def test_importing_the_class_loads_no_torch() -> None:
    script = "import sys, penstock; penstock.LLM; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # In bfloat16 a batch of two may round to another token where two are nearly as likely.
    engine = {"kv_tokens": 2048, "device": "cpu", "dtype": "float32"}
    with LLM("demo", preset=presets.build("vllm"), **engine) as model:
        yield model


CHAT = [{"role": "user", "content": "Hello, who are you?"}]


def test_the_embedded_model_answers(llm: LLM) -> None:
    [one] = llm.chat(CHAT, GREEDY, max_tokens=30)
    assert one.text.strip()
    assert one.finish_reason in {FinishReason.STOP, FinishReason.LENGTH}
    assert one.prompt_tokens == len(llm.tokenizer.apply_chat_template(CHAT))
    assert "<" not in one.text
    assert idle(llm)


def test_greedy_outputs_do_not_depend_on_company(llm: LLM) -> None:
    texts = ["Once upon a time", "The gate", "Water is", "1 + 1 ="]
    together = llm.generate(texts, GREEDY, max_tokens=16)
    alone = [llm.generate(text, GREEDY, max_tokens=16)[0] for text in texts]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]


def test_seeded_outputs_repeat(llm: LLM) -> None:
    def tokens(seed: int) -> list[tuple[int, ...]]:
        params = SamplingParams(temperature=1.0, seed=seed)
        done = llm.generate(["The gate", "Water is"], params, max_tokens=12)
        return [one.token_ids for one in done]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_several_chats_at_once(llm: LLM) -> None:
    other = [{"role": "user", "content": "What is water?"}]
    both = llm.chat([CHAT, other], GREEDY, max_tokens=8)
    assert [one.token_ids for one in both] == [
        llm.chat(chat, GREEDY, max_tokens=8)[0].token_ids for chat in (CHAT, other)
    ]


def test_logprobs_are_there_when_asked_for(llm: LLM) -> None:
    [without] = llm.generate("The gate", GREEDY, max_tokens=4)
    assert without.logprobs is None
    params = SamplingParams(temperature=0.0, logprobs=2)
    [one] = llm.generate("The gate", params, max_tokens=4)
    assert one.logprobs is not None
    assert tuple(token.id for token in one.logprobs) == one.token_ids == without.token_ids
    for token in one.logprobs:
        assert token.top[0] == (token.id, token.logprob)  # greedy: the most likely one
        assert len(token.top) == 2


def test_the_token_that_ends_an_output_is_no_text(llm: LLM) -> None:
    [whole] = llm.generate("The gate", GREEDY, max_tokens=8)
    stop = whole.token_ids[3]
    params = SamplingParams(temperature=0.0, stop_token_ids=(stop,))
    [cut] = llm.generate("The gate", params, max_tokens=8)
    at = whole.token_ids.index(stop)
    assert cut.finish_reason is FinishReason.STOP
    assert cut.token_ids == whole.token_ids[: at + 1]
    assert whole.text.startswith(cut.text)
    assert len(cut.text) < len(llm.tokenizer.decode(list(cut.token_ids)))


def test_tpot_is_per_token_after_the_first() -> None:
    values = {"text": "", "finish_reason": FinishReason.LENGTH, "prompt_tokens": 1, "e2e": 2.0}
    assert Completion(**values, token_ids=(1, 2, 3), ttft=1.0).tpot == 0.5
    assert Completion(**values, token_ids=(1,), ttft=1.0).tpot is None
    assert Completion(**values, token_ids=(), ttft=None).tpot is None


def test_the_tokenizer_is_the_models() -> None:
    assert scripted().tokenizer.vocab_size == load_tokenizer(demo_path()).vocab_size
