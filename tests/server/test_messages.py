"""What the two processes say to each other survives the way."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.engine import Work
from penstock.core.memory import prefix_keys
from penstock.core.sampling import SamplingParams
from penstock.core.types import SLO, Capabilities, FinishReason, OnMiss, Request
from penstock.server.messages import Add, Command, End, Event, Gauges, Swapped

SECONDS = st.none() | st.floats(min_value=1e-6, max_value=1e6)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 1 << 30),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 10),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 1 << 20), st.floats(-100, 100), max_size=5),
    seed=st.none() | st.integers(0, (1 << 63) - 1),
    logprobs=st.none() | st.integers(0, 20),
    stop_token_ids=st.lists(st.integers(0, 1 << 20), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
)
PROMPTS = st.lists(st.integers(0, 1 << 20), min_size=1, max_size=70)


@given(
    prompt=PROMPTS,
    sampling=SAMPLING,
    slo=st.builds(SLO, SECONDS, SECONDS, SECONDS, SECONDS),
    cap=st.integers(1, 1 << 40),
    on_miss=st.sampled_from(OnMiss),
    trace=st.none() | st.integers(1, 1 << 20),
    name=st.text(max_size=20),
    sharing=st.booleans(),
    generated=st.lists(st.integers(0, 1 << 20), max_size=5),
    batch=st.integers(0, 1 << 40),
)
def test_a_request_arrives_as_it_was_sent(
    prompt: list[int],
    sampling: SamplingParams,
    slo: SLO,
    cap: int,
    on_miss: OnMiss,
    trace: int | None,
    name: str,
    sharing: bool,
    generated: list[int],
    batch: int,
) -> None:
    capabilities = Capabilities(64, 16, 8, 64, 1024, prefix_cache=sharing)
    request = Request(
        id=name,
        prompt_tokens=len(prompt),
        cap=len(generated) + cap,
        arrival=12.5,
        slo=slo,
        slo_class=name,
        priority=-3,
        on_miss=on_miss,
        prefix=prefix_keys(prompt, 16) if sharing else (),
        generated=len(generated),
        batch=batch,
    )
    work = Work(prompt, sampling, trace, generated)
    raw = msgspec.msgpack.encode(Add.pack(request, work))
    command = msgspec.msgpack.decode(raw, type=Command)
    assert isinstance(command, Add)
    assert command.unpack(capabilities) == (request, work)


KINDS = [kind for union in (Command, Event) for kind in union.__args__ if kind is not Add]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@settings(max_examples=25)
@given(data=st.data())
def test_every_message_survives(kind: type[msgspec.Struct], data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    raw = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(raw, type=Command if kind in COMMANDS else Event) == message


COMMANDS = Command.__args__
NUMBERS = st.floats(allow_nan=False)
COUNTS = st.integers(0, (1 << 63) - 1)
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "tokens": st.dictionaries(st.text(max_size=4), COUNTS, max_size=3),
    "details": st.dictionaries(
        st.text(max_size=4), st.tuples(NUMBERS, st.lists(st.tuples(COUNTS, NUMBERS), max_size=2))
    ),
    "reason": st.sampled_from(FinishReason),
    "rate": st.none() | NUMBERS,
    "swapped": st.builds(Swapped, COUNTS, COUNTS),
    "prices": st.none() | st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    **dict.fromkeys(("seconds", "planning", "kv_usage"), NUMBERS),
    **dict.fromkeys(("id", "text", "detail", "field", "message"), st.text(max_size=8)),
}


def messages(kind: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    nested = {
        "ended": lambda: st.lists(messages(End), max_size=2),
        "gauges": lambda: messages(Gauges),
    }
    fields = {
        name: nested[name]() if name in nested else FIELDS.get(name, COUNTS)
        for name in kind.__struct_fields__
    }
    return st.builds(kind, **fields)
