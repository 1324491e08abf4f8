"""Stage 3, PPO-RLHF: an SFT model and a reward model -> a policy aligned with the reward.

    python ppo.py                                                          # everything, on the embedded world
    python ppo.py --policy out/sft --reward out/reward --data prompts.jsonl --lr 3e-6 --value_lr 1e-5   # your own

Algorithm 1. Four models: the policy pi, its frozen reference, the frozen reward model, the value model V. Then, each step:

    1 sample      pi_old (the policy before the update) answers a batch of prompts
    2 score       the reward model scores each answer; a KL penalty per token keeps pi near the reference:
                      r_t = - kl_coef * (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)),  plus the score on the last token
    3 advantages  A_t = Q(s_t,a_t) - V(s_t), estimated by GAE:  delta_t = r_t + gamma V(s_t+1) - V(s_t),
                      A_t = delta_t + gamma lam A_t+1
    4 K epochs    on the ratio  rho_t = pi(a_t|s_t) / pi_old(a_t|s_t)  (importance sampling: one rollout, many updates)
                      clip  E[min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t)]     (8.20)
                      kl    E[rho_t A_t - beta KL(pi_old, pi)]                   (8.21), beta adapted
                      pg    E[log pi(a_t|s_t) R]                                 (8.8), plain policy gradient, to see it go wrong
                  and 1/2 E[(V(s_t) - return_t)^2], clipped, for the value model
    5 sync        pi_old <- pi

Where this departs from the papers:
    1 Old log-probs come from the training forward, not from the sampler, so that every ratio starts at exactly 1.
    2 Policy and value are separate models with separate optimisers: no weight between the two losses.
    3 Advantages are whitened over the whole rollout, rewards are not (InstructGPT and Schulman's PPO leave this open).
    4 The mean is over tokens, not over responses: a long answer weighs more. Padding weighs nothing.
"""

import copy
import math
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForSequenceClassification
from transformers.hf_argparser import HfArg

import common
from common import masked_mean, masked_variance, whiten

HERE = Path(__file__).parent


