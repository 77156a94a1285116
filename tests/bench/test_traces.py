from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from penstock.bench.traces import TraceError, load

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 1000, "output_length": 52, "hash_ids": [0, 1]},
    {"timestamp": 0, "input_length": 700, "output_length": 26, "hash_ids": [0, 2]},
    {"timestamp": 3000, "input_length": 100, "output_length": 9, "hash_ids": [3]},
]
O1 = [
    {"prompt_tokens": 40, "completion_tokens": 1822, "total_tokens": 1862, "reasoning_tokens": 9},
    {"prompt_tokens": 24, "completion_tokens": 976, "total_tokens": 1000, "reasoning_tokens": 8},
]
PLAIN = "arrival_s,prompt_tokens,output_tokens\n10.5,3,4\n11,5,6\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_azure(tmp_path: Path) -> None:
    made = load(write(tmp_path, "azure.csv", AZURE))
    assert made.prompt.tolist() == [374, 396, 879]
    assert made.output.tolist() == [44, 109, 55]
    assert made.arrival == pytest.approx([0, 4.314579, 4.541877])
    assert "Azure" in made.source


def test_azure_with_a_time_zone(tmp_path: Path) -> None:
    text = AZURE.replace(",374", "+00:00,374").replace(",396", "+00:00,396")
    made = load(write(tmp_path, "azure.csv", text.replace(",879", "+00:00,879")))
    assert made.arrival == pytest.approx([0, 4.314579, 4.541877])


def test_burstgpt_leaves_failed_requests_out_and_says_so(tmp_path: Path) -> None:
    made = load(write(tmp_path, "burst.csv.gz", BURST))
    assert made.prompt.tolist() == [472, 1087]
    assert made.arrival.tolist() == [0, 40]
    assert made.notes == ("1 failed requests of the trace (0 tokens) left out",)


def test_times_start_with_the_first_request_that_was_served(tmp_path: Path) -> None:
    made = load(write(tmp_path, "burst.csv", bad(BURST, ",18,", ",0,").replace(",0,417", ",9,426")))
    assert made.arrival.tolist() == [0, 73]


def test_mooncake_spreads_coarse_stamps_and_keeps_prefixes(tmp_path: Path) -> None:
    made = load(write(tmp_path, "m.jsonl.gz", "\n".join(map(json.dumps, MOONCAKE)) + "\n"))
    assert made.arrival.tolist() == [0, 1.5, 3]
    assert made.hash_ids == ((0, 1), (0, 2), (3,))
    assert made.hash_block == 512
    assert "spread evenly" in made.notes[0]


def test_sharegpt_o1(tmp_path: Path) -> None:
    made = load(write(tmp_path, "o1.json", json.dumps(O1)))
    assert (made.prompt.tolist(), made.output.tolist()) == ([40, 24], [1822, 976])
    assert made.arrival is None


@pytest.mark.parametrize("name", ["p.csv", "p.csv.gz"])
def test_plain(tmp_path: Path, name: str) -> None:
    made = load(write(tmp_path, name, PLAIN))
    assert (made.prompt.tolist(), made.output.tolist()) == ([3, 5], [4, 6])
    assert made.arrival.tolist() == [0, 0.5]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pl.DataFrame({"prompt_tokens": [3, 5], "output_tokens": [4, 6]}).write_parquet(path)
    made = load(path)
    assert (made.prompt.tolist(), made.output.tolist()) == ([3, 5], [4, 6])


def test_rows_out_of_order_are_sorted_and_it_is_said(tmp_path: Path) -> None:
    made = load(write(tmp_path, "p.csv", "arrival_s,prompt_tokens,output_tokens\n9,1,2\n7,3,4\n"))
    assert made.prompt.tolist() == [3, 1]
    assert made.arrival.tolist() == [0, 2]
    assert made.notes == (
        "rows sorted by time: row 2 (line 3), column 'arrival_s', is before the row above it",
    )


