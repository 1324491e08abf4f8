"""Stage 3', rejection sampling: the reward model picks among N answers, for SFT or DPO data.

    python rejection_sample.py                                     # best-of-8, the embedded world
    python rejection_sample.py --method rso --rso_beta 2           # statistical rejection sampling
    python rejection_sample.py --pairs data/pairs.jsonl            # DPO on human pairs, no sampling
    python rejection_sample.py --policy out/ppo --prompt "..."     # 8 answers, best first

    1 sample      the policy answers each prompt N times, the reward model scores every answer
    2 select      best_of_n  the best answer -> sft.jsonl; best against worst -> dpo.jsonl
                  rso        each answer is accepted with probability exp((r - r_max) / rso_beta),
                             so that the accepted ones follow pi_sft(y|x) exp(r(x,y) / rso_beta);
                             ranked, they make pairs -> dpo.jsonl   (Liu et al., arXiv 2309.06657)
    3 preference  on pairs (y+, y-), theirs or --pairs, against the frozen policy it started from:
                      h = log pi(y+|x)/pi_ref(y+|x) - log pi(y-|x)/pi_ref(y-|x)
                      sigmoid  -log sigma(beta h)           DPO (Rafailov et al. 2023, eq. 7)
                      hinge    max(0, 1 - beta h)           SLiC, as RSO normalises it
                      ipo      (h - 1 / (2 beta))^2         IPO (Azar et al. 2023, eq. 17)

Best-of-N itself is a policy too: its KL to the policy it samples from is at most
log N - (N-1)/N, less where answers tie. So all of them have a place on one axis of reward
against KL, beside PPO.

Where this departs from the papers:
    1 An answer cut at the length limit pays --missing_eos_penalty, as in ppo.py, and only ever
      loses: it is in no sft.jsonl, and in dpo.jsonl only as the rejected one.
    2 RSO visits the answers in random order, so its law does not depend on how they are listed.
    3 Answers of equal reward, such as the same one twice, make no pair.
    4 Reference log-probs are computed once, by the policy before it trains: h starts at 0.
"""

import json
import math
import sys
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers.hf_argparser import HfArg

import common

LOSSES = Literal["sigmoid", "hinge", "ipo", "none"]
RANKS = Literal["first_round", "tournament"]