@dataclass
class Config:
    # models and data
    policy: str = HfArg(default="out/sft", help="the SFT model; out/sft is made by sft.py if it is missing")
    reward: str = HfArg(default="out/reward", help="the reward model; out/reward is made by reward.py if it is missing")
    reward_fn: str = HfArg(default="", help="file.py:function (prompts, responses) -> scores, instead of --reward")
    ref: str = HfArg(default="", help="the reference model; empty: the policy as it starts")
    value: str = HfArg(default="", help="where the value model starts; empty: from the reward model")
    data: str = HfArg(default=str(common.EMBEDDED / "prompts.jsonl"), help="prompts, JSONL or JSONL.gz")
    eval_data: str = HfArg(default="", help="held-out prompts; empty: embedded, or the last 5%% of --data")
    gold_fn: str = HfArg(default="", help="file.py:function, a judge for evaluation only; empty: the embedded world's")
    max_prompt_tokens: int = HfArg(default=512, help="longer prompts are left out")
    # 1 sample
    steps: int = HfArg(default=40, help="PPO steps")
    batch_size: int = HfArg(default=128, help="episodes a step")
    max_new_tokens: int = HfArg(default=48, help="longest response, tokens")
    temperature: float = HfArg(default=1.0, help="of the policy, in sampling and in every log-prob")
    slots: int = HfArg(default=256, help="sequences generated at once")
    # 2 score
    missing_eos_penalty: float = HfArg(default=1.0, help="taken off the score of a response cut at the limit")
    kl_coef: float = HfArg(default=0.3, help="reward lost per nat away from the reference; often 0.05")
    kl_target: float = HfArg(default=0.0, help="adapt kl_coef to this KL, nats a response; 0: fixed")
    kl_horizon: int = HfArg(default=10000, help="episodes over which kl_coef adapts")
    # 3 advantages
    gamma: float = HfArg(default=1.0, help="discount per token")
    lam: float = HfArg(default=0.95, help="GAE: 0 trusts the value model, 1 the sampled return")
    # 4 K epochs
    objective: Literal["clip", "kl", "pg"] = HfArg(default="clip", help="(8.20), (8.21) or (8.8)")
    ppo_epochs: int = HfArg(default=4, help="K, passes over each rollout (pg takes one, being on-policy)")
    minibatches: int = HfArg(default=1, help="optimiser steps a pass")
    lr: float = HfArg(default=5e-4, help="the policy's learning rate; about 3e-6 for a real model")
    value_lr: float = HfArg(default=1e-3, help="the value model's; about 1e-5 for a real model")
    warmup: int = HfArg(default=5, help="PPO steps of linear warm-up")
    lr_schedule: Literal["linear", "constant"] = HfArg(default="linear", help="after the warm-up")
    cliprange: float = HfArg(default=0.2, help="clip: eps of the ratio")
    cliprange_value: float = HfArg(default=0.2, help="how far a value may move from its old estimate")
    beta: float = HfArg(default=1.0, help="kl: the first weight of KL(pi_old, pi)")
    beta_target: float = HfArg(default=0.01, help="kl: beta is halved or doubled to keep this KL, nats a token")
    stop_kl: float = HfArg(default=0.0, help="end a step's epochs past this KL(pi_old, pi), nats a token; 0: never")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping, L2 norm, policy and value apart")
    ptx_coef: float = HfArg(default=0.0, help="PPO-ptx: weight of the SFT loss in the policy's loss")
    ptx_data: str = HfArg(default=str(common.EMBEDDED / "sft.jsonl"), help="PPO-ptx: demonstrations")
    micro_tokens: int = HfArg(
        default=0, help="padded tokens per forward, lower when out of memory; 0: 16,384 on CUDA, 512 on the CPU"
    )
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations: less memory, slower")
    # the run
    out: str = HfArg(default="out/ppo", help="folder for the policy, settings, metrics and samples")
    resume: bool = HfArg(default=False, help="continue the run in --out")
    overwrite: bool = HfArg(default=False, help="replace the run in --out")
    save_every: int = HfArg(default=50, help="steps between checkpoints; 0: only when stopped")
    sample_every: int = HfArg(default=10, help="steps between two decoded samples; 0: none")
    trace: int = HfArg(default=0, help="steps between per-token tables of one episode; 0: none")
    seed: int = HfArg(default=0, help="of the order of the prompts and the sampling")
    device: str = HfArg(default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compile: Literal["auto", "on", "off"] = HfArg(
        default="auto", help="torch.compile the layers; auto: CUDA and over 50M parameters"
    )


# ----------------------------------------------------------------------------------------------
# Objectives: pure functions, everything (B, T) over response tokens


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """The KL penalty on every token, and the score (B,) on the last real one: (B, T)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1).long() - 1  # (B,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def policy_loss(logprobs, old_logprobs, advantages, mask, objective="clip", cliprange=0.2, beta=0.0):
    """The policy's loss, minus the objective (8.20), (8.21) or (8.8), as a mean over real tokens.

    Returns (loss, stats): approx_kl = KL(pi_old, pi) by the estimator (rho - 1) - log rho of Schulman (2020), non-negative;
    clipfrac, the share of tokens whose gradient the clip cut off; ratio, the mean of rho.
    """
    logratio = (logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    kl = (ratio - 1) - logratio
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    if objective == "clip":
        # The smaller of the two: nothing is gained by moving the ratio further than eps in the direction of A.
        gain = torch.min(ratio * advantages, clipped * advantages)
    elif objective == "kl":
        gain = ratio * advantages - beta * kl
    elif objective == "pg":
        gain = logprobs * advantages
    else:
        raise ValueError(f"objective {objective!r}: expected clip, kl or pg")
    with torch.no_grad():
        cut = (clipped * advantages < ratio * advantages).float()
        stats = dict(
            approx_kl=masked_mean(kl, mask), clipfrac=masked_mean(cut, mask), ratio=masked_mean(ratio, mask)
        )
    return -masked_mean(gain, mask), stats


def value_loss(values, old_values, returns, mask, cliprange_value=0.2):
    """Half the squared error against the returns, the worse of the new and the clipped value. Returns (loss, clipfrac)."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(error, clipped_error), mask)
    return loss, masked_mean((clipped_error > error).float(), mask).detach()


def adapt_kl_coef(kl_coef, kl, target, episodes, horizon):
    """Ziegler et al. 2019, section 2.2: a proportional controller in log space, its error capped at 20%."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def adapt_beta(beta, kl, target):
    """Schulman et al. 2017, section 4: halve or double beta when KL(pi_old, pi) is off its target by 1.5."""
    if kl < target / 1.5:
        return beta / 2
    if kl > target * 1.5:
        return beta * 2
    return beta


# ----------------------------------------------------------------------------------------------
# Set-up


def check(cfg):
    common.require(
        cfg, steps=(0, None), batch_size=(0, None), max_new_tokens=(0, None), temperature=(0, None), slots=(0, None),
        kl_coef=(-1e-9, None), kl_target=(-1e-9, None), kl_horizon=(0, None), gamma=(0, 1), lam=(-1e-9, 1),
        ppo_epochs=(0, None), minibatches=(0, cfg.batch_size), lr=(0, None), value_lr=(0, None), warmup=(-1, None),
        cliprange=(0, 1), cliprange_value=(0, None), beta=(0, None), beta_target=(0, None), stop_kl=(-1e-9, None),
        max_grad_norm=(0, None), ptx_coef=(-1e-9, None), micro_tokens=(-1, None), save_every=(-1, None),
        sample_every=(-1, None), trace=(-1, None), max_prompt_tokens=(0, None), missing_eos_penalty=(-1e-9, None),
    )  # fmt: skip
    if cfg.batch_size % cfg.minibatches:
        raise common.UserError(f"--batch_size {cfg.batch_size} is not divisible by --minibatches {cfg.minibatches}")


def make_missing_stages(cfg):
    """Run sft.py and reward.py for the default folders that are not finished."""
    stages = [("sft.py", cfg.policy, Config.policy, [])]
    if not cfg.reward_fn:
        stages.append(("reward.py", cfg.reward, Config.reward, ["--model", cfg.policy]))
    for script, folder, default, flags in stages:
        if folder != default or (Path(folder) / "eval.json").exists():
            continue
        print(f"{folder} is missing: running {script}", flush=True)
        command = [sys.executable, str(HERE / script), "--out", folder, "--seed", str(cfg.seed), "--device", cfg.device]
        command += flags + (["--resume"] if (Path(folder) / "run.json").exists() else [])
        # Ctrl-C reaches the stage too, which saves and stops; then so do we.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = subprocess.run(command).returncode
        signal.signal(signal.SIGINT, handler)
        if code:
            raise SystemExit(code)


def load_prompts(rows, tokenizer, max_tokens):
    """Rows of any data file -> their prompts, tokenised; each keeps its row's `kind` and `task`, if any."""
    prompts = []
    for row in rows:
        prompt = common.prompt_of(row)
        prompts.append(row | dict(prompt=prompt, ids=common.encode_prompt(tokenizer, prompt, row["where"])))
    return common.keep_short(prompts, max_tokens, lambda prompt: len(prompt["ids"]), "prompts")


def load_value(cfg, device, tokenizer, reward):
    """The value model: from --value, else the reward model if it can score tokens and shares the tokenizer, else the policy."""
    if cfg.value:
        value = common.load_reward(cfg.value, device)
        if not value.scores_tokens:
            raise common.UserError(f"--value {cfg.value}: not a causal model, so it has no value for each token")
        return value
    if reward is not None and reward.scores_tokens:
        if common.load_tokenizer(cfg.reward).get_vocab() == tokenizer.get_vocab():
            return common.load_reward(cfg.reward, device)
    print("the value model starts from the policy with a zero head")
    value = common.load_model(
        AutoModelForSequenceClassification, cfg.policy, device, torch.float32, num_labels=1
    )
    value.score.weight.data.zero_()
    return value


# ----------------------------------------------------------------------------------------------
# Looking at what it does


@torch.no_grad()
def evaluate(policy, ref, prompts, tokenizer, eos, score, gold, cfg, micro_tokens):
    """Answer `prompts` with a fixed seed: texts, scores (before any penalty), gold scores, and the mean KL, nats a response."""
    ids = [prompt["ids"] for prompt in prompts]
    generator = common.make_generator(policy.device, cfg.seed, "evaluate")
    responses = common.generate(
        policy, ids, cfg.max_new_tokens, eos, cfg.temperature, generator=generator, slots=cfg.slots
    )
    texts = [prompt["prompt"] for prompt in prompts]
    examples = [common.join(p, r) for p, r in zip(ids, responses)]
    kl = 0.0
    for rows in common.micro_batches([len(x) for x, _ in examples], micro_tokens):
        batch = common.collate(examples, rows, policy.device)
        logprobs = common.response_logprobs(policy, batch, cfg.temperature)  # (b, R)
        ref_logprobs = common.response_logprobs(ref, batch, cfg.temperature)
        kl += ((logprobs - ref_logprobs) * batch.mask).sum().item() / len(prompts)
    return dict(
        texts=[tokenizer.decode(r, skip_special_tokens=True) for r in responses],
        scores=score(texts, ids, responses),
        gold=gold(texts, ids, responses) if gold else None,
        kl=kl,
        eos_rate=sum(r[-1] in eos for r in responses) / len(responses),
    )


def good_rates(prompts, gold, key):
    """{kind: share of its answers that gold calls good} for the prompts that have `key`."""
    groups = {}
    for prompt, value in zip(prompts, gold.tolist()):
        if key in prompt:
            groups.setdefault(prompt[key], []).append(value >= 0.5)
    return {name: sum(good) / len(good) for name, good in groups.items()}


def compare(prompts, before, after, gold):
    """What eval.json holds, and the before/after table on the terminal."""
    results = dict(
        score_before=before["scores"].mean().item(), score_after=after["scores"].mean().item(),
        score_std_before=before["scores"].std(correction=0).item(), kl=after["kl"],
        eos_rate_before=before["eos_rate"], eos_rate_after=after["eos_rate"], n=len(prompts),
    )  # fmt: skip
    lines = [("reward model's score", f"{results['score_before']:.2f}", f"{results['score_after']:.2f}")]
    if gold:
        results["gold_before"] = (before["gold"] >= 0.5).float().mean().item()
        results["gold_after"] = (after["gold"] >= 0.5).float().mean().item()
        lines.append(("good answers (gold judge)", f"{results['gold_before']:.1%}", f"{results['gold_after']:.1%}"))
        for key in ("kind", "task"):
            rates = [good_rates(prompts, which["gold"], key) for which in (before, after)]
            for name in sorted(rates[0]):
                results[f"gold_before_{name}"], results[f"gold_after_{name}"] = rates[0][name], rates[1][name]
                indent = "  " if key == "kind" else "    "
                lines.append((indent + name, f"{rates[0][name]:.1%}", f"{rates[1][name]:.1%}"))
    lines.append(("KL to the reference, nats", f"{before['kl']:.2f}", f"{after['kl']:.2f}"))
    print(f"\n{len(prompts)} held-out prompts{'':14}before    after")
    for name, left, right in lines:
        print(f"{name:30}{left:>9}{right:>9}")
    shown = {}
    for i, prompt in enumerate(prompts):  # the first two of each kind
        shown.setdefault(prompt.get("kind"), []).append(i)
    for i in [i for rows in shown.values() for i in rows[: 2 if len(shown) > 1 else 5]]:
        print(f"\n  {str(prompts[i]['prompt'])[-300:]}")
        print(f"    before  {before['texts'][i][:300]}\n    after   {after['texts'][i][:300]}")
    return results


def trace_table(tokenizer, response, columns):
    """One line a token of one episode; `columns` maps a name to its (T,) tensor."""
    lines = ["token".rjust(14) + "".join(name.rjust(12) for name in columns)]
    for t, token in enumerate(response):
        text = repr(tokenizer.decode([token]))[1:-1]
        lines.append(f"{text:>14}" + "".join(f"{column[t].item():12.4f}" for column in columns.values()))
    return "\n".join(lines)


def ptx_backward(policy, examples, rows, ptx_coef, micro_tokens):
    """PPO-ptx (InstructGPT): add the gradient of ptx_coef times the SFT loss on some demonstrations; returns that loss."""
    tokens = sum(sum(examples[row][1]) for row in rows)
    loss = 0
    for part in common.micro_batches([len(ids) for ids, _ in examples], micro_tokens, rows):
        batch = common.collate(examples, part, policy.device)
        logprobs = common.response_logprobs(policy, batch)  # (b, R), at temperature 1 as in sft.py
        micro_loss = -(logprobs * batch.mask).sum() / tokens
        (ptx_coef * micro_loss).backward()
        loss += micro_loss.detach()
    return loss


# ----------------------------------------------------------------------------------------------


def main(cfg):
    check(cfg)
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)
    train_rows, eval_rows = common.read_split(cfg.data, cfg.eval_data, common.EMBEDDED / "eval_prompts.jsonl")
    embedded = Path(cfg.data).parent == common.EMBEDDED
    make_missing_stages(cfg)

    micro_tokens = common.micro_tokens(cfg, device)

    # The four models. Trained ones keep float32 weights; frozen ones, and the policy's copy that samples, are bfloat16 on a GPU.
    frozen = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = common.load_tokenizer(cfg.policy)
    policy = common.load_policy(cfg.policy, device)
    ref = common.load_policy(cfg.ref or cfg.policy, device, frozen).requires_grad_(False)
    if cfg.reward_fn:
        reward, score = None, common.function_scorer(cfg.reward_fn, tokenizer)
    else:
        reward = common.load_reward(cfg.reward, device, frozen).requires_grad_(False)
        score = common.model_scorer(reward, common.load_tokenizer(cfg.reward), tokenizer, micro_tokens)
    value = load_value(cfg, device, tokenizer, reward)
    gold_fn = cfg.gold_fn or (f"{common.EMBEDDED / 'hhh.py'}:gold_score" if embedded else "")
    gold = common.function_scorer(gold_fn, tokenizer) if gold_fn else None
    eos = common.stop_ids(policy, tokenizer)

    prompts = load_prompts(train_rows, tokenizer, cfg.max_prompt_tokens)
    eval_prompts = load_prompts(eval_rows, tokenizer, cfg.max_prompt_tokens)
    ptx_examples = []
    if cfg.ptx_coef:
        ptx_examples = [common.demonstration(tokenizer, row) for row in common.read_jsonl(cfg.ptx_data)]

    for model in (policy, value):
        if cfg.gradient_checkpointing:
            model.gradient_checkpointing_enable()
    for model in (policy, ref, value):
        common.compile_layers(model, cfg.compile)
    policy_optimizer = common.make_adamw(policy, cfg.lr)
    value_optimizer = common.make_adamw(value, cfg.value_lr)
    coefs = dict(kl_coef=cfg.kl_coef, beta=cfg.beta)  # what the two KL controllers move

    before = evaluate(policy, ref, eval_prompts, tokenizer, eos, score, gold, cfg, micro_tokens)
    run.begin(
        policy=policy, value=value, policy_optimizer=policy_optimizer, value_optimizer=value_optimizer, coefs=coefs
    )
    # pi_old. Where it has the policy's dtype, the policy itself samples before it is updated.
    pi_old = policy
    if frozen != policy.dtype:
        pi_old = copy.deepcopy(policy).to(frozen).requires_grad_(False)

    epochs = 1 if cfg.objective == "pg" else cfg.ppo_epochs
    print(
        f"PPO ({cfg.objective}) on {device}: policy {policy.num_parameters() / 1e6:.1f}M, "
        f"value {value.num_parameters() / 1e6:.1f}M parameters, {len(prompts)} prompts\n"
        f"{cfg.steps} steps of {cfg.batch_size} episodes = {cfg.steps * cfg.batch_size} episodes; each step {epochs} epochs "
        f"of {cfg.minibatches} minibatches of {cfg.batch_size // cfg.minibatches}; at most {cfg.max_new_tokens} new tokens"
    )

    for step in run.steps(cfg.steps):
        # 1. Sample: pi_old answers a batch of prompts.
        clock = time.perf_counter()
        queries = [prompts[i] for i in common.epoch_batch(len(prompts), cfg.batch_size, step, cfg.seed)]
        query_ids = [query["ids"] for query in queries]
        generator = common.make_generator(device, cfg.seed, step, "rollout")
        responses = common.generate(
            pi_old, query_ids, cfg.max_new_tokens, eos, cfg.temperature, generator=generator, slots=cfg.slots
        )
        rollout_seconds = time.perf_counter() - clock

        # 2. Score: the reward model reads the whole answer; one that was cut at the limit pays.
        texts = [query["prompt"] for query in queries]
        scores = score(texts, query_ids, responses)  # (B,)
        ended = torch.tensor([float(response[-1] in eos) for response in responses])  # (B,)
        penalised = scores - cfg.missing_eos_penalty * (1 - ended)

        # Micro-batches are cut once: old log-probs and all epochs walk the same ones, so every ratio starts at exactly 1.
        examples = [common.join(query, response) for query, response in zip(query_ids, responses)]
        lengths = [len(ids) for ids, _ in examples]
        order = torch.randperm(cfg.batch_size, generator=common.make_generator("cpu", cfg.seed, step, "cut")).tolist()
        size = cfg.batch_size // cfg.minibatches
        minibatches = [
            [
                common.collate(examples, rows, device)
                for rows in common.micro_batches(lengths, micro_tokens, order[start : start + size])
            ]
            for start in range(0, cfg.batch_size, size)
        ]
        response_lengths = [len(response) for response in responses]

        B, R = cfg.batch_size, max(response_lengths)
        mask = torch.zeros(B, R, device=device)
        logprobs = torch.zeros(B, R, device=device)  # log pi_old(a_t | s_t)
        ref_logprobs = torch.zeros(B, R, device=device)
        entropy = torch.zeros(B, R, device=device)
        values = torch.zeros(B, R, device=device)  # V(s_t)
        with torch.no_grad():
            for batch in [batch for minibatch in minibatches for batch in minibatch]:
                batch.paste(mask, batch.mask)
                old, old_entropy = common.response_logprobs(policy, batch, cfg.temperature, entropy=True)
                batch.paste(logprobs, old)
                batch.paste(entropy, old_entropy)
                batch.paste(ref_logprobs, common.response_logprobs(ref, batch, cfg.temperature))
                batch.paste(values, common.response_values(value, batch))

        # 3. Advantages.
        kl = (logprobs - ref_logprobs).sum(1).mean()  # nats a response
        rewards = token_rewards(penalised.to(device), logprobs, ref_logprobs, mask, coefs["kl_coef"])  # (B, R)
        advantages, returns = common.gae(rewards, values, mask, cfg.gamma, cfg.lam)  # (B, R)
        if cfg.objective == "pg":  # the whole episode's reward for each of its tokens
            policy_advantages = rewards.sum(1, keepdim=True) * mask
        else:
            policy_advantages = whiten(advantages, mask)
        if step == 1:
            gap = (logprobs - ref_logprobs)[mask.bool()]
            run.print(f"step 1: policy - reference log-probs, mean {gap.mean():.2g}, largest {gap.abs().max():.2g}")

        # 4. K epochs of the objective on this rollout, policy and value in turn so that only one holds gradients.
        clock = time.perf_counter()
        lr = common.set_lr(policy_optimizer, cfg.lr, step, cfg.steps, cfg.warmup, cfg.lr_schedule)
        common.set_lr(value_optimizer, cfg.value_lr, step, cfg.steps, cfg.warmup, cfg.lr_schedule)
        update_rng = common.make_generator("cpu", cfg.seed, step, "update")
        history = []  # a dict of device scalars for each optimiser step
        approx_kl = 0.0
        for epoch in range(epochs):
            if cfg.stop_kl and approx_kl > cfg.stop_kl:
                break
            for index in torch.randperm(cfg.minibatches, generator=update_rng).tolist():
                minibatch = minibatches[index]
                tokens = sum(response_lengths[row] for row in order[index * size : (index + 1) * size])
                stats = {}

                for batch in minibatch:
                    share = batch.mask.sum() / tokens  # real tokens weigh the same in every micro-batch
                    new_logprobs = common.response_logprobs(policy, batch, cfg.temperature)
                    pg_loss, pg_stats = policy_loss(
                        new_logprobs, batch.cut(logprobs), batch.cut(policy_advantages), batch.mask,
                        cfg.objective, cfg.cliprange, coefs["beta"],
                    )  # fmt: skip
                    (pg_loss * share).backward()
                    for name, stat in (pg_stats | dict(pg_loss=pg_loss.detach())).items():
                        stats[name] = stats.get(name, 0) + stat * share
                if cfg.ptx_coef:
                    done = (step - 1) * epochs * cfg.minibatches + len(history)
                    rows = common.epoch_batch(len(ptx_examples), size, done + 1, cfg.seed)
                    stats["ptx_loss"] = ptx_backward(policy, ptx_examples, rows, cfg.ptx_coef, micro_tokens)
                stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                policy_optimizer.step()
                policy_optimizer.zero_grad()

                for batch in minibatch:
                    share = batch.mask.sum() / tokens
                    new_values = common.response_values(value, batch)
                    vf_loss, vf_clipfrac = value_loss(
                        new_values, batch.cut(values), batch.cut(returns), batch.mask, cfg.cliprange_value
                    )
                    (vf_loss * share).backward()
                    for name, stat in dict(vf_loss=vf_loss.detach(), vf_clipfrac=vf_clipfrac).items():
                        stats[name] = stats.get(name, 0) + stat * share
                torch.nn.utils.clip_grad_norm_(value.parameters(), cfg.max_grad_norm)
                value_optimizer.step()
                value_optimizer.zero_grad()

                history.append(stats)
                approx_kl = stats["approx_kl"].item()  # the one read by the host per optimiser step
        update_seconds = time.perf_counter() - clock

        # 5. Sync: pi_old <- pi, and the KL controllers move their coefficients.
        if pi_old is not policy:
            for old_weight, weight in zip(pi_old.parameters(), policy.parameters()):
                old_weight.data.copy_(weight.data)
        kl_coef, beta = coefs["kl_coef"], coefs["beta"]
        if cfg.kl_target:
            coefs["kl_coef"] = adapt_kl_coef(kl_coef, kl.item(), cfg.kl_target, B, cfg.kl_horizon)
        if cfg.objective == "kl":
            coefs["beta"] = adapt_beta(beta, approx_kl, cfg.beta_target)

        metrics = {name: torch.stack([stats[name] for stats in history]).mean().item() for name in history[0]}
        unexplained = masked_variance(returns - values, mask) / masked_variance(returns, mask)
        if gold:
            metrics["gold"] = (gold(texts, query_ids, responses) >= 0.5).float().mean().item()
        run.log(
            ("score", "kl", "entropy") + (("gold",) if gold else ()),
            episodes=step * B,
            score=scores.mean().item(),
            score_std=scores.std(correction=0).item(),
            score_penalised=penalised.mean().item(),
            reward=rewards.sum(1).mean().item(),
            kl=kl.item(),
            kl_coef=kl_coef,
            beta=beta,
            entropy=masked_mean(entropy, mask).item(),
            explained_variance=1 - unexplained.item(),
            response_len=sum(response_lengths) / B,
            eos_rate=ended.mean().item(),
            lr=lr,
            epochs=len(history) / cfg.minibatches,
            rollout_seconds=rollout_seconds,
            update_seconds=update_seconds,
            rollout_tokens_per_s=sum(response_lengths) / rollout_seconds,
            update_tokens_per_s=sum(lengths) * len(history) / cfg.minibatches / update_seconds,
            **metrics,
        )
        if cfg.sample_every and step % cfg.sample_every == 0:
            for i in range(min(2, B)):
                answer = tokenizer.decode(responses[i], skip_special_tokens=True)
                run.print(f"  {str(texts[i])[-200:]}  ->  {answer[:200]}  ({scores[i]:.2f})")
        if cfg.trace and step % cfg.trace == 0:
            columns = dict(
                logprob=logprobs[0], ref_logprob=ref_logprobs[0], kl=(logprobs - ref_logprobs)[0],
                reward=rewards[0], value=values[0], advantage=advantages[0], ret=returns[0],
            )  # fmt: skip
            columns["return"] = columns.pop("ret")
            run.print(f"step {step}: {str(texts[0])[-200:]}\n" + trace_table(tokenizer, responses[0], columns))

    after = evaluate(policy, ref, eval_prompts, tokenizer, eos, score, gold, cfg, micro_tokens)
    results = compare(eval_prompts, before, after, gold)
    common.write_jsonl(run.out / "samples.jsonl", [
        dict(prompt=p["prompt"], before=b, after=a, score_before=s, score_after=t)
        for p, b, a, s, t in zip(
            eval_prompts, before["texts"], after["texts"], before["scores"].tolist(), after["scores"].tolist()
        )
    ])
    run.finish(policy, tokenizer, results)


if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
