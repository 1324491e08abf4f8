"""Stage 3, PPO-RLHF: an SFT model and a reward model -> a policy aligned with the reward.

    python ppo.py                                                # everything, the embedded world
    python ppo.py --policy my/sft --reward my/reward --data prompts.jsonl \\
        --lr 3e-6 --value_lr 1e-5 --kl_coef 0.05                 # your own

Algorithm 1. Four models: the policy pi, its frozen reference, the frozen reward model, the value
model V. Then, each step:

    1 sample      pi_old, the policy before the update, answers a batch of prompts
    2 score       the reward model scores each answer, and every token pays for leaving the
                  reference:  r_t = -kl_coef * (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)),
                  plus the score on the last token
    3 advantages  A_t = Q(s_t, a_t) - V(s_t), estimated by GAE:
                  delta_t = r_t + gamma V(s_t+1) - V(s_t),  A_t = delta_t + gamma lam A_t+1
    4 K epochs    on the ratio rho_t = pi(a_t|s_t) / pi_old(a_t|s_t), importance sampling, which
                  lets one rollout serve several updates. The objective is one of
                      clip  E[min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t)]   (8.20)
                      kl    E[rho_t A_t - beta KL(pi_old, pi)], beta adapted   (8.21)
                      pg    E[R log pi(a_t|s_t)], to see it go wrong           (8.8)
                  and V learns the returns by squared error, clipped too
    5 sync        pi_old <- pi

Where this departs from the papers:
    1 Old log-probs come from the training forward, not from the sampler: every ratio starts at 1.
    2 Policy and value are separate models with separate optimisers, so no weight balances them.
    3 Advantages are whitened over the whole rollout; rewards are not.
    4 Means are over tokens, so a long answer weighs more than a short one. Padding weighs nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from transformers.hf_argparser import HfArg

import common
from common import masked_mean, masked_variance, whiten


# fmt: off
@dataclass
class Config:
    # models and data
    policy: str = HfArg(default="out/sft", help="SFT model; out/sft is made if missing")
    reward: str = HfArg(default="out/reward", help="reward model; out/reward is made if missing")
    reward_fn: str = HfArg(default="", help="instead: file.py:function(prompts, responses)")
    ref: str = HfArg(default="", help="reference model; empty: the policy as it starts")
    value: str = HfArg(default="", help="value model; empty: starts as the reward model")
    data: str = HfArg(default=str(common.EMBEDDED / "prompts.jsonl"), help="prompts, JSONL")
    eval_data: str = HfArg(default="", help="held-out prompts; empty: a part of --data")
    gold_fn: str = HfArg(default="", help="file.py:function that judges answers in evaluation")
    max_prompt_tokens: int = HfArg(default=512, help="longer prompts are left out")
    # 1 sample
    steps: int = HfArg(default=40, help="PPO steps")
    batch_size: int = HfArg(default=128, help="episodes a step")
    max_new_tokens: int = HfArg(default=48, help="longest response, tokens")
    temperature: float = HfArg(default=1.0, help="in sampling and in every log-prob")
    slots: int = HfArg(default=256, help="sequences generated at once")
    # 2 score
    missing_eos_penalty: float = HfArg(default=1.0, help="off the score of a cut response")
    kl_coef: float = HfArg(default=0.4, help="reward lost per nat from the reference; often 0.05")
    kl_target: float = HfArg(default=0.0, help="adapt kl_coef to this, nats a response; 0: no")
    kl_horizon: int = HfArg(default=10000, help="episodes over which kl_coef adapts")
    # 3 advantages
    gamma: float = HfArg(default=1.0, help="discount per token")
    lam: float = HfArg(default=0.95, help="GAE: 0 trusts the value model, 1 the sampled return")
    # 4 K epochs
    objective: Literal["clip", "kl", "pg"] = HfArg(default="clip", help="(8.20), (8.21) or (8.8)")
    ppo_epochs: int = HfArg(default=4, help="K, passes over each rollout; pg takes one")
    minibatches: int = HfArg(default=1, help="optimiser steps a pass")
    lr: float = HfArg(default=7e-4, help="policy's peak rate; about 3e-6 for a real model")
    value_lr: float = HfArg(default=1e-3, help="value model's; about 1e-5 for a real one")
    warmup: int = HfArg(default=5, help="PPO steps of linear warm-up")
    lr_schedule: Literal["linear", "constant"] = HfArg(default="linear", help="after the warm-up")
    cliprange: float = HfArg(default=0.2, help="clip: eps of the ratio")
    cliprange_value: float = HfArg(default=0.2, help="how far a value may move in a step")
    beta: float = HfArg(default=1.0, help="kl: the first weight of KL(pi_old, pi)")
    beta_target: float = HfArg(default=0.01, help="kl: what beta adapts to, nats a token")
    stop_kl: float = HfArg(default=0.0, help="end the epochs past this approx_kl; 0: never")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping, policy and value apart")
    ptx_coef: float = HfArg(default=0.0, help="PPO-ptx: weight of the SFT loss")
    ptx_data: str = HfArg(default=str(common.EMBEDDED / "sft.jsonl"), help="for PPO-ptx")
    micro_tokens: int = HfArg(default=0, help="padded tokens a forward; 0: 8192 CUDA, 512 CPU")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower")
    shard: bool = HfArg(default=False, help="torchrun: each process keeps a part of the weights")
    # LoRA
    lora_rank: int = HfArg(default=0, help="train adapters of this rank, not the weights; 0: off")
    lora_alpha: float = HfArg(default=32.0, help="the adapters count alpha / rank times")
    merge: bool = HfArg(default=False, help="save with the adapter merged, not the adapter alone")
    # the run
    out: str = HfArg(default="out/ppo", help="folder of the run")
    resume: bool = HfArg(default=False, help="continue the run in --out")
    overwrite: bool = HfArg(default=False, help="replace the run in --out")
    save_every: int = HfArg(default=50, help="steps between checkpoints; 0: only when stopped")
    keep: int = HfArg(default=1, help="checkpoints to keep")
    sample_every: int = HfArg(default=10, help="steps between two decoded samples; 0: none")
    trace: int = HfArg(default=0, help="steps between per-token tables of one episode; 0: none")
    tensorboard: bool = HfArg(default=False, help="log there too; pip install tensorboard")
    wandb: bool = HfArg(default=False, help="log to Weights & Biases too; pip install wandb")
    quiet: bool = HfArg(default=False, help="print nothing but errors")
    seed: int = HfArg(default=0, help="of the order of the prompts and the sampling")
    device: str = HfArg(default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compile: Literal["auto", "on", "off"] = HfArg(default="auto", help="auto: large and on CUDA")
# fmt: on


# ----------------------------------------------------------------------------------------------
# Objectives: pure functions, everything (B, T) over response tokens


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """The KL penalty on every token, and the score (B,) on the last real one: (B, T)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1).long() - 1  # (B,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def policy_loss(
    logprobs, old_logprobs, advantages, mask, objective="clip", cliprange=0.2, beta=0.0
):
    """The policy's loss, minus the objective (8.20), (8.21) or (8.8), as a mean over real tokens.

    Returns (loss, stats): approx_kl = KL(pi_old, pi) by the estimator (rho - 1) - log rho of
    Schulman (2020), non-negative; clipfrac, the share of tokens whose gradient the clip cut off;
    ratio, the mean of rho.
    """
    logratio = (logprobs - old_logprobs) * mask
    ratio = logratio.exp()
    kl = (ratio - 1) - logratio
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    if objective == "clip":
        # The smaller of the two: nothing is gained by moving the ratio further than eps in the
        # direction of A.
        gain = torch.min(ratio * advantages, clipped * advantages)
    elif objective == "kl":
        gain = ratio * advantages - beta * kl
    elif objective == "pg":
        gain = logprobs * advantages
    else:
        raise ValueError(f"objective {objective!r}: expected clip, kl or pg")
    mean = partial(masked_mean, mask=mask)
    with torch.no_grad():
        cut = (clipped * advantages < ratio * advantages).float()
        stats = dict(approx_kl=mean(kl), clipfrac=mean(cut), ratio=mean(ratio))
    return -mean(gain), stats


