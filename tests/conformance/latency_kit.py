"""What every latency model must keep to, whatever it is made of."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from penstock.core.forecast.latency.base import LatencyModel, StepLoad

_TINY = 1e-9


@st.composite
def loads(draw: st.DrawFn) -> StepLoad:
    """A step that is not empty and could be."""
    decoding = draw(st.integers(0, 200))
    each = draw(st.integers(1, 4000))
    chunks = draw(st.integers(0 if decoding else 1, 4))
    tokens = draw(st.integers(1, 500)) if chunks else 0
    start = draw(st.integers(0, 4000))
    work = chunks * tokens * (start + tokens / 2)
    return StepLoad(decoding, decoding * each, chunks * tokens, work, chunks, each * (decoding > 0))


def check_latency_model(model: LatencyModel, *, prefill_counts: bool = True) -> None:
    """Run the whole kit.

    Args:
        prefill_counts: whether prompts take time.
    """

    @given(loads())
    def takes_time(load: StepLoad) -> None:
        seconds = model.seconds(load)
        assert math.isfinite(seconds)
        assert seconds > 0 or not (load.decoding or prefill_counts)
        assert model.seconds(load) == seconds, "the same question, another answer"

    @given(loads(), st.integers(1, 50), st.integers(0, 1000))
    def more_takes_no_less(load: StepLoad, requests: int, longer: int) -> None:
        each = load.context // load.decoding if load.decoding else 1
        decoding = load.decoding + requests
        longest = max(load.longest, each + longer)
        more = load._replace(decoding=decoding, context=decoding * (each + longer), longest=longest)
        assert model.seconds(more) >= model.seconds(load) * (1 - _TINY)

    @given(loads(), st.integers(1, 500))
    def more_prompt_takes_no_less(load: StepLoad, tokens: int) -> None:
        if not load.chunks:
            return
        # Each chunk is longer by so many tokens, after the same context.
        chunk = load.prefill / load.chunks
        context = load.prefill_work / load.prefill - chunk / 2
        prefill = load.prefill + load.chunks * tokens
        longer = load._replace(
            prefill=prefill, prefill_work=prefill * (context + (chunk + tokens) / 2)
        )
        assert model.seconds(longer) >= model.seconds(load) * (1 - _TINY)

    @given(st.integers(1, 200), st.integers(1, 4000))
    def the_line_is_what_steps_take(decoding: int, each: int) -> None:
        line = model.decode_line(decoding)
        if line is None:
            return
        load = StepLoad(decoding, decoding * each, longest=each)
        assert math.isclose(line[0] + line[1] * load.context, model.seconds(load), rel_tol=1e-9)

    takes_time()
    more_takes_no_less()
    more_prompt_takes_no_less()
    the_line_is_what_steps_take()