def bad(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def lines(*rows: dict[str, object]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def without(row: dict[str, object], key: str) -> dict[str, object]:
    return {name: value for name, value in row.items() if name != key}


M0, M1, M2 = MOONCAKE
O0, O1ST = O1
HUGE = "column 'completion_tokens' is 1000"


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        # Azure
        ("a.csv", bad(AZURE, "396", "many"), "row 2 (line 3), column 'ContextTokens' is 'many'"),
        ("a.csv", bad(AZURE, "109", "-1"), "row 2 (line 3), column 'GeneratedTokens' is '-1'"),
        ("a.csv", bad(AZURE, "374", "-9"), "row 1 (line 2), column 'ContextTokens' is '-9'"),
        ("a.csv", bad(AZURE, "109", "1.5"), "row 2 (line 3), column 'GeneratedTokens' is '1.5'"),
        ("a.csv", bad(AZURE, "109", ""), "row 2 (line 3), column 'GeneratedTokens' is missing"),
        ("a.csv", bad(AZURE, "109", "0"), "row 2 (line 3), column 'GeneratedTokens' is '0'"),
        (
            "a.csv",
            bad(AZURE, "2023-11-16 18:15:50", "noon"),
            "row 2 (line 3), column 'TIMESTAMP' is 'noon.9951690'; it must be a time such as 2023",
        ),
        (
            "a.csv",
            bad(AZURE, ",GeneratedTokens", ""),
            "row 1 (line 2) has 3 cells for 2 columns, the last of which is 'ContextTokens'",
        ),
        (
            "a.csv",
            bad(AZURE, "GeneratedTokens", "Generated"),
            "for a trace in the Azure LLM inference format it lacks GeneratedTokens; known formats",
        ),
        ("a.csv", AZURE + "\n" + AZURE.splitlines()[1], "row 4 (line 5), column 'ContextTokens'"),
        ("a.csv", "\n".join(AZURE.splitlines()[:1]), "has no rows"),
        # BurstGPT
        ("b.csv", bad(BURST, "472", "-472"), "row 1 (line 2), column 'Request tokens' is '-472'"),
        ("b.csv", bad(BURST, ",230,", ",x,"), "row 2 (line 3), column 'Response tokens' is 'x'"),
        ("b.csv", bad(BURST, "\n45,", "\n-45,"), "row 2 (line 3), column 'Timestamp' is '-45'"),
        (
            "b.csv",
            bad(BURST, "Response tokens", "Response"),
            "for a trace in the BurstGPT format it lacks Response tokens",
        ),
        ("b.csv", bad(bad(BURST, ",18,", ",0,"), ",230,", ",0,"), "only failed requests"),
        # Mooncake
        ("m.jsonl", "{}\nnonsense\n", "line 2 is not JSON"),
        (
            "m.jsonl",
            lines(M0) + "\n" + lines(without(M1, "output_length")),
            "row 2 (line 3), column 'output_length' is missing",
        ),
        (
            "m.jsonl",
            lines(M0, {**M1, "input_length": -7}),
            "row 2 (line 2), column 'input_length' is -7; it must be a whole number of tokens",
        ),
        (
            "m.jsonl",
            lines(M0, M1, {**M2, "timestamp": "3000"}),
            "row 3 (line 3), column 'timestamp' is '3000'",
        ),
        (
            "m.jsonl",
            lines(without(M0, "timestamp")),
            "for a trace in the Mooncake format it lacks timestamp",
        ),
        (
            "m.jsonl",
            lines({**M0, "hash_ids": [1, "x"]}),
            "row 1 (line 1), column 'hash_ids' is [1, 'x']",
        ),
        (
            "m.jsonl",
            lines({**M0, "hash_ids": [1, -2]}),
            "row 1 (line 1), column 'hash_ids' is [1, -2]",
        ),
        (
            "m.jsonl",
            lines({**M0, "hash_ids": [1 << 50]}),
            "a list of whole numbers from 0",
        ),
        ("m.jsonl", "", "has no rows"),
        # ShareGPT-o1
        ("m.json", "[1]", "row 1 is 1; it must be a JSON object"),
        (
            "m.json",
            json.dumps([O0, without(O1ST, "completion_tokens")]),
            "row 2, column 'completion_tokens' is missing",
        ),
        (
            "m.json",
            json.dumps([O0, {**O1ST, "prompt_tokens": "4"}]),
            "row 2, column 'prompt_tokens' is '4'",
        ),
        (
            "m.json",
            json.dumps([O0, {**O1ST, "completion_tokens": -976}]),
            "row 2, column 'completion_tokens' is -976",
        ),
        (
            "m.json",
            json.dumps([without(O0, "completion_tokens")]),
            "m.json: has the columns prompt_tokens; for a trace in the ShareGPT-o1 format it lacks",
        ),
        ("m.json", "[{]", "is not a JSON list"),
        # plain
        ("p.csv", bad(PLAIN, "11,", "nan,"), "row 2 (line 3), column 'arrival_s' is 'nan'"),
        ("p.csv", bad(PLAIN, "11,", "-11,"), "row 2 (line 3), column 'arrival_s' is '-11'"),
        ("p.csv", bad(PLAIN, ",5,", ",-5,"), "row 2 (line 3), column 'prompt_tokens' is '-5'"),
        ("p.csv", bad(PLAIN, ",5,6", ",5"), "row 2 (line 3), column 'output_tokens' is missing"),
        ("p.csv", bad(PLAIN, ",5,6", ",5,6,7"), "row 2 (line 3) has 4 cells for 3 columns"),
        (
            "p.csv",
            bad(PLAIN, "arrival_s", "output_tokens"),
            "line 1 names the column 'output_tokens' twice",
        ),
        (
            "p.csv",
            bad(PLAIN, ",output_tokens", ",output"),
            "line 1 has the columns arrival_s, prompt_tokens, output; for a trace in the",
        ),
        ("p.csv", "a,b\n1,2\n", "has the columns a, b; known formats are Azure"),
        (
            "p.csv",
            'prompt_tokens,output_tokens,x\n1,2,"a\nb"\n3,x,4\n',
            "row 2 (line 4), column 'output_tokens' is 'x'",
        ),
        (
            "p.csv",
            'prompt_tokens,output_tokens,"x\ny"\r\n1,2,"a\r\nb"\r\n\r\n3,x,4\r\n',
            "row 2 (line 5), column 'prompt_tokens' is missing",
        ),
        (
            "p.csv",
            'prompt_tokens,output_tokens,x\n1,2,"a\nb"\n3,4,5,6\n',
            "row 2 (line 4) has 4 cells for 3 columns, the last of which is 'x'",
        ),
        (
            "p.csv",
            f'prompt_tokens,output_tokens,x\n1,2,"{"a" * 200_000}"\n3,x,4\n',
            "row 2, column 'output_tokens' is 'x'",  # a cell too long for the csv module
        ),
        # numbers beyond a float
        ("m.json", json.dumps([O0, {**O1ST, "completion_tokens": 10**400}]), f"row 2, {HUGE}"),
        ("m.jsonl", lines(O0, {**O1ST, "completion_tokens": 10**400}), f"row 2 (line 2), {HUGE}"),
        (
            "m.jsonl",
            lines(M0, {**M1, "timestamp": 10**400}),
            "row 2 (line 2), column 'timestamp' is 1000",
        ),
        # nested too deep
        ("m.json", "[" * 200_000, "is not a JSON list: maximum recursion depth"),
        ("p.csv", "", "is not a readable table"),
    ],
)
def test_a_bad_file_is_refused_by_file_row_and_column(
    tmp_path: Path, name: str, text: str, message: str, zipped: str
) -> None:
    path = write(tmp_path, name + zipped, text)
    message = message.replace(f"{name}:", f"{name}{zipped}:")
    with pytest.raises(TraceError, match=re.escape(message)) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.csv", bytes(range(256)) * 4, "line 2 is not CSV: new-line character seen in unquoted"),
        (
            "b.csv",
            PLAIN.encode() + b"1,2,\xff\n",
            "is not a readable table: invalid utf-8 sequence",
        ),
        ("b.json", bytes(range(256)) * 4, "line 1 is not JSON"),
        ("b.json", b'[{"prompt_tokens": "\xff"}]', "is not a JSON list: 'utf-8' codec"),
        ("b.jsonl", b'{"prompt_tokens": "\xff"}', "line 1 is not JSON: 'utf-8' codec"),
    ],
)
def test_a_binary_file_is_refused_in_words(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError, match=re.escape(f"{path}: {message}")):
        load(path)