def value_loss(values, old_values, returns, mask, cliprange_value=0.2):
    """Half the squared error, of the new or the clipped value, the worse: (loss, clipfrac)."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(error, clipped_error), mask)
    return loss, masked_mean((clipped_error > error).float(), mask).detach()


def adapt_kl_coef(kl_coef, kl, target, episodes, horizon):
    """Ziegler et al. 2019, section 2.2: proportional, in log space, the error capped at 20%."""
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)


def adapt_beta(beta, kl, target):
    """Schulman et al. 2017, section 4: halve or double beta when the KL is off by a factor 1.5."""
    if kl < target / 1.5:
        return beta / 2
    if kl > target * 1.5:
        return beta * 2
    return beta


# ----------------------------------------------------------------------------------------------
# Set-up


def check(cfg):
    over_0 = """max_prompt_tokens steps max_new_tokens temperature slots kl_horizon ppo_epochs
        value_lr cliprange_value beta beta_target"""
    from_0 = "missing_eos_penalty kl_coef kl_target lam stop_kl ptx_coef sample_every trace"
    most = dict(minibatches=(0, cfg.batch_size), gamma=(0, 1), lam=(-1, 1), cliprange=(0, 1))
    common.require(cfg, over_0, from_0, **most)
    if cfg.batch_size % cfg.minibatches:
        sizes = f"--batch_size {cfg.batch_size}, --minibatches {cfg.minibatches}"
        raise common.UserError(f"{sizes}: the one is not divisible by the other")


def load_value(cfg, device, dtype, tokenizer, reward, reward_tokenizer):
    """From --value; else the reward model if it scores the policy's tokens; else the policy."""
    if cfg.value:
        value = common.load_reward(cfg.value, device, dtype)
        if not value.scores_tokens:
            raise common.UserError(f"--value {cfg.value}: not causal, so no value for each token")
        return value
    if reward is not None and reward.scores_tokens:
        if reward_tokenizer.get_vocab() == tokenizer.get_vocab():
            value = common.load_reward(cfg.reward, device, dtype)
            if cfg.lora_rank:
                common.share_weights(reward, value)
            return value
    print("the value model starts from the policy with a zero head")
    value = common.load_backbone(cfg.policy, device, dtype)
    value.score.float().weight.data.zero_()
    return value