# fmt: off
@dataclass
class Config:
    # models and data
    policy: str = HfArg(default="out/sft", help="where it starts; out/sft is made if missing")
    reward: str = HfArg(default="", help="reward model; empty: out/reward, or none with --pairs")
    reward_fn: str = HfArg(default="", help="instead: file.py:function(prompts, responses)")
    data: str = HfArg(default=str(common.EMBEDDED / "prompts.jsonl"), help="prompts, JSONL")
    pairs: str = HfArg(default="", help="preference pairs, JSONL, instead of --data and sampling")
    eval_data: str = HfArg(default="", help="held-out prompts or pairs; empty: a part of the data")
    gold_fn: str = HfArg(default="", help="file.py:function that judges answers in evaluation")
    max_prompt_tokens: int = HfArg(default=512, help="longer prompts are left out")
    prompt: str = HfArg(default="", help="only answer this, on the terminal; -: each line of stdin")
    chat: bool = HfArg(default=False, help="--prompt goes through the chat template")
    # 1 sample
    n: int = HfArg(default=0, help="answers a prompt; 0: 8, with rso 64")
    max_new_tokens: int = HfArg(default=48, help="longest answer, tokens")
    temperature: float = HfArg(default=1.0, help="in sampling and in every log-prob")
    slots: int = HfArg(default=256, help="sequences generated at once")
    # 2 select
    method: Literal["best_of_n", "rso"] = HfArg(default="best_of_n", help="how pairs are chosen")
    missing_eos_penalty: float = HfArg(default=1.0, help="off the score of a cut answer")
    rso_beta: float = HfArg(default=0.5, help="rso: small is greedy, large accepts any")
    num_samples: int = HfArg(default=8, help="rso: answers accepted of the n")
    rank: RANKS = HfArg(default="first_round", help="rso: how the accepted make pairs")
    # 3 preference step
    loss: LOSSES = HfArg(default="sigmoid", help="none: write the data only")
    beta: float = HfArg(default=0.5, help="large stays near the reference; often 0.1")
    epochs: float = HfArg(default=2.0, help="passes over the pairs")
    steps: int = HfArg(default=0, help="cap on the optimiser steps; 0: none")
    batch_size: int = HfArg(default=32, help="pairs per optimiser step")
    lr: float = HfArg(default=5e-4, help="peak rate; about 1e-6 for a real model")
    warmup: int = HfArg(default=5, help="optimiser steps of linear warm-up")
    lr_schedule: Literal["linear", "constant"] = HfArg(default="linear", help="after the warm-up")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping, L2 norm")
    max_length: int = HfArg(default=1024, help="tokens; longer --pairs are left out")
    micro_tokens: int = HfArg(default=0, help="padded tokens a forward; 0: 8192 CUDA, 512 CPU")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower")
    shard: bool = HfArg(default=False, help="torchrun: each process keeps a part of the weights")
    # LoRA
    lora_rank: int = HfArg(default=0, help="train adapters of this rank, not the weights; 0: off")
    lora_alpha: float = HfArg(default=32.0, help="the adapters count alpha / rank times")
    merge: bool = HfArg(default=False, help="save with the adapter merged, not the adapter alone")
    # the run
    out: str = HfArg(default="out/rejection_sample", help="folder of the run")
    resume: bool = HfArg(default=False, help="continue the run in --out")
    overwrite: bool = HfArg(default=False, help="replace the run in --out")
    save_every: int = HfArg(default=200, help="steps between checkpoints; 0: only when stopped")
    keep: int = HfArg(default=1, help="checkpoints to keep")
    tensorboard: bool = HfArg(default=False, help="log there too; pip install tensorboard")
    wandb: bool = HfArg(default=False, help="log to Weights & Biases too; pip install wandb")
    quiet: bool = HfArg(default=False, help="print nothing but errors")
    seed: int = HfArg(default=0, help="of the sampling and the order of the pairs")
    device: str = HfArg(default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compile: Literal["auto", "on", "off"] = HfArg(default="auto", help="auto: large and on CUDA")
# fmt: on


# ----------------------------------------------------------------------------------------------
# Selection and losses: pure functions


def best_of_n(rewards):
    """The best of each row, the first one of equals: (B, N) -> (B,)."""
    return rewards.argmax(-1)


def best_of_n_kl(n):
    """log N - (N-1)/N: at most how far, in nats, best-of-N is from the policy it samples from.
    Exact when no two answers can have the same reward (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def statistical_rejection(rewards, num_samples, beta, rng):
    """Which of N answers RSO accepts (Liu et al. 2023, algorithm 1): `num_samples` indices.

    In rounds, until enough are taken: each answer still there is accepted, and taken away, with
    probability exp((r - r_max) / beta), r_max over those still there when the round begins. So
    every round takes its best one; a small beta takes the best ones, a large one any. `rng` is a
    numpy Generator. Raises ValueError where nothing would be rejected or beta is not positive.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    if not 0 < num_samples < len(rewards):
        raise ValueError(f"num_samples {num_samples}: expected 1 to {len(rewards) - 1}")
    if not beta > 0 or not np.isfinite(rewards).all():
        raise ValueError("expected beta over 0 and finite rewards")
    accepted, left = [], rng.permutation(len(rewards))
    while len(accepted) < num_samples:
        taken = rng.random(len(left)) < np.exp((rewards[left] - rewards[left].max()) / beta)
        accepted += left[taken].tolist()
        left = left[~taken]
    return accepted[:num_samples]


def rank_pairs(rewards, method):
    """Pairs (winner, loser) of N answers by their rewards; equal ones make none.

    "first_round" compares neighbours: rewards [1, 3, 2, 0] give [(1, 0), (2, 3)]. "tournament" lets
    the winners go on to further rounds: here also (1, 2).
    """
    if method not in ("first_round", "tournament"):
        raise ValueError(f"method {method!r}: expected first_round or tournament")
    pairs, players = [], list(range(len(rewards)))
    while len(players) > 1:
        winners = []
        for a, b in zip(players[::2], players[1::2]):
            winner, loser = (a, b) if rewards[a] >= rewards[b] else (b, a)
            winners.append(winner)
            if rewards[winner] > rewards[loser]:
                pairs.append((winner, loser))
        if method == "first_round":
            break
        players = winners + players[len(players) // 2 * 2 :]  # an odd one goes on unplayed
    return pairs


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, loss="sigmoid"):
    """The mean loss of B pairs, from the summed log-probs (B,) of their responses: a scalar."""
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # (B,)
    if loss == "sigmoid":
        return -F.logsigmoid(beta * h).mean()
    if loss == "hinge":
        return (1 - beta * h).relu().mean()
    if loss == "ipo":
        return ((h - 1 / (2 * beta)) ** 2).mean()
    raise ValueError(f"loss {loss!r}: expected sigmoid, hinge or ipo")


# ----------------------------------------------------------------------------------------------
# 1 Sample


def sample_and_score(policy, score, prompts, eos, generator, cfg):
    """N answers to each prompt: dicts of prompt, prompt_ids, responses (token ids), scores, whether
    each ended by itself, and the rewards to choose by: scores less the penalty of those cut.
    """
    ids = [p["ids"] for p in prompts for _ in range(cfg.n)]
    responses = common.generate(
        policy, ids, cfg.max_new_tokens, eos, cfg.temperature, generator=generator, slots=cfg.slots
    )
    # Each different answer is scored once: it is cheaper, and equal answers get equal scores,
    # which padding to other lengths would not promise.
    answers = [(i // cfg.n, tuple(response)) for i, response in enumerate(responses)]
    different = list(dict.fromkeys(answers))
    # As many on each process: a sharded model runs on all of them at once.
    different += different[:1] * (common.max_of_all(len(different)) - len(different))
    texts = [prompts[i]["prompt"] for i, _ in different]
    ids = [prompts[i]["ids"] for i, _ in different]
    scores = score(texts, ids, [list(response) for _, response in different])
    score_of = dict(zip(different, scores.tolist()))
    candidates = []
    for i, prompt in enumerate(prompts):
        own = slice(i * cfg.n, (i + 1) * cfg.n)
        ended = [response[-1] in eos for response in responses[own]]
        scores = [score_of[answer] for answer in answers[own]]
        rewards = [s - cfg.missing_eos_penalty * (not e) for s, e in zip(scores, ended)]
        candidates.append(dict(
            prompt=prompt["prompt"], prompt_ids=prompt["ids"], responses=responses[own],
            scores=scores, ended=ended, rewards=rewards,
        ))  # fmt: skip
    return candidates


def sample_candidates(run, name, policy, score, prompts, eos, cfg):
    """The answers to all prompts, through the file `name` of the run, a line a prompt.

    They are written part by part; what an interrupted run left there is not sampled again.
    """
    path = run.out / f"{name}.jsonl"
    part = max(1, 4 * cfg.slots // cfg.n)  # prompts: enough answers to keep the slots busy
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    # A kill may leave half a line.
    try:
        candidates = [json.loads(line) for line in lines if line.endswith(b"\n")]
        answered = [candidate["prompt_ids"] for candidate in candidates]
    except (ValueError, KeyError, TypeError):
        raise common.UserError(f"{path}: not what this run wrote; remove it") from None
    if answered != [p["ids"] for p in prompts[: len(candidates)]]:
        raise common.UserError(f"{path}: answers to other prompts than --data holds now")
    # A part that was not written to its end is sampled again, from the same seed.
    if len(candidates) < len(prompts):
        candidates = candidates[: len(candidates) // part * part]
    common.wait_for_all()  # until each has read it
    common.write_jsonl(path, candidates)
    done = math.ceil(len(candidates) / part)
    for step in run.steps(math.ceil(len(prompts) / part), done, name):
        own = prompts[(step - 1) * part : step * part]
        generator = common.make_generator(policy.device, cfg.seed, name, step, shared=False)
        new = sample_and_score(policy, score, common.share(own), eos, generator, cfg)
        new = common.gather(new, len(own))
        common.append_jsonl(path, new)
        candidates += new
        run.show(score=np.mean([candidate["scores"] for candidate in new]))
    return candidates


# ----------------------------------------------------------------------------------------------
# 2 Select


def best_that_ended(rewards, ended):
    """Best-of-N among the answers that ended, if any did: (B, N), (B, N) -> (B,)."""
    allowed = ended | ~ended.any(-1, keepdim=True)
    return best_of_n(rewards.masked_fill(~allowed, -torch.inf))


def choose(rewards, ended, number, cfg):
    """Among one prompt's answers: the best that ended, or None, and pairs (winner, loser)."""
    rewards, ended = torch.tensor(rewards), torch.tensor(ended)
    if not ended.any():
        return None, []
    best, worst = int(best_that_ended(rewards[None], ended[None])), int(rewards.argmin())
    pairs = []
    if cfg.method == "best_of_n" and rewards[best] > rewards[worst]:
        pairs = [(best, worst)]
    if cfg.method == "rso" and len(rewards) > cfg.num_samples:
        seed = common.make_generator("cpu", cfg.seed, "rso", number).initial_seed()
        rng = np.random.default_rng(seed)
        accepted = statistical_rejection(rewards, cfg.num_samples, cfg.rso_beta, rng)
        ranked = rank_pairs(rewards[accepted].tolist(), cfg.rank)
        pairs = [(accepted[winner], accepted[loser]) for winner, loser in ranked]
    return best, [(winner, loser) for winner, loser in pairs if ended[winner]]


def select(run, candidates, tokenizer, cfg):
    """Write sft.jsonl and dpo.jsonl; returns the pairs as token ids.

    An answer without text is no candidate: a file of data cannot hold it.
    """
    demonstrations, preferences, pairs = [], [], []
    for number, candidate in enumerate(candidates):
        prompt, prompt_ids = candidate["prompt"], candidate["prompt_ids"]
        texts = [tokenizer.decode(r, skip_special_tokens=True) for r in candidate["responses"]]
        kept = [i for i, text in enumerate(texts) if text.strip()]
        if not kept:
            continue
        texts, responses, rewards, ended = (
            [x[i] for i in kept]
            for x in (texts, candidate["responses"], candidate["rewards"], candidate["ended"])
        )
        if not isinstance(prompt, str):
            texts = [[dict(role="assistant", content=text)] for text in texts]
        best, chosen = choose(rewards, ended, number, cfg)
        if best is not None:
            demonstrations.append(dict(prompt=prompt, completion=texts[best]))
        for winner, loser in chosen:
            up, down = texts[winner], texts[loser]
            if up != down:  # they may differ in token ids alone
                preferences.append(dict(prompt=prompt, chosen=up, rejected=down))
                both = responses[winner], responses[loser]
                pairs.append([common.join(prompt_ids, response) for response in both])
    ended = np.mean([whole for candidate in candidates for whole in candidate["ended"]])
    print(f"{len(candidates)} prompts with {cfg.n} answers each; {ended:.1%} ended by themselves")
    if cfg.method == "best_of_n":
        common.write_jsonl(run.out / "sft.jsonl", demonstrations)
        print(f"{run.out / 'sft.jsonl'}: {len(demonstrations)} best answers")
    common.write_jsonl(run.out / "dpo.jsonl", preferences)
    print(f"{run.out / 'dpo.jsonl'}: {len(pairs)} pairs")
    return pairs


def encode_pairs(rows, tokenizer, max_length):
    """Lines of preference data as pairs of (ids, mask) examples, chosen first."""
    pairs = []
    for row in rows:
        prompt, *both = common.split_pair(row)
        pairs.append(common.encode(tokenizer, prompt, both, row["where"]))
    return common.keep_short(pairs, max_length, longest, "pairs")


def longest(pair):
    return max(len(ids) for ids, _ in pair)


# ----------------------------------------------------------------------------------------------
# 3 Preference step


def pair_logprobs(model, pairs, temperature):
    """Summed log-probs of the chosen and of the rejected responses of B pairs: (B,), (B,)."""
    examples = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    batch = common.collate(examples, range(len(examples)), model.device)
    return common.response_logprobs(model, batch, temperature).sum(1).chunk(2)


def micro_batches(pairs, rows, cfg, device):
    """The pairs `rows` in lists whose padded tokens fit the budget; a pair's two stay together."""
    tokens = {row: 2 * longest(pairs[row]) for row in rows}
    return common.micro_batches(tokens, common.token_budget(cfg, device), rows)


@torch.no_grad()
def all_logprobs(model, pairs, cfg):
    """`pair_logprobs` of all pairs, as two lists of numbers."""
    chosen, rejected = torch.zeros(2, len(pairs))
    for rows in micro_batches(pairs, common.share(range(len(pairs))), cfg, model.device):
        logprobs = pair_logprobs(model, [pairs[row] for row in rows], cfg.temperature)
        chosen[rows], rejected[rows] = (x.cpu() for x in logprobs)
    own = dict(chosen=common.share(chosen.tolist()), rejected=common.share(rejected.tolist()))
    return {name: common.gather(numbers, len(pairs)) for name, numbers in own.items()}


def preference_step(policy, optimizer, pairs, batch, ref_logprobs, cfg):
    """One optimiser step on the pairs `batch`; returns its statistics, means over the pairs."""
    names = ("loss", "accuracy", "margin", "chosen_logratio", "rejected_logratio")
    totals = torch.zeros(len(names), device=policy.device)
    for rows in micro_batches(pairs, common.share(batch), cfg, policy.device):
        both = [[ref_logprobs[key][row] for row in rows] for key in ("chosen", "rejected")]
        ref_chosen, ref_rejected = common.on_device(both, policy.device)
        chosen, rejected = pair_logprobs(policy, [pairs[row] for row in rows], cfg.temperature)
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta, cfg.loss)
        share = len(rows) / len(batch)
        (loss * share).backward()
        with torch.no_grad():
            up, down = chosen - ref_chosen, rejected - ref_rejected
            margin = cfg.beta * (up - down)
            stats = (loss, (margin > 0).float().mean(), margin.mean(), up.mean(), down.mean())
            totals += share * torch.stack(stats)
    stats = dict(zip(names, totals))
    ids = (ids for row in batch for ids, _ in pairs[row])
    return common.optimizer_step(policy, optimizer, stats, ids, cfg)


def train_on_pairs(run, policy, optimizer, pairs, ref_logprobs, cfg):
    """The preference step. `ref_logprobs` is empty, or what a checkpoint remembers of it."""
    if not pairs:
        raise common.UserError("no pairs to learn from: see the counts above")
    if not ref_logprobs:  # the policy still is the reference
        ref_logprobs |= all_logprobs(policy, pairs, cfg)
    steps = common.total_steps(cfg, len(pairs))
    print(
        f"Preference step ({cfg.loss}) on {policy.device}: {policy.num_parameters() / 1e6:.1f}M "
        f"parameters, {len(pairs)} pairs, {steps} steps of {cfg.batch_size}"
    )
    for step in run.steps(steps):
        batch = common.epoch_batch(len(pairs), cfg.batch_size, step, cfg.seed)
        lr = common.set_lr(optimizer, cfg.lr, step, steps, cfg.warmup, cfg.lr_schedule)
        stats = preference_step(policy, optimizer, pairs, batch, ref_logprobs, cfg)
        run.log(("loss", "accuracy", "margin"), lr=lr, **stats)


@torch.no_grad()
def held_out_accuracy(policy, ref, pairs, cfg):
    """Share of pairs with h > 0: those the policy moved the right way, a tie counts half."""
    new, old = all_logprobs(policy, pairs, cfg), all_logprobs(ref, pairs, cfg)
    up, down = (np.subtract(new[key], old[key]) for key in ("chosen", "rejected"))
    return float(np.mean((np.sign(up - down) + 1) / 2))


# ----------------------------------------------------------------------------------------------
# Looking at what it does


def judge_best(candidates, gold, tokenizer, cfg):
    """Best-of-N on held-out prompts: its answers, as `common.evaluate` gives a policy's, and the
    curve over n = 1, 2, 4, ... up to N: bound of the KL, mean score, share of good answers.
    """
    rewards, scores, ended = (
        torch.tensor([c[key] for c in candidates]) for key in ("rewards", "scores", "ended")
    )  # (P, N) each
    prompts = [candidate["prompt"] for candidate in candidates for _ in range(cfg.n)]
    prompt_ids = [candidate["prompt_ids"] for candidate in candidates for _ in range(cfg.n)]
    responses = [response for candidate in candidates for response in candidate["responses"]]
    judged = gold(prompts, prompt_ids, responses).view_as(scores) if gold else None

    def pick(x, n):
        # Of every group of n answers, its best: all count, so that a small n is not noisy.
        own = [y[:, : cfg.n // n * n].reshape(-1, n) for y in (rewards, ended, x)]
        best = best_that_ended(own[0], own[1])
        return own[2][torch.arange(len(best)), best]

    curve = []
    for n in sorted({2**i for i in range(cfg.n.bit_length())} | {cfg.n}):
        point = dict(n=n, kl=best_of_n_kl(n), score=pick(scores, n).mean().item())
        if gold:
            point["gold"] = (pick(judged, n) >= 0.5).float().mean().item()
        curve.append(point)
    numbers = torch.arange(len(responses)).view_as(scores)
    chosen = [responses[i] for i in pick(numbers, cfg.n)]
    return dict(
        texts=[tokenizer.decode(response, skip_special_tokens=True) for response in chosen],
        scores=pick(scores, cfg.n),
        gold=pick(judged, cfg.n) if gold else None,
        eos_rate=pick(ended, cfg.n).float().mean().item(),
        kl=None,  # there is a bound only
    ), curve


def print_curve(curve):
    print("\nbest of     KL at most       score" + ("        gold" if "gold" in curve[0] else ""))
    for point in curve:
        gold = f"{point['gold']:12.1%}" if "gold" in point else ""
        print(f"{point['n']:7}{point['kl']:15.2f}{point['score']:12.2f}{gold}")


def answer(cfg, device, dtype):
    """Answer --prompt, or each line of stdin, N times; print the answers, best first."""
    tokenizer = common.load_tokenizer(cfg.policy)
    policy = common.load_policy(cfg.policy, device, dtype)
    score, *_ = common.load_scorer(cfg, tokenizer, device, dtype)
    eos = common.stop_ids(policy, tokenizer)
    lines = (line.rstrip("\n") for line in sys.stdin) if cfg.prompt == "-" else [cfg.prompt]
    for number, text in enumerate(line for line in lines if line.strip()):
        prompt = [dict(role="user", content=text)] if cfg.chat else text
        ids = common.encode_prompt(tokenizer, prompt, "--prompt")
        generator = common.make_generator(device, cfg.seed, "prompt", number)
        prompts = [dict(prompt=prompt, ids=ids)]
        [found] = sample_and_score(policy, score, prompts, eos, generator, cfg)
        print(text)
        for i in torch.tensor(found["scores"]).argsort(descending=True).tolist():
            said = tokenizer.decode(found["responses"][i], skip_special_tokens=True)
            said = said.replace("\n", "\n" + " " * 10) + ("" if found["ended"][i] else " ...")
            print(f"{found['scores'][i]:8.2f}  {said}")
        sys.stdout.flush()


# ----------------------------------------------------------------------------------------------


def check(cfg):
    over_0 = "max_prompt_tokens n max_new_tokens temperature slots rso_beta beta epochs"
    most = dict(num_samples=(1, math.inf), max_length=(1, math.inf))
    common.require(cfg, over_0, "missing_eos_penalty steps", **most)
    if cfg.method == "rso" and cfg.num_samples >= cfg.n and not (cfg.pairs or cfg.prompt):
        raise common.UserError(
            f"--num_samples {cfg.num_samples}: of {cfg.n} answers (--n) none would be rejected"
        )
    if cfg.method == "best_of_n" and cfg.n == 1 and cfg.loss != "none" and not cfg.prompt:
        raise common.UserError("--n 1: no two answers, so no pair to learn from (--loss none)")
    if cfg.pairs and (cfg.loss == "none" or cfg.prompt):
        raise common.UserError("--pairs trains on pairs: it goes with no --loss none, no --prompt")


def main(cfg):
    cfg = replace(cfg, n=cfg.n or (64 if cfg.method == "rso" else 8))
    if not cfg.pairs:
        cfg = replace(cfg, reward=cfg.reward or "out/reward")
    check(cfg)
    device = common.choose_device(cfg.device)
    frozen_dtype = common.frozen_dtype(device)
    if cfg.prompt:
        if cfg.shard or common.world_size() > 1:
            raise common.UserError("--prompt: in one process, without torchrun and --shard")
        common.make_missing_stages(cfg)
        answer(cfg, device, frozen_dtype)
        return

    run = common.Run(cfg)
    data = cfg.pairs or cfg.data
    rows, eval_rows = common.read_split(data, cfg.eval_data, "eval_prompts.jsonl")
    common.make_missing_stages(cfg)
    tokenizer = common.load_tokenizer(cfg.policy)
    ref = common.load_policy(cfg.policy, device, frozen_dtype).requires_grad_(False)  # samples, too
    common.compile_layers(ref, cfg.compile)
    eos = common.stop_ids(ref, tokenizer)
    score = None
    if cfg.reward or cfg.reward_fn:
        score, *_ = common.load_scorer(cfg, tokenizer, device, frozen_dtype)
    gold = common.load_gold(cfg.gold_fn, data, tokenizer)
    room = common.prompt_room(ref, cfg)
    eval_prompts = common.load_prompts(eval_rows, tokenizer, room)
    if cfg.pairs:
        limit = min(cfg.max_length, common.context_length(ref))
        pairs = encode_pairs(rows, tokenizer, limit)
        eval_rows = [row for row in eval_rows if "chosen" in row]
        eval_pairs = encode_pairs(eval_rows, tokenizer, limit) if eval_rows else []
    else:
        prompts = common.load_prompts(rows, tokenizer, room)
    tracked, ref_logprobs = {}, {}
    if cfg.loss != "none":
        policy = common.load_policy(cfg.policy, device, common.trained_dtype(cfg, device))
        if cfg.lora_rank:  # the reference is the policy without its adapter
            common.share_weights(ref, policy)
        optimizer = common.make_trainable(policy, cfg, cfg.lr)
        common.print_memory_plan(device, cfg, [policy], [ref])
        tracked = dict(policy=policy, optimizer=optimizer, ref_logprobs=ref_logprobs)
    look = (tokenizer, eos, score, gold, cfg)
    answers = dict(before=common.evaluate(ref, ref, ref, eval_prompts, *look))
    results = {}
    run.begin(**tracked)

    if not cfg.pairs:
        # 1. Sample.
        candidates = sample_candidates(run, "candidates", ref, score, prompts, eos, cfg)
        # 2. Select; and best-of-N, judged on held-out prompts.
        pairs = select(run, candidates, tokenizer, cfg)
        held_out = sample_candidates(run, "eval_candidates", ref, score, eval_prompts, eos, cfg)
        answers["best_of_n"], curve = judge_best(held_out, gold, tokenizer, cfg)
        results |= dict(best_of_n=curve, kl_best_of_n=curve[-1]["kl"])
    common.drop_slots(ref)  # it has sampled; the training needs the memory

    if cfg.loss != "none":
        # 3. Preference step.
        train_on_pairs(run, policy, optimizer, pairs, ref_logprobs, cfg)
        if cfg.pairs and eval_pairs:
            results["accuracy"] = held_out_accuracy(policy, ref, eval_pairs, cfg)
            print(f"held-out pairs moved the right way: {results['accuracy']:.1%}")
        sampler = policy
        if frozen_dtype != policy.dtype or cfg.shard:
            sampler = common.load_policy(cfg.policy, device, frozen_dtype).requires_grad_(False)
            common.copy_weights(policy, sampler)
            common.compile_layers(sampler, cfg.compile)
        answers["after"] = common.evaluate(policy, sampler, ref, eval_prompts, *look)
        results["kl"] = answers["after"]["kl"]

    results = common.summarise(eval_prompts, **answers) | results
    common.print_table(results, eval_prompts, **answers)
    if not cfg.pairs:
        print_curve(curve)
    common.write_samples(run.out / "samples.jsonl", eval_prompts, **answers)
    run.finish(policy if cfg.loss != "none" else None, tokenizer, results)


if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
