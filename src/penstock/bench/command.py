"""``penstock bench``: drive any OpenAI endpoint and report goodput."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from penstock.bench import fitted, output, traces
from penstock.bench.client import Api, Target
from penstock.bench.drive import HookError, LengthMode, Rules
from penstock.bench.measure import Load, Measurement, run
from penstock.bench.prompts import Prompts
from penstock.bench.result import Result, command_line
from penstock.bench.workload import (
    Lengths,
    Workload,
    gamma,
    parse_slo,
    poisson,
    shuffled,
    stretch,
    synthetic,
)
from penstock.bench.writable import OutputError, check_writable

MOST_REQUESTS = 10_000_000
"""What ``--requests`` may ask for: more do not fit into the memory of common machines."""


class UsageError(ValueError):
    """Options that do not go together."""


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class EndpointOptions:
    """Where requests go.

    Attributes:
        url: Base address of the endpoint.
        model: The model's name there; by default the first that /v1/models lists.
        api: Which route: completions takes token ids, chat takes text.
        key_env: Environment variable that holds the API key, if one is needed.
        text_prompts: Send words instead of token ids, for endpoints without token-id prompts.
        token_range: Token ids LOW:HIGH of random prompts, away from special tokens.
        timeout: Seconds after which a request counts as an error.
    """

    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api: Api = "completions"
    key_env: str = "OPENAI_API_KEY"
    text_prompts: bool = False
    token_range: str = "300:1300"  # noqa: S105
    timeout: float = 600.0


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class WorkloadOptions:
    """What is asked for.

    Attributes:
        trace: A trace file (Azure, BurstGPT, Mooncake, ShareGPT-o1 or plain; .gz too).
        lengths: Real lengths that come with penstock: sharegpt, sharegpt-o1
            or azure-conversation.
        input: Prompt lengths: 512, uniform:32-4096 or lognormal:MEDIAN,SIGMA[,MAX].
        output: Output lengths in the same notation, or "model" to let the model decide.
        scale: Multiply all lengths by this, at most 1.
        requests: How many, at most 10 million; by default all of a trace, else 200.
        seed: The same seed gives the same requests, prompts and arrivals.
        cap: max_tokens of every request; by default the workload's longest output.
        engine_has_no_hook: The engine cannot end requests by trace_output_tokens: send true
            lengths as max_tokens with ignore_eos. Results are labelled "lengths leaked".
    """

    trace: Path | None = None
    lengths: str | None = None
    input: str | None = None
    output: str | None = None
    scale: float = 1.0
    requests: int | None = None
    seed: int = 0
    cap: int | None = None
    engine_has_no_hook: bool = False


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class LoadOptions:
    """How it arrives.

    Attributes:
        clients: Closed loop: so many clients with one request each at a time.
        rate: Open loop: requests per second.
        arrivals: Open loop: poisson, gamma:CV, or trace for the trace's own times.
        speed: Open loop: divide the times by this.
        duration: Cut the run after so many seconds; a closed loop starts over until then.
        warmup: Leave the first seconds out of the numbers.
        retries: Closed loop: how often a failed request goes back into the queue.
        no_retry: The same as --retries 0.
        patience: Leave after this share of the TTFT bound without a token, such as 0.8.
    """

    clients: int | None = None
    rate: float | None = None
    arrivals: str | None = None
    speed: float = 1.0
    duration: float | None = None
    warmup: float = 0.0
    retries: int = 10
    no_retry: bool = False
    patience: float | None = None


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class ReportOptions:
    """What comes out.

    Attributes:
        json: Write all numbers to this file; - writes only JSON to standard output.
        html: Write a report with figures to this file.
    """

    json: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None
    html: Path | None = None


def bench(
    *,
    endpoint: EndpointOptions | None = None,
    workload: WorkloadOptions | None = None,
    load: LoadOptions | None = None,
    report: ReportOptions | None = None,
    slo: Annotated[list[str] | None, Parameter(negative="", consume_multiple=False)] = None,
    send_slo: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Measure goodput, attainment and latencies of an OpenAI endpoint.

    The exit code is 0 if requests were measured, 1 if the endpoint failed, 2 if options are wrong
    or a file could not be written.

    Args:
        endpoint: Where requests go.
        workload: What is asked for.
        load: How it arrives.
        report: What comes out.
        slo: Bounds in seconds, as ttft=2,gap=0.5,tpot=0.1,e2e=60; repeat with NAME*WEIGHT: in
            front for a mix of classes.
        send_slo: Also tell the server each request's bounds (body field slo).
    """
    endpoint, workload = endpoint or EndpointOptions(), workload or WorkloadOptions()
    load, report = load or LoadOptions(), report or ReportOptions()
    try:
        _check_files(report)
        requests = build_workload(workload, load).with_classes(parse_slo(slo or []), workload.seed)
        rules = build_rules(requests, workload, load, endpoint, send_slo=send_slo)
        prompts = Prompts(requests, workload.seed, *_token_range(endpoint.token_range))
        clients = load.clients if load.rate is None and load.arrivals is None else None
        press = Load(clients, load.speed, load.duration, load.warmup)
        target = Target(
            endpoint.url, endpoint.model or "", endpoint.api,
            os.environ.get(endpoint.key_env, ""), endpoint.timeout,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    settings = _settings(endpoint, workload, load, slo or [], rules)
    quiet = report.json == "-"
    try:
        if not target.model:
            target = replace(target, model=first_model(target))
        job = Measurement(target, requests, rules, press, prompts, settings)
        result = _with_progress(job, quiet=quiet)
    except (HookError, ValueError) as error:
        return _fail(error, 1)
    return _report(result, report)


def _check_files(report: ReportOptions) -> None:
    if report.json not in {None, "-"}:
        check_writable("json", Path(report.json or ""))
    if report.html is not None:
        check_writable("html", report.html)


def build_workload(options: WorkloadOptions, load: LoadOptions) -> Workload:
    """The requests that the options ask for, with arrival times if the loop is open.

    Raises:
        UsageError: options that do not go together.
        ValueError, OSError: an option or a trace file that cannot be used.
    """
    given = [options.trace is not None, options.lengths is not None, options.input is not None]
    if sum(given) > 1:
        msg = "give one of --trace, --lengths and --input"
        raise UsageError(msg)
    if options.requests is not None and not 1 <= options.requests <= MOST_REQUESTS:
        msg = f"requests is {options.requests}; it must be from 1 to {MOST_REQUESTS}"
        raise UsageError(msg)
    if options.seed < 0:
        msg = f"seed is {options.seed}; it must be at least 0"
        raise UsageError(msg)
    by_model = options.output == "model"
    if options.output is not None and not by_model and options.input is None:
        msg = "--output needs --input; a trace and --lengths bring their own outputs"
        raise UsageError(msg)
    count = options.requests or 200
    if options.trace is not None:
        made = _traced(options, load)
    elif options.input is not None:
        outputs = None if by_model else Lengths.parse(options.output or options.input)
        made = synthetic(Lengths.parse(options.input), outputs, count, options.seed)
    else:
        made = fitted.fitted(options.lengths or "azure-conversation", count, options.seed)
    made = made.scaled(options.scale)
    if by_model:
        made = replace(made, output=None)
    return _timed(made, options, load)


def _traced(options: WorkloadOptions, load: LoadOptions) -> Workload:
    made = traces.load(options.trace or Path())
    count = options.requests or len(made)
    own_times = load.arrivals == "trace"
    at_random = load.rate is not None and not own_times
    if not own_times:
        made = replace(made, notes=tuple(n for n in made.notes if n != traces.SPREAD))
    if made.hash_ids is None and (at_random or (options.requests and not own_times)):
        return shuffled(made, count, options.seed)
    if count > len(made):
        note = f"the trace has only {len(made)} of {count} requests"
        made, count = replace(made, notes=(*made.notes, note)), len(made)
    return stretch(made, count, options.seed) if at_random else made.take(range(count))


def _timed(made: Workload, options: WorkloadOptions, load: LoadOptions) -> Workload:
    process = re.fullmatch(r"(poisson|trace)|gamma:(\d+(?:\.\d+)?)", load.arrivals or "poisson")
    if process is None:
        msg = f"arrivals is {load.arrivals!r}; it must be poisson, gamma:CV or trace"
        raise UsageError(msg)
    is_open = load.rate is not None or load.arrivals is not None
    if is_open == (load.clients is not None):
        msg = "give --clients for a closed loop, or --rate or --arrivals trace for an open one"
        raise UsageError(msg)
    if not is_open:
        return made
    if load.arrivals == "trace":
        if made.arrival is None:
            msg = (
                f"arrivals is 'trace', but {made.source} has no arrival times (in a plain trace, "
                "a column arrival_s)"
            )
            raise UsageError(msg)
        if load.rate is not None:
            msg = "--arrivals trace has the trace's own rate; use --speed instead of --rate"
            raise UsageError(msg)
        return made
    if load.rate is None:
        msg = f"--arrivals {load.arrivals} needs --rate"
        raise UsageError(msg)
    if process[2] is not None:
        return made.with_arrivals(gamma(len(made), load.rate, float(process[2]), options.seed))
    return made.with_arrivals(poisson(len(made), load.rate, options.seed))


def build_rules(
    requests: Workload,
    options: WorkloadOptions,
    load: LoadOptions,
    endpoint: EndpointOptions,
    *,
    send_slo: bool,
) -> Rules:
    """How requests are sent.

    Raises:
        UsageError: the cap would cut outputs, or is missing.
    """
    longest = requests.longest_output
    if longest is None and options.cap is None:
        msg = "--output model needs --cap, the max_tokens of every request"
        raise UsageError(msg)
    cap = options.cap or longest or 1
    if longest is not None and cap < longest:
        msg = f"cap is {cap}, below the longest output of {longest}; raise it or use --scale"
        raise UsageError(msg)
    mode: LengthMode = "model" if longest is None else "hidden"
    if options.engine_has_no_hook and longest is not None:
        mode = "leaked"
    if load.retries < 0:
        msg = f"retries is {load.retries}; it must be at least 0"
        raise UsageError(msg)
    if load.patience is not None and not load.patience > 0:
        msg = f"patience is {load.patience}; it must be above 0"
        raise UsageError(msg)
    return Rules(
        cap=cap,
        lengths=mode,
        retries=0 if load.no_retry else load.retries,
        send_slo=send_slo,
        patience=load.patience,
        text_prompts=endpoint.text_prompts,
    )


def first_model(target: Target) -> str:
    """The first model that the endpoint lists.

    Raises:
        HookError: it lists none, or does not answer.
    """
    import httpx

    headers = {"authorization": f"Bearer {target.key}"} if target.key else {}
    try:
        answer = httpx.get(f"{target.root}/v1/models", headers=headers).raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        msg = f"{target.root}/v1/models does not name a model ({error}); give --model"
        raise HookError(msg) from None


def _token_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        msg = f"token_range is {text!r}; write LOW:HIGH, such as 300:1300"
        raise UsageError(msg)
    return int(match[1]), int(match[2])


def _settings(
    endpoint: EndpointOptions,
    workload: WorkloadOptions,
    load: LoadOptions,
    slo: list[str],
    rules: Rules,
) -> dict[str, object]:
    values = {**vars(endpoint), **vars(workload), **vars(load), "slo": slo, "cap": rules.cap}
    values["command"] = command_line()
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not None}


def _with_progress(job: Measurement, *, quiet: bool) -> Result:
    if quiet or not sys.stderr.isatty():
        return run(job)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True, refresh_per_second=2,
    ) as bar:  # fmt: skip
        endless = job.load.duration is not None and job.load.clients is not None
        task = bar.add_task("requests", total=None if endless else len(job.workload))
        retry = job.rules.retries > 0 and job.load.clients is not None

        def count(met: bool) -> None:  # noqa: FBT001
            bar.advance(task, 1 if met or not retry else 0)

        return run(replace(job, on_attempt=lambda attempt: count(attempt.met)))


def _report(result: Result, options: ReportOptions) -> int:
    try:
        output.report(result, json=options.json, page=options.html)
    except OutputError as error:
        return _fail(error, 2)
    return 0 if result.summary.ends.get("completed") else 1


def _fail(error: Exception, code: Literal[1, 2]) -> int:
    sys.stderr.write(f"penstock bench: {error}\n")
    return code