# ----------------------------------------------------------------------------------------------
# The rollout and the two updates


@dataclass
class Rollout:
    """What B episodes leave behind, all (B, R) over response tokens and 0 past a response's end."""

    mask: torch.Tensor
    logprobs: torch.Tensor  # log pi_old(a_t | s_t)
    ref_logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor  # V(s_t), before the update
    rewards: torch.Tensor = None
    advantages: torch.Tensor = None  # what the policy's update uses
    returns: torch.Tensor = None  # what the value model learns


def cut_minibatches(examples, cfg, device, step):
    """Shuffle the episodes into minibatches, each cut into micro-batches of similar length.

    They are cut once per rollout: the old log-probs and every epoch walk the same micro-batches
    with the same forward, which is why every ratio is exactly 1 before the first update (within
    bfloat16 rounding where layers are compiled, once with and once without gradients).
    """
    generator = common.make_generator("cpu", cfg.seed, step, "minibatches")
    parts = torch.randperm(len(examples), generator=generator).chunk(cfg.minibatches)
    budget = common.token_budget(cfg, device)
    return [
        list(common.batches(examples, budget, device, common.share(part.tolist())))
        for part in parts
    ]


@torch.no_grad()
def read_rollout(policy, ref, value, minibatches, responses, temperature):
    """Log-probs of the responses under pi_old and the reference, and V before each token."""
    B, R = len(responses), max(map(len, responses))
    rollout = Rollout(*(torch.zeros(B, R, device=policy.device) for _ in range(5)))
    for batch in [batch for minibatch in minibatches for batch in minibatch]:
        logprobs, entropy = common.response_logprobs(policy, batch, temperature, entropy=True)
        batch.paste(rollout.mask, batch.mask)
        batch.paste(rollout.logprobs, logprobs)
        batch.paste(rollout.entropy, entropy)
        batch.paste(rollout.ref_logprobs, common.response_logprobs(ref, batch, temperature))
        batch.paste(rollout.values, common.response_values(value, batch))
    common.all_sum(*(x for x in vars(rollout).values() if x is not None))  # each read its share
    return rollout


