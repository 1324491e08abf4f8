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
    1 An answer cut at the length limit is in no sft.jsonl. It pays --missing_eos_penalty, as in
      ppo.py, and in dpo.jsonl it only ever loses, unless that penalty is 0.
    2 RSO visits the answers in random order, so that it does not matter how they are listed.
    3 Answers of equal reward, such as the same one twice, make no pair.
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common
from common import flag  # a default, what it means, its limits

@dataclass
class Config(common.Settings):  # what all stages share: folder, seed, device, LoRA, ...
    # models and data
    policy: str = flag("out/sft", "where it starts; out/sft is made if missing")
    reward: str = flag("", "reward model; empty: out/reward, or none with --pairs")
    reward_fn: str = flag("", "instead of --reward: file.py:function(prompts, responses)")
    data: str = flag(str(common.EMBEDDED / "prompts.jsonl"), "prompts, JSONL")
    pairs: str = flag("", "preference pairs, JSONL, instead of --data and sampling")
    eval_data: str = flag("", "held-out prompts or pairs; empty: a part of the data")
    gold_fn: str = flag("", "file.py:function that judges answers in evaluation")
    max_prompt_tokens: int = flag(512, "longer prompts are left out", over=0)
    prompt: str = flag("", "only answer this, on the terminal; -: each line of stdin")
    # 1 sample
    n: int = flag(0, "answers a prompt; 0: 8, with rso 64", least=0)
    max_new_tokens: int = flag(48, "longest response, tokens", over=0)
    temperature: float = flag(1.0, "in sampling and in every log-prob", over=0)
    slots: int = flag(256, "sequences generated at once", over=0)
    # 2 select
    method: str = flag("best_of_n", "how pairs are chosen", choices=["best_of_n", "rso"])
    missing_eos_penalty: float = flag(1.0, "off the score of a cut response", least=0)
    rso_beta: float = flag(0.5, "rso: small is greedy, large accepts any", over=0)
    num_samples: int = flag(8, "rso: answers accepted of the n", over=1)
    rank: str = flag("first_round", "rso: how they pair", choices=["first_round", "tournament"])
    # 3 preference step
    loss: str = flag("sigmoid", "none: data only", choices=["sigmoid", "hinge", "ipo", "none"])
    beta: float = flag(0.5, "large stays near the reference; often 0.1", over=0)
    epochs: float = flag(2.0, "passes over the pairs", over=0)
    steps: int = flag(0, "cap on the optimiser steps; 0: none", least=0)
    batch_size: int = flag(32, "pairs per optimiser step", over=0)
    lr: float = flag(5e-4, "peak rate; about 1e-6 for a real model", over=0)
    warmup: int = flag(5, "steps of linear warm-up, at most half of all", least=0)
    max_length: int = flag(1024, "tokens; longer --pairs are left out", over=1)
    out: str = flag("out/rejection_sample", "folder of the run")

# Selection and losses: pure functions

def best_of_n(rewards):
    """The best of each row, the first one of equals: (B, N) -> (B,)."""
    return rewards.argmax(-1)

