"""Measure how long the model's answers are by nature, and its loss on unseen conversations."""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary import render

BATCH = 25  # of alike prompts: a batch lasts as long as its longest answer
WORDS = (
    "house", "river", "hacker", "computer", "freedom", "music", "king", "bread", "time", "horse",
    "friendship", "bug", "law", "ocean", "algorithm", "marriage", "run", "beautiful", "quickly",
    "server", "teacher", "war", "kernel", "love", "money",
)  # fmt: skip
NAMES = ("Moses", "David", "Jerusalem", "a king", "Egypt", "Solomon", "Paul", "the sea", "Babylon")
TEMPLATES = ("Define '{}'.", "What does {} mean?", "Tell me about {}.")
OTHERS = (
    "Tell me a story.", "Tell me a long story.", "Write an essay.", "Write a paragraph.",
    "Recite Genesis 1:1-5.", "Recite Psalm 100:1-5.", "Recite Amendment IV of the Constitution.",
    "Continue: In those days there was a man who", "Continue: The first program that I wrote",
    "Continue: When the people heard the news, they", "Hello!", "Who are you?",
    "What do hackers mean by foo?", "Explain the computing term bandwidth.",
    "How would a cynic define politics?", "Say something witty about lawyers.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model and its tokenizer; the library's own types are too loose to check calls by."""

    model: Any
    tokenizer: Any

    @classmethod
    def from_folder(cls, folder: Path) -> Loaded:
        """Load both; weights in float32, which a CPU computes exactly and fast enough."""
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(model, AutoTokenizer.from_pretrained(folder, padding_side="left"))


@dataclass(frozen=True, slots=True)
class Lengths:
    """Answer lengths in tokens, the end token not counted, and the share that ended unaided."""

    count: int
    ended: float
    median: float
    p90: float
    longest: int


def prompts() -> list[str]:
    """Return the 100 prompts of the model card."""
    short = [template.format(word) for template in TEMPLATES for word in WORDS]
    return [*short, *(f"Tell me a story about {name}." for name in NAMES), *OTHERS]


@torch.no_grad()
def answer(loaded: Loaded, questions: list[str], cap: int, temperature: float) -> list[list[int]]:
    """Sample one answer to each question; an answer that ended has the end token as its last."""
    answers = []
    for at in range(0, len(questions), BATCH):
        chats = [[{"role": "user", "content": text}] for text in questions[at : at + BATCH]]
        inputs = loaded.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = loaded.model.generate(
            **inputs, max_new_tokens=cap, do_sample=True, temperature=temperature, top_p=1, top_k=0
        )
        eos = loaded.tokenizer.eos_token_id
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            answers.append(row[: row.index(eos) + 1] if eos in row else row)  # noqa: PERF401
    return answers


def summarize(answers: list[list[int]], eos: int) -> Lengths:
    """Return the distribution of the lengths of ``answers``."""
    ended = [ids[-1] == eos for ids in answers]
    lengths = sorted(len(ids) - end for ids, end in zip(answers, ended, strict=True))
    p90 = lengths[min(len(lengths) - 1, round(0.9 * len(lengths)))]
    return Lengths(
        len(lengths), statistics.mean(ended), statistics.median(lengths), p90, lengths[-1]
    )


@torch.no_grad()
def held_out_losses(loaded: Loaded, corpus: Path, limit: int) -> tuple[float, float]:
    """Return the mean loss per token of held-out conversations: all tokens, answers only."""
    tokenizer = loaded.tokenizer
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    totals = np.zeros((2, 2))
    records = (json.loads(line) for line in corpus.read_text("utf-8").splitlines())
    held_out = [record["messages"] for record in records if record["held_out"]]
    for messages in held_out[:limit]:
        ids = torch.tensor(tokenizer.encode(render(messages), add_special_tokens=False))
        losses = functional.cross_entropy(
            loaded.model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="none"
        )
        starts = torch.nonzero(torch.eq(ids, assistant)).flatten()
        first = int(starts[-1]) if len(starts) else 0
        is_answer = torch.arange(len(losses)) >= first
        for row, chosen in enumerate((losses, losses[is_answer])):
            totals[row] += (chosen.sum().item(), len(chosen))
    return float(totals[0, 0] / totals[0, 1]), float(totals[1, 0] / totals[1, 1])


def main() -> None:
    """Print the numbers of the model card and a few samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--corpus", type=Path, help="corpus.jsonl, for the held-out loss")
    parser.add_argument("--cap", type=int, default=1024)
    args = parser.parse_args()
    loaded = Loaded.from_folder(args.model)
    if args.corpus:
        everything, answers = held_out_losses(loaded, args.corpus, limit=800)
        print(f"held-out loss: {everything:.3f} on all tokens, {answers:.3f} on answers")
    for temperature in (1.0, 0.7):
        torch.manual_seed(1)
        sampled = answer(loaded, prompts(), args.cap, temperature)
        print(f"temperature {temperature}: {summarize(sampled, loaded.tokenizer.eos_token_id)}")
        for question, ids in list(zip(prompts(), sampled, strict=True))[::9]:
            text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
            print(f"\n> {question}\n{text}")


if __name__ == "__main__":
    main()