def token_shares(batches):
    """Each batch with its share of the real tokens of all of them, on all processes. Weighted so,
    every token counts the same, and the gradient does not depend on how a minibatch was cut.
    """
    counts = [batch.mask.sum() for batch in batches]
    total = sum(counts)
    if batches:  # none without PPO-ptx
        common.all_sum(total)
    return [(batch, count / total) for batch, count in zip(batches, counts)]


def update_policy(policy, optimizer, minibatch, rollout, beta, ptx_batches, cfg):
    """One optimiser step on the objective; returns its statistics."""
    totals = {}
    for batch, share in token_shares(minibatch):
        logprobs = common.response_logprobs(policy, batch, cfg.temperature)  # (b, R)
        loss, stats = policy_loss(
            logprobs, batch.cut(rollout.logprobs), batch.cut(rollout.advantages), batch.mask,
            cfg.objective, cfg.cliprange, beta,
        )  # fmt: skip
        (loss * share).backward()
        add_stats(totals, share, stats | dict(pg_loss=loss.detach()))
    # PPO-ptx (InstructGPT, eq. 2): the SFT loss keeps what was learned.
    for batch, share in token_shares(ptx_batches):
        loss = -masked_mean(common.response_logprobs(policy, batch), batch.mask)
        (cfg.ptx_coef * loss * share).backward()
        add_stats(totals, share, dict(ptx_loss=loss.detach()))
    ids = (row for batch in minibatch for row in batch.ids)
    return common.optimizer_step(policy, optimizer, totals, ids, cfg)


def update_value(value, optimizer, minibatch, rollout, cfg):
    """One optimiser step of the value model towards the returns; returns its statistics."""
    totals = {}
    for batch, share in token_shares(minibatch):
        values = common.response_values(value, batch)  # (b, R)
        loss, clipfrac = value_loss(
            values, batch.cut(rollout.values), batch.cut(rollout.returns), batch.mask,
            cfg.cliprange_value,
        )  # fmt: skip
        (loss * share).backward()
        add_stats(totals, share, dict(vf_loss=loss.detach(), vf_clipfrac=clipfrac))
    ids = (row for batch in minibatch for row in batch.ids)
    stats = common.optimizer_step(value, optimizer, totals, ids, cfg)
    stats["vf_grad_norm"] = stats.pop("grad_norm")
    return stats


def add_stats(totals, share, stats):
    for name, stat in stats.items():
        totals[name] = totals.get(name, 0) + stat * share


def ptx_batches(demonstrations, number, cfg, device):
    """Micro-batches of as many demonstrations as a minibatch has episodes; none without PPO-ptx."""
    if not demonstrations:
        return []
    size = cfg.batch_size // cfg.minibatches
    rows = common.epoch_batch(len(demonstrations), size, number, cfg.seed)
    budget = common.token_budget(cfg, device)
    return list(common.batches(demonstrations, budget, device, common.share(rows)))