def best_of_n_kl(n):
    """At most how far, in nats, best-of-N is from the policy it samples (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n  # exact where no two answers have the same reward

def statistical_rejection(rewards, num_samples, beta, rng):
    """Which of N answers RSO accepts (Liu et al. 2023, algorithm 1): `num_samples` indices.

    In rounds, until enough are taken: each answer still there is accepted, and taken away, with
    probability exp((r - r_max) / beta), r_max over those still there when the round begins. So
    every round takes its best one; a small beta takes the best ones, a large one any. `rng` is a
    numpy Generator. Raises ValueError where nothing would be rejected or beta is not positive.
    """
    rewards = np.asarray(rewards, dtype=np.float64)  # (N,)
    if not 0 < num_samples < len(rewards):
        raise ValueError(f"num_samples {num_samples}: expected 1 to {len(rewards) - 1}")
    if not beta > 0 or not np.isfinite(rewards).all():
        raise ValueError("expected beta over 0 and finite rewards")
    accepted, left = [], rng.permutation(len(rewards))  # indices of answers
    while len(accepted) < num_samples:
        below = rewards[left] - rewards[left].max()  # 0 for the best of them
        taken = rng.random(len(left)) < np.exp(below / beta)
        accepted += left[taken].tolist()
        left = left[~taken]  # the best one is never among them, so it ends
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
            winner, loser = a, b
            if rewards[a] < rewards[b]:
                winner, loser = b, a
            winners.append(winner)  # of equals, the first
            if rewards[winner] > rewards[loser]:
                pairs.append((winner, loser))
        if method == "first_round":
            break
        players = winners + players[len(players) // 2 * 2 :]  # an odd one goes on unplayed
    return pairs

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, loss="sigmoid"):
    """The mean loss of B pairs, from the summed log-probs (B,) of their responses: a scalar."""
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)  # (B,), nats
    if loss == "sigmoid":
        return -F.logsigmoid(beta * h).mean()
    if loss == "hinge":
        return (1 - beta * h).relu().mean()
    if loss == "ipo":
        return ((h - 1 / (2 * beta)) ** 2).mean()
    raise ValueError(f"loss {loss!r}: expected sigmoid, hinge or ipo")

# 1 Sample

def sample_and_score(sampler, score, prompts, key, cfg):
    """N answers to each prompt and their scores: a dict a prompt, the lines of candidates.jsonl."""
    queries = [prompt["ids"] for prompt in prompts for _ in range(cfg.n)]
    responses, _ = sampler.sample(queries, *key)  # n to each prompt, in a row
    answers = [(i // cfg.n, tuple(response)) for i, response in enumerate(responses)]
    different = sorted(set(answers))  # each scored once: padding may not give equals equal scores
    asked = [prompts[i] for i, _ in different]  # i: number of the prompt
    found = score(asked, [list(response) for _, response in different])
    score_of = dict(zip(different, found.tolist()))
    candidates = []
    for i, prompt in enumerate(prompts):
        own = responses[i * cfg.n : (i + 1) * cfg.n]
        scores = [score_of[i, tuple(response)] for response in own]
        ended = [response[-1] in sampler.eos_ids for response in own]  # not cut at the limit
        penalties = [0.0 if whole else cfg.missing_eos_penalty for whole in ended]
        rewards = [r - penalty for r, penalty in zip(scores, penalties)]  # to choose by
        group = dict(prompt=prompt["prompt"], prompt_ids=prompt["ids"], responses=own)
        candidates.append(group | dict(scores=scores, ended=ended, rewards=rewards))
    return candidates

def sample_candidates(run, name, sampler, score, prompts, cfg):
    """The answers to all prompts, by way of the run's file `name`: what it holds is not redone."""
    path = run.out / f"{name}.jsonl"
    size = max(1, 4 * cfg.slots // cfg.n)  # prompts a part: their answers keep the slots busy
    with common.reading(path):
        written = path.read_bytes() if path.exists() else b""
        lines = written.splitlines(keepends=True)  # a kill may leave half a line
        candidates = [json.loads(line) for line in lines if line.endswith(b"\n")]
        answered = [group["prompt_ids"] for group in candidates]
    if answered != [p["ids"] for p in prompts[: len(candidates)]]:
        raise common.UserError(f"{path}: answers to other prompts than --data holds now")
    if len(candidates) < len(prompts):
        candidates = candidates[: len(candidates) // size * size]  # whole parts
    common.gather([])  # wait until each process has read it
    common.write_jsonl(path, candidates)
    starts = range(len(candidates), len(prompts), size)
    for start in tqdm(starts, desc=name, disable=common.rank() > 0):
        part = start // size + 1  # counted from 1
        common.seed_global(cfg.seed, part)  # for a --reward_fn that draws
        key = (cfg.seed, name, part)  # so that a resumed run draws the same
        new = sample_and_score(sampler, score, prompts[start : start + size], key, cfg)
        if common.rank() == 0:
            with open(path, "a", encoding="utf-8") as file:
                for group in new:
                    file.write(json.dumps(group, ensure_ascii=False) + "\n")
        candidates += new
    return candidates

def answer(cfg, device):
    """Answer --prompt, or each line of stdin, N times; print the answers, best first."""
    policy = common.load_policy(cfg.policy, device, frozen=True)
    tokenizer = common.load_tokenizer(cfg.policy, policy.lm)
    common.prepare(policy.requires_grad_(False), cfg)  # compiled, where asked for
    score, _ = common.load_score(cfg, policy, tokenizer)
    ends = common.stop_ids(policy.lm, tokenizer)
    lines = [cfg.prompt]
    if cfg.prompt == "-":
        lines = (line.rstrip("\n") for line in sys.stdin)  # each answered as it comes
    for number, text in enumerate(line for line in lines if line.strip()):
        rows = [dict(prompt=text, where="--prompt")]  # as if read from a file
        prompts = common.load_prompts(rows, tokenizer, cfg, policy)
        longest = len(prompts[0]["ids"]) + cfg.max_new_tokens
        slots = min(cfg.slots, cfg.n)
        sampler = common.Sampler(policy, ends, cfg.max_new_tokens, longest, cfg.temperature, slots)
        key = (cfg.seed, "prompt", number)
        [found] = sample_and_score(sampler, score, prompts, key, cfg)
        sampler.close()
        print(text)
        scores = torch.tensor(found["scores"])  # (N,)
        for i in scores.argsort(descending=True).tolist():
            said = tokenizer.decode(found["responses"][i], skip_special_tokens=True)
            said = said.replace("\n", "\n" + " " * 10)  # further lines under the first
            cut = "" if found["ended"][i] else " ..."
            print(f"{found['scores'][i]:8.2f}  {said}{cut}")
        sys.stdout.flush()

# 2 Select

def best_index(group, cfg):
    """The best of a prompt's answers; one that was cut only where none ended, or at no penalty."""
    rewards = torch.tensor(group["rewards"])  # (N,)
    ended = torch.tensor(group["ended"])  # (N,)
    if cfg.missing_eos_penalty and ended.any():
        rewards = rewards.masked_fill(~ended, -torch.inf)
    return int(best_of_n(rewards[None]))

def choose_pairs(group, number, cfg):
    """Pairs (winner, loser) of a prompt's answers. Where it is a fault, no cut answer wins."""
    rewards, ended, pairs = group["rewards"], group["ended"], []
    if cfg.method == "best_of_n":
        best, worst = best_index(group, cfg), rewards.index(min(rewards))
        if rewards[best] > rewards[worst]:
            pairs = [(best, worst)]
    else:
        rng = np.random.default_rng([cfg.seed, number])  # number: of the prompt
        accepted = statistical_rejection(rewards, cfg.num_samples, cfg.rso_beta, rng)
        ranked = rank_pairs([rewards[i] for i in accepted], cfg.rank)
        pairs = [(accepted[i], accepted[j]) for i, j in ranked]
    if cfg.missing_eos_penalty:
        pairs = [(winner, loser) for winner, loser in pairs if ended[winner]]
    return pairs

def select(run, prompts, candidates, tokenizer, cfg):
    """Write sft.jsonl and dpo.jsonl; returns the pairs as examples, chosen first."""
    demonstrations, preferences, pairs = [], [], []
    for number, (prompt, group) in enumerate(zip(prompts, candidates)):
        line = {key: prompt[key] for key in ("prompt", "tools") if key in prompt}
        responses = group["responses"]  # token ids
        texts = [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
        if not isinstance(prompt["prompt"], str):  # to messages, a message is the answer
            texts = [[dict(role="assistant", content=text)] for text in texts]
        best = best_index(group, cfg)
        if group["ended"][best]:  # SFT must not teach to stop in the middle
            demonstrations.append(line | dict(completion=texts[best]))
        for winner, loser in choose_pairs(group, number, cfg):
            if texts[winner] != texts[loser]:  # they may differ in token ids alone
                preferences.append(line | dict(chosen=texts[winner], rejected=texts[loser]))
                chosen = common.join(prompt["ids"], responses[winner])
                rejected = common.join(prompt["ids"], responses[loser])
                pairs.append([chosen, rejected])
    rate = np.mean([group["ended"] for group in candidates])
    print(f"{len(candidates)} prompts with {cfg.n} answers each; {rate:.1%} ended by themselves")
    if cfg.method == "best_of_n":
        common.write_jsonl(run.out / "sft.jsonl", demonstrations)
        print(f"{run.out / 'sft.jsonl'}: {len(demonstrations)} best answers")
    common.write_jsonl(run.out / "dpo.jsonl", preferences)
    print(f"{run.out / 'dpo.jsonl'}: {len(pairs)} pairs")
    return pairs

def judge_best(prompts, candidates, gold, tokenizer, cfg):
    """Best-of-N on held-out prompts, as `common.answer_prompts` gives a policy's answers."""
    best = [(group, best_index(group, cfg)) for group in candidates]
    responses = [group["responses"][i] for group, i in best]
    return dict(
        texts=[tokenizer.decode(r, skip_special_tokens=True) for r in responses],
        scores=[group["scores"][i] for group, i in best],
        gold=gold(prompts, responses).tolist() if gold else [],
        ended=[group["ended"][i] for group, i in best],
    )

def load_pairs(rows, tokenizer, ends, max_length):
    """Lines of preference data as pairs of examples, chosen first."""

    def read(row):
        if "chosen" not in row:
            raise ValueError('no "chosen" and "rejected"')
        prompt, responses = common.prompt_and_responses(row)
        pair = [common.encode(tokenizer, prompt, r, row, ends, max_length) for r in responses]
        if pair[0] == pair[1]:
            raise common.Unlearnable("chosen and rejected are the same")
        return pair

    return common.read_all(rows, read, "pairs")

# 3 Preference step

def held_out_accuracy(policy, ref, pairs, cfg):
    """Share of pairs with h > 0: those the policy moved the right way, a tie counts half."""

    def logratio(batch):
        logprobs, ref_logprobs, _ = common.both_logprobs(policy, ref, batch, cfg.temperature)
        return logprobs.sum(1) - ref_logprobs.sum(1)

    examples = [example for pair in pairs for example in pair]
    logratios = common.evaluate(logratio, examples, cfg, policy.lm.device)  # (2B,)
    h = logratios[0::2] - logratios[1::2]  # (B,): chosen less rejected
    return (h.sign() + 1).mean().item() / 2

def main(cfg):
    default = 64 if cfg.method == "rso" else 8
    cfg = replace(cfg, n=cfg.n or default)
    if not cfg.pairs:
        cfg = replace(cfg, reward=cfg.reward or "out/reward")
    device = common.choose_device(cfg.device)
    trains = cfg.loss != "none"
    selects = not cfg.pairs and not cfg.prompt
    if selects and cfg.method == "rso" and cfg.num_samples >= cfg.n:
        why = f"of {cfg.n} answers (--n) none would be rejected"
        raise common.UserError(f"--num_samples {cfg.num_samples}: {why}")
    if selects and trains and cfg.method == "best_of_n" and cfg.n == 1:
        raise common.UserError("--n 1: no two answers, so no pair to learn from (--loss none)")
    if cfg.pairs and (not trains or cfg.prompt):
        raise common.UserError("--pairs trains on pairs: it goes with no --loss none, no --prompt")
    if cfg.prompt and common.world_size() > 1:
        raise common.UserError("--prompt: in one process, without torchrun")
    if cfg.prompt:
        common.make_missing_stages(cfg)
        answer(cfg, device)
        return

    run = common.Run(cfg)  # the folder --out: metrics, checkpoints, the result
    data = cfg.pairs or cfg.data
    rows, eval_rows = common.read_split(data, cfg.eval_data, "eval_prompts.jsonl")
    common.make_missing_stages(cfg)  # out/sft and out/reward
    limit = max(cfg.max_prompt_tokens + cfg.max_new_tokens, cfg.max_length)  # tokens
    policy = common.load_policy(cfg.policy, device, limit, frozen=cfg.lora_rank)
    tokenizer = common.load_tokenizer(cfg.policy, policy.lm)
    common.add_lora(policy, cfg)  # only with --lora_rank
    ref = policy  # with LoRA: without its adapter
    if trains and not cfg.lora_rank:
        ref = common.load_policy(cfg.policy, device, limit, frozen=True)
        common.prepare(ref.requires_grad_(False), cfg)  # compile and shard, where asked for
    score = reward = None
    if cfg.reward or cfg.reward_fn:
        score, reward = common.load_score(cfg, policy, tokenizer)
    models = [model for model in (policy, reward) if model]  # that must have room for a prompt
    gold = common.load_gold(cfg, data, tokenizer)  # a judge for the results, or None
    ends = common.stop_ids(policy.lm, tokenizer)  # ids that end a response
    eval_prompts = common.load_prompts(eval_rows, tokenizer, cfg, *models)
    prompts = [] if cfg.pairs else common.load_prompts(rows, tokenizer, cfg, *models)
    if cfg.pairs:
        room = min(cfg.max_length, common.context_length(policy.lm))  # tokens
        pairs = load_pairs(rows, tokenizer, ends, room)
        eval_rows = [row for row in eval_rows if "chosen" in row]
        eval_pairs = load_pairs(eval_rows, tokenizer, ends, room) if eval_rows else []

    longest = max(len(p["ids"]) for p in prompts + eval_prompts) + cfg.max_new_tokens
    sampling = common.sampling_copy(policy, cfg)  # the policy itself, or a copy
    optimizer = common.make_optimizer(policy, cfg, cfg.lr)
    sampler = common.Sampler(
        sampling, ends, cfg.max_new_tokens, longest, cfg.temperature, cfg.slots
    )
    evaluation = (policy, sampler, ref, eval_prompts, tokenizer, score, gold, cfg)
    answers, results = dict(before=common.answer_prompts(*evaluation)), {}
    run.begin(policy=(policy, optimizer))  # what a checkpoint holds; --resume loads it

    if not cfg.pairs:
        # 1. Sample.
        candidates = sample_candidates(run, "candidates", sampler, score, prompts, cfg)
        # 2. Select; and best-of-N, judged on held-out prompts.
        pairs = select(run, prompts, candidates, tokenizer, cfg)
        best = sample_candidates(run, "eval_candidates", sampler, score, eval_prompts, cfg)
        answers["best_of_n"] = judge_best(eval_prompts, best, gold, tokenizer, cfg)
        results["kl_best_of_n"] = best_of_n_kl(cfg.n)  # at most
    sampler.close()  # training needs the memory of its K/V cache

    if trains:
        # 3. Preference step, against the frozen policy it started from.
        if not pairs:
            raise common.UserError("no pairs to learn from: see the counts above")
        steps = common.total_steps(cfg, len(pairs))
        lengths = []  # padded tokens, of a pair that stays together
        for chosen, rejected in pairs:
            lengths.append(2 * max(len(chosen["ids"]), len(rejected["ids"])))
        budget = common.token_budget(cfg, device)  # padded tokens a forward
        print(
            f"Preference step ({cfg.loss}) on {device}: {policy.lm.num_parameters() / 1e6:.1f}M "
            f"parameters, {len(pairs)} pairs, {steps} steps of {cfg.batch_size}"
        )
        for step in run.steps(steps):
            lr = common.set_lr(optimizer, cfg.lr, step, steps, cfg)
            indices = common.epoch_batch(len(pairs), cfg.batch_size, step, cfg.seed)
            totals = defaultdict(float)  # the batch's means, tensors on the device
            for part in common.micro_batches(indices, lengths, budget):
                examples = [example for i in part for example in pairs[i]]  # chosen, rejected, ...
                batch = common.collate(examples, device)
                logs, ref_logs, _ = common.both_logprobs(policy, ref, batch, cfg.temperature)
                logprobs, ref_logprobs = logs.sum(1), ref_logs.sum(1)  # (2b, t) -> (2b,)
                chosen, rejected = logprobs[0::2], logprobs[1::2]  # (b,), (b,)
                ref_chosen, ref_rejected = ref_logprobs[0::2], ref_logprobs[1::2]
                loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, cfg.beta, cfg.loss)
                share = len(part) / len(indices)  # every pair weighs the same
                (loss * share).backward()
                up = (chosen - ref_chosen).detach()  # (b,): how far the update moved them, nats
                down = (rejected - ref_rejected).detach()
                right = ((up - down).sign() + 1) / 2  # (b,): 1, of a tie 0.5
                totals["loss"] += loss.detach() * share
                totals["accuracy"] += right.mean() * share
                totals["margin"] += cfg.beta * (up - down).mean() * share
                totals["chosen_logratio"] += up.mean() * share
                totals["rejected_logratio"] += down.mean() * share
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
            stats = common.read_stats(totals, norm)  # raises where not finite
            optimizer.step()
            optimizer.zero_grad()
            run.log(("loss", "accuracy", "margin"), lr=lr, **stats)

        if cfg.pairs and eval_pairs:
            results["accuracy"] = held_out_accuracy(policy, ref, eval_pairs, cfg)
        answers["after"] = common.answer_prompts(*evaluation)
        results["kl"] = sum(answers["after"]["kl"]) / len(eval_prompts)

    samples, means = common.compare(eval_prompts, **answers)
    results = means | results  # for eval.json
    run.finish(policy if trains else None, tokenizer, results, samples)
    common.print_answers(results, samples)

if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
