"""Train Penstock's embedded demo model from Debian packages on a plain CPU.

See README.md beside this file for the packages, the command and what it printed.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import corpus
import numpy as np
import numpy.typing as npt
import torch
from export import export
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from vocabulary import BOS, EOS, PAD, render, train_tokenizer

SECONDS_BETWEEN_CHECKPOINTS = 180
Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that decides the weights, apart from the texts."""

    seed: int = 1
    vocab_size: int = 4096
    total_tokens: int = 12_000_000
    batch_tokens: int = 8192
    row_tokens: int = 512
    # The last share of the training sees longer rows, so that long contexts stay in distribution.
    long_row_tokens: int = 2048
    long_share: float = 0.12
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    final_lr: float = 0.03
    held_out_batches: int = 5
    favourites: int = 12
    rate_scale: float = 1.0


def model_config(plan: Plan, tokenizer: Tokenizer) -> LlamaConfig:
    """Return the shape of the model: 5.6 M parameters, grouped-query attention, tied embedding."""
    return LlamaConfig(
        vocab_size=plan.vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def prepare(
    work: Path, plan: Plan, elder: Path | None
) -> tuple[Tokenizer, list[Tokens], list[Tokens]]:
    """Build corpus and tokenizer; return it with the train and the held-out conversations.

    An ``elder`` model that is to be trained further lends its tokenizer.
    """
    path = work / "corpus.jsonl"
    for kind, count in corpus.build(path, plan.seed, plan.favourites).items():
        print(f"{kind}: {count} dialogues")
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    training = [r["messages"] for r in records if not r["held_out"]]
    if elder:
        tokenizer: Tokenizer = Tokenizer.from_file(str(elder / "tokenizer.json"))
    else:
        texts = (message["content"] for messages in training for message in messages)
        tokenizer = train_tokenizer(texts, plan.vocab_size)
    sides: dict[bool, list[Tokens]] = {False: [], True: []}
    for record in records:
        ids = tokenizer.encode(render(record["messages"]), add_special_tokens=False).ids
        sides[record["held_out"]].append(np.array(ids, dtype=np.uint16))
    print(f"tokens: {sum(map(len, sides[False]))} train, {sum(map(len, sides[True]))} held out")
    return tokenizer, sides[False], sides[True]


def batches(documents: list[Tokens], plan: Plan) -> Iterator[torch.Tensor]:
    """Yield flat batches for ever; each epoch packs the documents in a new order."""
    rng = np.random.default_rng(plan.seed)
    pending: Tokens = np.empty(0, dtype=np.uint16)
    while True:
        order = rng.permutation(len(documents))
        pending = np.concatenate([pending, *(documents[at] for at in order)])
        while len(pending) >= plan.batch_tokens:
            taken, pending = pending[: plan.batch_tokens], pending[plan.batch_tokens :]
            yield torch.from_numpy(taken.astype(np.int64))


def learning_rate(progress: float, plan: Plan) -> float:
    """Return the factor on both learning rates: linear warm-up, then a cosine to its floor."""
    if progress < plan.warmup:
        return progress / plan.warmup
    angle = math.pi * (progress - plan.warmup) / (1 - plan.warmup)
    return plan.final_lr + (1 - plan.final_lr) * 0.5 * (1 + math.cos(min(angle, math.pi)))


def optimizers(model: LlamaForCausalLM, plan: Plan) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, which it trains in fewer tokens; AdamW for the rest."""
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        is_vector = parameter.ndim == 1
        (others if is_vector or "embed" in name else matrices).append(parameter)
    muon = torch.optim.Muon(
        matrices,
        lr=plan.muon_lr,
        weight_decay=plan.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adam = torch.optim.AdamW(others, lr=plan.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def next_token_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the rows' next tokens."""
    hidden = model.model(rows, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1]).float()
    return functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def held_out_loss(model: LlamaForCausalLM, documents: list[Tokens], plan: Plan) -> float:
    """Return the mean loss on a few packed batches of conversations that training never sees."""
    joined = np.concatenate(documents).astype(np.int64)
    count = min(plan.held_out_batches, len(joined) // plan.batch_tokens)
    rows = torch.from_numpy(joined[: count * plan.batch_tokens]).view(count, -1, plan.row_tokens)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return sum(next_token_loss(model, batch).item() for batch in rows) / count


def train(
    model: LlamaForCausalLM,
    plan: Plan,
    data: Iterator[torch.Tensor],
    save: Callable[[int, float], None],
    minutes: float,
) -> None:
    """Run the schedule; with a time limit, hurry the schedule so that it still completes."""
    started, steps = time.monotonic(), plan.total_tokens // plan.batch_tokens
    parameters = list(model.parameters())
    chosen = optimizers(model, plan)
    base = [[group["lr"] for group in each.param_groups] for each in chosen]
    loss_of = torch.compile(next_token_loss, dynamic=False)
    average, saved = 0.0, started
    for step in range(steps):
        elapsed = (time.monotonic() - started) / 60
        progress = max((step + 1) / steps, elapsed / minutes)
        factor = plan.rate_scale * learning_rate(progress, plan)
        for each, rates in zip(chosen, base, strict=True):
            for group, rate in zip(each.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        long = progress > 1 - plan.long_share
        rows = next(data).view(-1, plan.long_row_tokens if long else plan.row_tokens)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for each in chosen:
            each.step()
            each.zero_grad(set_to_none=True)
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if step % 20 == 0:
            print(f"step {step}/{steps} loss {average:.3f} minutes {elapsed:.1f}", flush=True)
        if progress >= 1 or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            saved = time.monotonic()
            save(step + 1, average)
        if progress >= 1:
            return


def main() -> None:
    """Parse the command line, train, and leave the model in ``WORK/model``."""
    defaults = Plan()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--tokens", type=int, default=defaults.total_tokens)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--max-minutes", type=float, default=math.inf)
    parser.add_argument("--continue-from", type=Path, help="a model folder to train further")
    parser.add_argument("--rate-scale", type=float, default=defaults.rate_scale)
    parser.add_argument("--favourites", type=int, default=defaults.favourites)
    args = parser.parse_args()
    plan = Plan(
        seed=args.seed,
        total_tokens=args.tokens,
        rate_scale=args.rate_scale,
        favourites=args.favourites,
    )
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer, training, held_out = prepare(args.work, plan, args.continue_from)
    torch.manual_seed(plan.seed)
    if args.continue_from:
        model = LlamaForCausalLM.from_pretrained(args.continue_from, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(model_config(plan, tokenizer))
    print(f"parameters: {sum(p.numel() for p in model.parameters())}")

    def save(step: int, loss: float) -> None:
        measured = held_out_loss(model, held_out, plan)
        seen = step * plan.batch_tokens
        print(f"saved at {seen} tokens: train {loss:.3f}, held out {measured:.3f}", flush=True)
        export(model, tokenizer, args.work / "model")

    train(model, plan, batches(training, plan), save, args.max_minutes)


if __name__ == "__main__":
    main()