def rollout_metrics(rollout, sampler_logprobs):
    """Means over real tokens; `kl` and `reward` are sums over a response, averaged.

    sampler_gap is how far the log-probs at sampling time, by pi_old one token at a time, are from
    those of the training forward. They are the same model, but for rounding.
    """
    errors = masked_variance(rollout.returns - rollout.values, rollout.mask)
    variance = masked_variance(rollout.returns, rollout.mask)
    gap = {}
    if sampler_logprobs:  # not where transformers generated
        gaps = common.pad_right(sampler_logprobs, rollout.mask.device) - rollout.logprobs
        gap["sampler_gap"] = masked_mean(gaps.abs(), rollout.mask).item()
        gap["sampler_gap_max"] = gaps.abs().max().item()
    return gap | dict(
        kl=(rollout.logprobs - rollout.ref_logprobs).sum(1).mean().item(),
        reward=rollout.rewards.sum(1).mean().item(),
        entropy=masked_mean(rollout.entropy, rollout.mask).item(),
        explained_variance=1 - (errors / (variance + 1e-8)).item(),
    )


def speeds(times, examples, passes, models, device):
    """Seconds and tokens/s of the parts of a step, between the `times`; MFU where it is known."""
    rollout, scoring, update = (end - start for start, end in zip(times, times[1:]))
    tokens = sum(len(ids) for ids, _ in examples)
    new_tokens = sum(sum(mask) for _, mask in examples)
    flops = passes * common.training_flops(models, tokens, new_tokens)
    return dict(
        rollout_seconds=rollout, score_seconds=scoring, update_seconds=update,
        rollout_tokens_per_s=new_tokens / rollout, score_tokens_per_s=tokens / scoring,
        update_tokens_per_s=passes * tokens / update,
    ) | common.utilisation(flops, update, device)  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Looking at what it does


def trace_table(tokenizer, response, rollout):
    """The first episode of the rollout, one line a token."""
    columns = {
        "logprob": rollout.logprobs,
        "ref_logprob": rollout.ref_logprobs,
        "kl": rollout.logprobs - rollout.ref_logprobs,
        "reward": rollout.rewards,
        "value": rollout.values,
        "advantage": rollout.returns - rollout.values,  # before whitening
        "return": rollout.returns,
    }
    lines = ["token".rjust(14) + "".join(name.rjust(12) for name in columns)]
    for t, token in enumerate(response):
        numbers = "".join(f"{column[0, t].item():12.4f}" for column in columns.values())
        lines.append(f"{tokenizer.decode([token])!r:>14}" + numbers)
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# Algorithm 1


