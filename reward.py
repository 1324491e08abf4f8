"""Stage 2, the reward model: human judgements -> r(x, y), a score for any response y to a prompt x.

    python reward.py                                                       # after python sft.py
    python reward.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --lr 2e-5  # your own

Three ways to judge, three losses, all on the score that a linear head reads at the last token:

    pointwise  {"prompt", "response", "score"}    L = E[(r(x,y) - score)^2]
    pairwise   {"prompt", "chosen", "rejected"}   L = -E[log sigma(r(x,y+) - r(x,y-))]
    listwise   {"prompt", "responses", "ranks"}   the same, averaged over all C(K,2) pairs

As in InstructGPT, the K responses of a ranking are forwarded once each, not once a pair, and the
saved model is centred: the mean score of the best training responses is stored in its config
(`reward_mean`) and subtracted wherever this project scores. Held-out `accuracy` is the share of
response pairs that the model orders as the judge did; a tie counts half.
"""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

import common

LOSSES = Literal["pairwise", "pointwise", "listwise"]
EMBEDDED_DATA = dict(pointwise="scores.jsonl", pairwise="pairs.jsonl", listwise="rankings.jsonl")


# fmt: off
@dataclass
class Config:
    # model and data
    model: str = HfArg(default="out/sft", help="SFT model: folder or hub name")
    loss: LOSSES = HfArg(default="pairwise", help="what the judgements are")
    data: str = HfArg(default="", help="judgements, JSONL; empty: embedded, to fit --loss")
    eval_data: str = HfArg(default="", help="held-out ones; empty: a part of --data")
    max_length: int = HfArg(default=1024, help="tokens; longer ones are left out")
    # optimisation
    epochs: float = HfArg(default=1.0, help="passes over the data")
    steps: int = HfArg(default=0, help="cap on the optimiser steps; 0: none")
    batch_size: int = HfArg(default=32, help="judgements per optimiser step")
    lr: float = HfArg(default=2e-3, help="peak rate; about 2e-5 for a real model")
    warmup: int = HfArg(default=10, help="optimiser steps of linear warm-up")
    lr_schedule: Literal["linear", "constant"] = HfArg(default="linear", help="after the warm-up")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping, L2 norm")
    micro_tokens: int = HfArg(default=0, help="padded tokens a forward; 0: 8192 CUDA, 512 CPU")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower")
    shard: bool = HfArg(default=False, help="torchrun: each process keeps a part of the weights")
    # LoRA
    lora_rank: int = HfArg(default=0, help="train adapters of this rank, not the weights; 0: off")
    lora_alpha: float = HfArg(default=32.0, help="the adapters count alpha / rank times")
    merge: bool = HfArg(default=False, help="save with the adapter merged, not the adapter alone")
    # the run
    out: str = HfArg(default="out/reward", help="folder of the run")
    resume: bool = HfArg(default=False, help="continue the run in --out")
    overwrite: bool = HfArg(default=False, help="replace the run in --out")
    save_every: int = HfArg(default=200, help="steps between checkpoints; 0: only when stopped")
    keep: int = HfArg(default=1, help="checkpoints to keep")
    tensorboard: bool = HfArg(default=False, help="log there too; pip install tensorboard")
    wandb: bool = HfArg(default=False, help="log to Weights & Biases too; pip install wandb")
    quiet: bool = HfArg(default=False, help="print nothing but errors")
    seed: int = HfArg(default=0, help="of the score head and the order of the data")
    device: str = HfArg(default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compile: Literal["auto", "on", "off"] = HfArg(default="auto", help="auto: large and on CUDA")
# fmt: on


# ----------------------------------------------------------------------------------------------
# The three losses of the deck


def pointwise_loss(rewards, scores):
    """Squared error against direct scores: (B,), (B,) -> scalar."""
    return ((rewards - scores) ** 2).mean()


def pairwise_loss(chosen, rejected):
    """Bradley-Terry: -log sigma(r+ - r-), (B,), (B,) -> scalar."""
    return -F.logsigmoid(chosen - rejected).mean()


def listwise_loss(rewards, ranks, mask=None):
    """Bradley-Terry over all pairs of each ranking (InstructGPT eq. 1): (B, K), (B, K) -> scalar.

    Rank 1 is best, a tie is no pair, and `mask` (B, K) is 0 where a list has fewer than K
    responses. The mean is over a list's pairs first, then over the lists that have a pair, so that
    long lists do not outweigh short ones.
    """
    better = (ranks[:, :, None] < ranks[:, None, :]).float()  # (B, K, K): i beats j
    if mask is not None:
        better = better * mask[:, :, None] * mask[:, None, :]
    margin = rewards[:, :, None] - rewards[:, None, :]
    pairs = better.sum((1, 2))  # (B,)
    per_list = -(F.logsigmoid(margin) * better).sum((1, 2)) / pairs.clamp(min=1)
    return per_list.sum() / (pairs > 0).sum().clamp(min=1)


# ----------------------------------------------------------------------------------------------
# Judgements: whatever the form, K responses to one prompt with their ranks, or one with its score


@dataclass
class Judgement:
    examples: list  # K of (ids, mask): prompt + response
    targets: list  # K ranks, 1 is best; for a point, its score
    form: str  # pointwise | pairwise | listwise


def encode(tokenizer, row):
    """One line of data as a Judgement. Raises common.UserError naming the line and the key."""
    where = row["where"]
    if "chosen" in row:
        prompt, *responses = common.split_pair(row)
        targets, form = [1, 2], "pairwise"
    elif "responses" in row:
        prompt, responses, targets = common.field(row, "prompt"), row["responses"], row.get("ranks")
        form = "listwise"
        whole = isinstance(targets, list) and all(type(r) is int and r >= 1 for r in targets)
        if not isinstance(responses, list) or len(responses) < 2:
            raise common.UserError(f'{where}: "responses" must be a list of at least two')
        if not whole or len(targets) != len(responses):
            raise common.UserError(
                f'{where}: "ranks" must be {len(responses)} whole numbers from 1, one a response'
            )
        responses = [common.field(dict(response=r, where=where), "response") for r in responses]
    else:
        prompt, responses = common.field(row, "prompt"), [common.field(row, "response")]
        targets, form = [row.get("score")], "pointwise"
        if type(targets[0]) not in (int, float) or not math.isfinite(targets[0]):
            raise common.UserError(f'{where}: "score" must be a finite number')
    return Judgement(common.encode(tokenizer, prompt, responses, where), targets, form)


def load_judgements(cfg, tokenizer, max_length):
    """Training and held-out judgements; the training ones must fit --loss."""
    data = cfg.data or str(common.EMBEDDED / EMBEDDED_DATA[cfg.loss])
    rows = common.read_split(data, cfg.eval_data, "eval_pairs.jsonl")
    splits = []
    for part, form in zip(rows, (cfg.loss, None)):
        judgements = [encode(tokenizer, row) for row in part]
        form = form or judgements[0].form  # held-out data may have another form, but one
        for row, judgement in zip(part, judgements):
            if judgement.form != form:
                found = f"{row['where']}: {judgement.form} data"
                raise common.UserError(f"{found}, expected {form} (--loss {cfg.loss})")
        # A ranking of ties orders nothing.
        judgements = [j for j in judgements if j.form == "pointwise" or len(set(j.targets)) > 1]
        if not judgements:
            file = part[0]["where"].rpartition(":")[0]
            raise common.UserError(f"{file}: every ranking is a tie, so there is nothing to learn")
        longest = lambda judgement: max(len(ids) for ids, _ in judgement.examples)  # noqa: E731
        splits.append(common.keep_short(judgements, max_length, longest, "judgements"))
    return splits


def forward(model, judgements):
    """Score every response of B judgements: rewards, targets and mask, (B, K), K the longest."""
    examples = [example for judgement in judgements for example in judgement.examples]
    batch = common.collate(examples, range(len(examples)), model.device)
    scores = common.sequence_scores(model, batch)  # (B * K,), or fewer where lists are short
    numbers = iter(range(len(examples)))
    index = [[next(numbers) for _ in j.targets] for j in judgements]
    index = common.pad_right(index, model.device)  # (B, K)
    targets = common.pad_right([j.targets for j in judgements], model.device).float()
    mask = common.pad_right([[1.0] * len(j.targets) for j in judgements], model.device)
    return scores[index] * mask, targets, mask


def reward_loss(form, rewards, targets, mask):
    if form == "pointwise":
        return pointwise_loss(rewards[:, 0], targets[:, 0])
    if form == "pairwise":
        return pairwise_loss(rewards[:, 0], rewards[:, 1])
    return listwise_loss(rewards, targets, mask)


def micro_batches(judgements, micro_tokens, rows=None):
    """Rows whose padded tokens fit the budget; a judgement's loss needs its responses together."""
    rows = range(len(judgements)) if rows is None else rows
    tokens = {}
    for row in rows:
        lengths = [len(ids) for ids, _ in judgements[row].examples]
        tokens[row] = max(lengths) * len(lengths)
    return common.micro_batches(tokens, micro_tokens, rows)


# ----------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, judgements, micro_tokens):
    """Held-out accuracy with its 95% interval, and the loss of the data's own form."""
    n, form, loss = len(judgements), judgements[0].form, 0.0
    lists = []  # of (reward, rank)
    for rows in micro_batches(judgements, micro_tokens):
        part = [judgements[row] for row in rows]
        rewards, targets, mask = forward(model, part)
        loss += reward_loss(form, rewards, targets, mask).item() * len(part)
        lists += [list(zip(own, j.targets)) for own, j in zip(rewards.tolist(), part)]
    if form == "pointwise":  # one list of all points; a higher score is better, a lower rank is
        lists = [[(reward, -score) for [(reward, score)] in lists]]
    right, pairs = map(sum, zip(*map(ordered_right, lists)))
    accuracy = right / pairs if pairs else None  # a single point orders nothing
    interval = wilson_interval(accuracy, n) if pairs else None
    return dict(accuracy=accuracy, interval=interval, loss=loss / n, n=n)


def ordered_right(items):
    """[(reward, rank), ...] -> (pairs in which the better rank has the higher reward, pairs);
    equal rewards count half.
    """
    right = pairs = 0
    for (reward_a, rank_a), (reward_b, rank_b) in combinations(items, 2):
        if rank_a != rank_b:
            pairs += 1
            right += 0.5 if reward_a == reward_b else (reward_a > reward_b) == (rank_a < rank_b)
    return right, pairs


def wilson_interval(p, n, z=1.96):
    """95% interval of a proportion `p` seen in `n` independent lines (Wilson 1927)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def new_reward_model(path, tokenizer, device, seed, dtype=torch.float32):
    """A causal LM's backbone with a fresh score head.

    The tokenizer gets a pad token that is not EOS: plain transformers pools at the last token that
    is not pad, which must be EOS.
    """
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        special = (tokenizer.unk_token, tokenizer.bos_token, *tokenizer.all_special_tokens)
        spare = [token for token in special if token not in (None, tokenizer.eos_token)]
        if not spare:
            raise common.UserError(f"{path}: no special token but EOS, so none is left to pad with")
        tokenizer.pad_token = spare[0]
    model = common.load_backbone(path, device, dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    hidden = model.score.float().weight.shape[1]
    generator = common.make_generator("cpu", seed, "head")
    # N(0, 1 / (d + 1)), as in Ziegler et al. 2019: scores start near 0 whatever the width.
    head = torch.randn(1, hidden, generator=generator) / math.sqrt(hidden + 1)
    model.score.weight.data.copy_(head)
    model.scores_tokens = True
    return model


@torch.no_grad()
def mean_of_best(model, judgements, micro_tokens):
    """Mean score of the best responses: the zero, as InstructGPT's demonstrations are."""
    total = 0.0
    for rows in micro_batches(judgements, micro_tokens):
        rewards, targets, mask = forward(model, [judgements[row] for row in rows])
        best = targets.masked_fill(mask == 0, torch.inf).argmin(1)  # (B,): a point has one
        total += rewards.gather(1, best[:, None]).sum().item()
    return total / len(judgements)


def check(cfg):
    common.require(cfg, "epochs", "steps", max_length=(1, math.inf))


def main(cfg):
    check(cfg)
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)
    tokenizer = common.load_tokenizer(cfg.model)
    dtype = common.trained_dtype(cfg, device)
    model = new_reward_model(cfg.model, tokenizer, device, cfg.seed, dtype)
    longest = min(cfg.max_length, common.context_length(model))
    judgements, eval_judgements = load_judgements(cfg, tokenizer, longest)

    optimizer = common.make_trainable(model, cfg, cfg.lr)
    run.begin(model=model, optimizer=optimizer)

    micro_tokens = common.token_budget(cfg, device)
    steps = common.total_steps(cfg, len(judgements))
    print(
        f"Reward model: {model.num_parameters() / 1e6:.1f}M parameters on {device}, {cfg.loss}, "
        f"{len(judgements)} judgements, {steps} steps of {cfg.batch_size}"
    )
    common.print_memory_plan(device, cfg, [model])

    for step in run.steps(steps):
        rows = common.epoch_batch(len(judgements), cfg.batch_size, step, cfg.seed)
        loss = torch.zeros((), device=device)
        for part in micro_batches(judgements, micro_tokens, common.share(rows)):
            rewards, targets, mask = forward(model, [judgements[row] for row in part])
            # The mean over the batch, whatever the micro-batches: a judgement weighs 1 /
            # batch_size.
            micro_loss = reward_loss(cfg.loss, rewards, targets, mask) * len(part) / len(rows)
            micro_loss.backward()
            loss += micro_loss.detach()

        lr = common.set_lr(optimizer, cfg.lr, step, steps, cfg.warmup, cfg.lr_schedule)
        ids = (ids for row in rows for ids, _ in judgements[row].examples)
        stats = common.optimizer_step(model, optimizer, dict(loss=loss), ids, cfg)
        run.log(("loss", "lr"), lr=lr, **stats)

    model.config.reward_mean = mean_of_best(model, judgements[:500], micro_tokens)
    results = evaluate(model, eval_judgements, micro_tokens)
    accuracy = "no pairs to order"
    if results["accuracy"] is not None:
        low, high = results["interval"]
        accuracy = f"{results['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%})"
    print(f"held-out accuracy {accuracy}, loss {results['loss']:.3f}, n = {results['n']}")
    run.finish(model, tokenizer, results)


if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