@pytest.mark.parametrize("name", ["p.csv.gz", "m.jsonl.gz"])
def test_a_cut_gzip_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(PLAIN.encode() * 50)[:-9])
    with pytest.raises(TraceError, match=name):
        load(path)


def test_a_bad_parquet_file_is_refused_by_row(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pl.DataFrame({"prompt_tokens": [3, -5], "output_tokens": [4, 6]}).write_parquet(path)
    with pytest.raises(TraceError, match=r"p.parquet: row 2, column 'prompt_tokens' is -5"):
        load(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(TraceError, match="is not a readable table"):
        load(path)


def test_requests_know_their_cells(tmp_path: Path) -> None:
    """Also when they were put in order, and when failed ones were left out before them."""
    made = load(write(tmp_path, "b.csv", bad(BURST, "\n45,", "\n3,")))
    assert made.origin is not None
    assert made.origin.cell(0, made.origin.output).endswith(
        "b.csv: row 2 (line 3), column 'Response tokens'"
    )
    assert made.take([1]).origin.cell(0, "x").endswith("row 1 (line 2), column 'x'")


@pytest.mark.parametrize(
    ("name", "rows", "prompt", "output"),
    [("azure2023_conv.csv.gz", 19366, 1155, 211), ("sharegpt_o1_lengths.csv.gz", 1981, 381, 2160)],
)
def test_real_traces(name: str, rows: int, prompt: float, output: float) -> None:
    path = Path(__file__).parents[3] / "shared" / "traces" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    made = load(path)
    assert len(made) == rows
    assert made.prompt.mean() == pytest.approx(prompt, rel=0.01)
    assert made.output.mean() == pytest.approx(output, rel=0.01)
    assert made.arrival is None or (np.diff(made.arrival) >= 0).all()