def main(cfg):
    check(cfg)
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)
    train_rows, eval_rows = common.read_split(cfg.data, cfg.eval_data, "eval_prompts.jsonl")
    common.make_missing_stages(cfg)

    # The four models. What is trained has float32 weights; what is frozen, and the copy of the
    # policy that samples, is bfloat16 on a GPU.
    trained_dtype, frozen_dtype = common.trained_dtype(cfg, device), common.frozen_dtype(device)
    tokenizer = common.load_tokenizer(cfg.policy)
    policy = common.load_policy(cfg.policy, device, trained_dtype)
    ref = common.load_policy(cfg.ref or cfg.policy, device, frozen_dtype).requires_grad_(False)
    if cfg.lora_rank and not cfg.ref:  # the reference is the policy without its adapter
        common.share_weights(ref, policy)
    common.shard(ref, cfg)
    policy_optimizer = common.make_trainable(policy, cfg, cfg.lr)
    score, reward, reward_tokenizer = common.load_scorer(cfg, tokenizer, device, frozen_dtype)
    value = load_value(cfg, device, trained_dtype, tokenizer, reward, reward_tokenizer)
    value_optimizer = common.make_trainable(value, cfg, cfg.value_lr)
    pi_old = policy  # samples before it is updated; a copy only where it must be another one
    if frozen_dtype != trained_dtype or cfg.shard:
        pi_old = common.load_policy(cfg.policy, device, frozen_dtype).requires_grad_(False)
    eos = common.stop_ids(policy, tokenizer)
    gold = common.load_gold(cfg.gold_fn, cfg.data, tokenizer)

    longest = min(common.prompt_room(model, cfg) for model in (policy, ref, value))
    prompts = common.load_prompts(train_rows, tokenizer, longest)
    eval_prompts = common.load_prompts(eval_rows, tokenizer, longest)
    demonstrations = []
    if cfg.ptx_coef:
        rows = common.read_jsonl(cfg.ptx_data)
        limit = common.context_length(policy)
        demonstrations = common.load_demonstrations(rows, tokenizer, limit)

    frozen_models = {ref, pi_old, reward} - {policy, None}
    for model in frozen_models:
        common.compile_layers(model, cfg.compile)
    coefs = dict(kl_coef=cfg.kl_coef, beta=cfg.beta)  # what the two KL controllers move

    cached = min(cfg.slots, cfg.batch_size) * (
        max(len(p["ids"]) for p in prompts) + cfg.max_new_tokens
    )
    common.print_memory_plan(device, cfg, [policy, value], frozen_models, pi_old, cached)

    judges = dict(tokenizer=tokenizer, eos=eos, score=score, gold=gold, cfg=cfg)
    evaluate = partial(common.evaluate, policy, pi_old, ref, **judges)
    answers, unseen = dict(before=evaluate(eval_prompts)), {}
    if common.is_embedded(cfg.data):  # words that no training file holds, so nothing teaches them
        rows = common.read_jsonl(common.EMBEDDED / "probe_prompts.jsonl")
        probes = common.load_prompts(rows, tokenizer, longest)
        unseen["before"] = evaluate(probes)
    optimizers = dict(policy_optimizer=policy_optimizer, value_optimizer=value_optimizer)
    run.begin(policy=policy, value=value, coefs=coefs, **optimizers)
    common.copy_weights(policy, pi_old)

    B = cfg.batch_size
    epochs = 1 if cfg.objective == "pg" else cfg.ppo_epochs
    print(
        f"PPO ({cfg.objective}) on {device}: policy {policy.num_parameters() / 1e6:.1f}M, value "
        f"{value.num_parameters() / 1e6:.1f}M parameters; {len(prompts)} prompts, "
        f"{len(eval_prompts)} held out\n{cfg.steps} steps of {B} episodes = {cfg.steps * B}; "
        f"each step {epochs} epochs of {cfg.minibatches} minibatches of {B // cfg.minibatches}; "
        f"at most {cfg.max_new_tokens} new tokens"
    )

    for step in run.steps(cfg.steps):
        # 1. Sample: pi_old answers a batch of prompts.
        times = [common.clock(device)]
        queries = [prompts[i] for i in common.epoch_batch(len(prompts), B, step, cfg.seed)]
        texts, query_ids = [q["prompt"] for q in queries], [q["ids"] for q in queries]
        generator = common.make_generator(device, cfg.seed, step, "rollout", shared=False)
        sampled = common.generate(
            pi_old, common.share(query_ids), cfg.max_new_tokens, eos, cfg.temperature,
            generator=generator, slots=cfg.slots, logprobs=True,
        )  # fmt: skip
        responses, sampler_logprobs = map(common.gather, sampled)
        times.append(common.clock(device))

        # 2. Score: the reward model reads each whole answer; one cut at the limit pays for that,
        # and every token pays for leaving the reference.
        scores = common.score_all(score, texts, query_ids, responses)  # (B,)
        ended = torch.tensor([float(response[-1] in eos) for response in responses])  # (B,)
        penalised = scores - cfg.missing_eos_penalty * (1 - ended)
        examples = [common.join(query, response) for query, response in zip(query_ids, responses)]
        minibatches = cut_minibatches(examples, cfg, device, step)
        rollout = read_rollout(policy, ref, value, minibatches, responses, cfg.temperature)
        rollout.rewards = token_rewards(
            penalised.to(device), rollout.logprobs, rollout.ref_logprobs, rollout.mask,
            coefs["kl_coef"],
        )  # fmt: skip

        # 3. Advantages: how much better than expected each token did.
        advantages, rollout.returns = common.gae(
            rollout.rewards, rollout.values, rollout.mask, cfg.gamma, cfg.lam
        )
        rollout.advantages = whiten(advantages, rollout.mask)
        if cfg.objective == "pg":  # the whole episode's reward for every token, good or bad
            rollout.advantages = rollout.rewards.sum(1, keepdim=True) * rollout.mask

        # 4. K epochs of the objective on this rollout. Policy and value take turns, so that only
        # one of them holds gradients.
        times.append(common.clock(device))
        common.set_lr(value_optimizer, cfg.value_lr, step, cfg.steps, cfg.warmup, cfg.lr_schedule)
        lr = common.set_lr(policy_optimizer, cfg.lr, step, cfg.steps, cfg.warmup, cfg.lr_schedule)
        shuffle = common.make_generator("cpu", cfg.seed, step, "epochs")
        history = []  # the statistics of each optimiser step
        for _ in range(epochs):
            for i in torch.randperm(cfg.minibatches, generator=shuffle).tolist():
                number = (step - 1) * epochs * cfg.minibatches + len(history) + 1
                ptx = ptx_batches(demonstrations, number, cfg, device)
                stats = update_policy(
                    policy, policy_optimizer, minibatches[i], rollout, coefs["beta"], ptx, cfg
                )
                stats |= update_value(value, value_optimizer, minibatches[i], rollout, cfg)
                history.append(stats)
            if cfg.stop_kl and stats["approx_kl"] > cfg.stop_kl:
                break
        times.append(common.clock(device))

        # 5. Sync: pi_old <- pi.
        common.copy_weights(policy, pi_old)

        metrics = {k: sum(h[k] for h in history) / len(history) for k in history[0]}
        metrics |= rollout_metrics(rollout, sampler_logprobs) | coefs
        if gold:
            good = gold(texts, query_ids, responses) >= 0.5
            metrics["gold"] = good.float().mean().item()
        if cfg.kl_target:
            coefs["kl_coef"] = adapt_kl_coef(
                coefs["kl_coef"], metrics["kl"], cfg.kl_target, B, cfg.kl_horizon
            )
        if cfg.objective == "kl":
            coefs["beta"] = adapt_beta(coefs["beta"], stats["approx_kl"], cfg.beta_target)
        if step == 1:
            gap = (rollout.logprobs - rollout.ref_logprobs).abs().max().item()
            run.print(f"step 1: KL to the reference {metrics['kl']:.2g}, largest gap {gap:.2g}")
        passes = len(history) / cfg.minibatches  # over the rollout, by each of the two models
        metrics |= speeds(times, examples, passes, (policy, value), device)
        run.log(
            ("score", "kl", "entropy") + (("gold",) if gold else ()),
            episodes=step * B,
            score=scores.mean().item(),
            score_std=scores.std(correction=0).item(),
            score_penalised=penalised.mean().item(),
            response_len=rollout.mask.sum().item() / B,
            eos_rate=ended.mean().item(),
            lr=lr,
            epochs=passes,
            **metrics,
        )
        if cfg.sample_every and step % cfg.sample_every == 0:
            for i in range(min(2, B)):
                answer = tokenizer.decode(responses[i], skip_special_tokens=True)
                prompt = common.as_text(texts[i])[-200:]
                run.print(f"  {prompt}  ->  {answer[:200]}  ({scores[i]:.2f})")
        if cfg.trace and step % cfg.trace == 0:
            run.print(f"step {step}: {common.as_text(texts[0])[-200:]}")
            run.print(trace_table(tokenizer, responses[0], rollout))

    answers["after"] = evaluate(eval_prompts)
    results = common.summarise(eval_prompts, **answers) | dict(kl=answers["after"]["kl"])
    if unseen:
        unseen["after"] = evaluate(probes)
        for when, own in unseen.items():
            results[f"gold_{when}_unseen_words"] = (own["gold"] >= 0.5).float().mean().item()
    common.print_table(results, eval_prompts, **answers)
    common.write_samples(run.out / "samples.jsonl", eval_prompts, **answers)
    run.finish(policy, tokenizer, results)


if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
