"""Stage 3, PPO-RLHF: an SFT model and a reward model -> a policy aligned with the reward.

    python ppo.py                                                # everything, the embedded world
    python ppo.py --policy my/sft --reward my/reward --data prompts.jsonl \\
        --lr 3e-6 --value_lr 1e-5 --kl_coef 0.05                 # your own

Algorithm 1; the numbers are those of the lecture's equations (README has the table). Four models:
the policy pi, its frozen reference, the frozen reward model, the value model V. Then, each step:

    1 sample      pi_old, the policy before the update, answers a batch of prompts
    2 score       the reward model scores each answer, and every token pays for leaving the
                  reference:  r_t = -kl_coef * (log pi_old(a_t|s_t) - log pi_ref(a_t|s_t)),
                  plus the score on the last token
    3 advantages  A_t = Q(s_t, a_t) - V(s_t), estimated by GAE:
                  delta_t = r_t + gamma V(s_{t+1}) - V(s_t),  A_t = delta_t + gamma lam A_{t+1};
                  the return A_t + V(s_t) is what V is to learn. With --advantage group there is
                  no V: A is an answer's total reward less the mean total of its prompt's others
    4 K epochs    on the ratio rho_t = pi(a_t|s_t) / pi_old(a_t|s_t), importance sampling, which
                  lets one rollout serve several updates. The objective is one of
                      clip  E[min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t)]   (8.20)
                      kl    E[rho_t A_t - beta KL(pi_old, pi)], beta adapted   (8.21)
                      pg    E[R log pi(a_t|s_t)], R the sum of r_t, to see it go wrong   (8.8)
                  and V learns the returns by squared error, clipped too
    5 sync        pi_old <- pi

Where this departs from the papers:
    1 Old log-probs come from the training forward, not from the sampler: every ratio starts at 1.
    2 Policy and value are separate models with separate optimisers, so no weight balances them.
    3 GAE's advantages are centred over the rollout, and scaled only with --whiten; rewards not.
    4 Means are over tokens, so a long answer weighs more than a short one. Padding weighs nothing.
    5 An answer cut at --max_new_tokens loses --missing_eos_penalty from its score.
    6 For (8.21), beta adapts to the KL that the last minibatch measured before its own update; with
      one update a step that is always 0.
"""

import time
from dataclasses import asdict, dataclass

import torch

import common
from common import flag, masked_mean, masked_variance, whiten

@dataclass
class Config(common.Settings):
    # models and data
    policy: str = flag("out/sft", "SFT model; out/sft is made if missing")
    reward: str = flag("out/reward", "reward model; out/reward is made if missing")
    reward_fn: str = flag("", "instead of --reward: file.py:function(prompts, responses)")
    ref: str = flag("", "reference model; empty: the policy as it starts")
    data: str = flag(str(common.EMBEDDED / "prompts.jsonl"), "prompts, JSONL")
    eval_data: str = flag("", "held-out prompts; empty: a part of --data")
    gold_fn: str = flag("", "file.py:function that judges answers in evaluation")
    max_prompt_tokens: int = flag(512, "longer prompts are left out", over=0)
    # 1 sample
    steps: int = flag(60, "PPO steps", over=0)
    batch_size: int = flag(128, "episodes a step", over=0)
    max_new_tokens: int = flag(48, "longest response, tokens", over=0)
    temperature: float = flag(1.0, "in sampling and in every log-prob", over=0)
    slots: int = flag(256, "sequences generated at once", over=0)
    # 2 score
    missing_eos_penalty: float = flag(1.0, "off the score of a cut response", least=0)
    kl_coef: float = flag(0.4, "reward lost per nat from the reference; often 0.05", least=0)
    kl_target: float = flag(0.0, "adapt kl_coef to this, nats a response; 0: no", least=0)
    kl_horizon: int = flag(10000, "episodes over which kl_coef adapts", over=0)
    # 3 advantages
    advantage: str = flag("gae", "by a value model or a group", choices=["gae", "group"])
    group: int = flag(4, "group: answers to each prompt", over=1)
    gamma: float = flag(1.0, "discount per token", over=0, most=1)
    lam: float = flag(0.95, "GAE: 0 trusts the value model, 1 the return", least=0, most=1)
    whiten: bool = flag(False, "advantages to variance 1, not only to mean 0")
    # 4 K epochs
    objective: str = flag("clip", "(8.20), (8.21) or (8.8)", choices=["clip", "kl", "pg"])
    ppo_epochs: int = flag(2, "K, passes over each rollout; pg takes one", over=0)
    minibatches: int = flag(1, "optimiser steps a pass", over=0)
    lr: float = flag(1e-3, "policy's peak rate; about 3e-6 for a real model", over=0)
    value_lr: float = flag(1e-3, "value model's; about 1e-5 for a real one", over=0)
    value_warmup: int = flag(0, "first steps, in which only the value model learns", least=0)
    warmup: int = flag(5, "PPO steps of linear warm-up, at most half of all", least=0)
    cliprange: float = flag(0.2, "clip: eps of the ratio", over=0, most=1)
    cliprange_value: float = flag(0.2, "how far a value may move in a step", over=0)
    beta: float = flag(1.0, "kl: the first weight of KL(pi_old, pi)", over=0)
    beta_target: float = flag(0.01, "kl: what beta adapts to, nats a token", over=0)
    stop_kl: float = flag(0.0, "end the epochs past this approx_kl; 0: never", least=0)
    ptx_coef: float = flag(0.0, "PPO-ptx: weight of the SFT loss", least=0)
    ptx_data: str = flag(str(common.EMBEDDED / "sft.jsonl"), "for PPO-ptx")
    # the run
    out: str = flag("out/ppo", "folder of the run")
    save_every: int = flag(50, "steps between checkpoints; 0: only when stopped", least=0)
    sample_every: int = flag(10, "steps between two decoded samples; 0: none", least=0)
    trace: int = flag(0, "steps between per-token tables of one episode; 0: none", least=0)

# Everything is (B, T), and entry t is about token t. For the prompt "Hi :" and the answer yes EOS:
#     ids           Hi  :   yes                    EOS
#     mask          0   0   1                      1
#     old_logprobs  0   0   log pi(yes | Hi :)     log pi(EOS | Hi : yes)
#     old_values    0   0   V(Hi :)                V(Hi : yes)           s_t: all before token t
#     rewards       0   0   -kl_coef * kl          -kl_coef * kl + score    kl: old - ref log-prob

def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """The KL penalty on every token, and the score (B,) on the last real one: (B, T)."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    positions = torch.arange(mask.shape[1], device=mask.device)  # (T,)
    last = (mask * positions).argmax(1)  # (B,): the last one where the mask is 1
    rewards[torch.arange(len(scores), device=mask.device), last] += scores
    return rewards

def group_advantages(rewards, mask, group):
    """RLOO (Ahmadian et al. 2024): an episode's total reward, less the mean total of the other
    answers to the same prompt, on each of its tokens: (B, T). A group is `group` consecutive rows.
    """
    totals = rewards.sum(1).view(-1, group)  # (B / group, group)
    others = (totals.sum(1, keepdim=True) - totals) / (group - 1)
    return (totals - others).view(-1, 1) * mask

def policy_loss(
    logprobs, old_logprobs, advantages, mask, objective="clip", cliprange=0.2, beta=0.0
):
    """The policy's loss, minus the objective (8.20), (8.21) or (8.8), as a mean over real tokens.

    Returns (loss, stats): approx_kl = KL(pi_old, pi) by the estimator (rho - 1) - log rho of
    Schulman (2020), non-negative; clipfrac, the share of tokens whose gradient the clip cuts off
    (or would, with another objective); ratio, the mean of rho.
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
    with torch.no_grad():
        cut = (clipped * advantages < ratio * advantages).float()
        measured = dict(approx_kl=kl, clipfrac=cut, ratio=ratio)
        stats = {name: masked_mean(x, mask) for name, x in measured.items()}
    return -masked_mean(gain, mask), stats

def value_loss(values, old_values, returns, mask, cliprange_value=0.2):
    """(loss, clipfrac): half the squared error, the larger of the unclipped and clipped value's."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error, clipped_error = (values - returns) ** 2, (clipped - returns) ** 2
    loss = 0.5 * masked_mean(torch.max(error, clipped_error), mask)
    return loss, masked_mean((clipped_error > error).float(), mask)

def adapt_kl_coef(kl_coef, kl, target, episodes, horizon):
    """Ziegler et al. 2019, section 2.2: let kl_coef grow or shrink with the relative error of the
    KL, capped at 20%, over a horizon of so many episodes.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return kl_coef * (1 + error * episodes / horizon)

def adapt_beta(beta, kl, target):
    """Schulman et al. 2017, section 4: halve or double beta when the KL is off by a factor 1.5."""
    if kl < target / 1.5:
        return beta / 2
    if kl > target * 1.5:
        return beta * 2
    return beta

def state_values(outputs):
    """V(s_t) from the value model's outputs (B, T). At token t it has read token t, so that is the
    value of the next state, s_{t+1}: move it one to the right.
    """
    return torch.nn.functional.pad(outputs[:, :-1], (1, 0))

def load_value(cfg, reward, device):
    """The value model starts as the reward model; where there is none that reads the policy's
    tokens, as the policy with a head of zeros.
    """
    if reward and cfg.lora_rank:
        return reward  # its adapters are the value model's: scoring switches them off
    if not reward:
        print("the value model starts from the policy with a zero head")
    start, dtype = cfg.reward if reward else cfg.policy, common.trained_dtype(cfg, device)
    value = common.load_scorer(start, device, dtype, new_head=not reward)
    common.add_lora(value, cfg)
    return value

def ptx_backward(policy, demonstrations, update, totals, cfg):
    """PPO-ptx (InstructGPT, eq. 2): add the gradient of the SFT loss on batch `update` (from 1) of
    the demonstrations, which keeps what was learned.
    """
    device, size = policy.lm.device, cfg.batch_size // cfg.minibatches
    indices = common.epoch_batch(len(demonstrations), size, update, cfg.seed)
    examples = [demonstrations[i] for i in indices]
    lengths = [len(example["ids"]) for example in examples]
    tokens = sum(sum(example["mask"]) for example in examples)
    for part in common.micro_batches(range(size), lengths, common.token_budget(cfg, device)):
        logprobs, _ = policy(common.collate([examples[i] for i in part], device))
        loss = -logprobs.sum() / tokens
        (cfg.ptx_coef * loss).backward()
        common.add_up(totals, 1.0, ptx_loss=loss)

# Looking at what it does

def trace_table(tokenizer, rollout):
    """The first episode, a line a response token; with a value model, the advantage uncentred."""
    columns = {
        "logprob": rollout["old_logprobs"],
        "ref_logprob": rollout["ref_logprobs"],
        "kl": rollout["old_logprobs"] - rollout["ref_logprobs"],
        "reward": rollout["rewards"],
        "advantage": rollout["advantages"],
    }
    if "returns" in rollout:
        values, returns = rollout["old_values"], rollout["returns"]
        columns |= {"advantage": returns - values, "value": values, "return": returns}
    lines = ["token".rjust(14) + "".join(name.rjust(12) for name in columns)]
    for t in rollout["mask"][0].nonzero().flatten().tolist():
        numbers = "".join(f"{column[0, t].item():12.4f}" for column in columns.values())
        token = tokenizer.decode([rollout["ids"][0, t].item()])
        lines.append(f"{token!r:>14}" + numbers)
    return "\n".join(lines)

def rollout_metrics(rollout, sampler_logprobs):
    """Means over real tokens; `kl` and `reward` are sums over a response, averaged.

    sampler_gap is how far the log-probs at sampling time, by pi_old one token at a time, are from
    those of the training forward. They are the same model, but for rounding.
    """
    mask = rollout["mask"]
    # Both list the response tokens of the first episode, then of the second, ...
    gaps = (torch.tensor(sampler_logprobs) - rollout["old_logprobs"][mask.bool()]).abs()
    metrics = dict(
        kl=(rollout["old_logprobs"] - rollout["ref_logprobs"]).sum(1).mean().item(),
        reward=rollout["rewards"].sum(1).mean().item(),
        entropy=masked_mean(rollout["entropy"], mask).item(),
        response_len=mask.sum(1).mean().item(),
        sampler_gap=gaps.mean().item(),
        sampler_gap_max=gaps.max().item(),
    )
    if "returns" in rollout:
        error = masked_variance(rollout["returns"] - rollout["old_values"], mask)
        variance = masked_variance(rollout["returns"], mask)
        metrics["explained_variance"] = 1 - (error / (variance + 1e-8)).item()
    return metrics

# Algorithm 1

def main(cfg):
    per_prompt = cfg.group if cfg.advantage == "group" else 1  # answers to each prompt of a rollout
    for name, number in dict(minibatches=cfg.minibatches, group=per_prompt).items():
        if cfg.batch_size % number:
            raise common.UserError(f"--batch_size: expected a multiple of --{name} {number}")
    of_gae = ["gamma", "lam", "whiten", "value_lr", "value_warmup", "cliprange_value"]
    names = of_gae if cfg.advantage == "group" else ["group"]
    given, default = asdict(cfg), asdict(Config())
    if unused := [f"--{name}" for name in names if given[name] != default[name]]:
        print(f"--advantage {cfg.advantage} has no use for {', '.join(unused)}")
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)
    train_rows, eval_rows = common.read_split(cfg.data, cfg.eval_data, "eval_prompts.jsonl")
    common.make_missing_stages(cfg)

    # The four models      by default                          with --lora_rank
    #   policy  trained    float32 weights                     adapters on the frozen SFT model
    #   ref     frozen     a second copy, bfloat16 on a GPU    the policy, its adapters off
    #   value   trained    float32, starts as the reward       adapters on the reward model
    #   reward  frozen     a copy of its own                   the value model, its adapters off
    # policy(batch, temperature) gives log-probs and entropy, value(batch) an output at each token:
    # (B, T); score(questions, responses) gives (B,).
    limit = cfg.max_prompt_tokens + cfg.max_new_tokens
    policy = common.load_policy(cfg.policy, device, common.trained_dtype(cfg, device), limit)
    tokenizer = common.load_tokenizer(cfg.policy, policy.lm)
    common.add_lora(policy, cfg)
    ref = policy
    if cfg.ref or not cfg.lora_rank:
        ref = common.load_policy(cfg.ref or cfg.policy, device, common.frozen_dtype(device), limit)
        common.prepare(ref.requires_grad_(False), cfg)
    score, reward = common.load_score(cfg, policy, tokenizer, adapters=cfg.advantage == "gae")
    value = load_value(cfg, reward, device) if cfg.advantage == "gae" else None
    gold = common.load_gold(cfg, cfg.data, tokenizer)

    models = [model for model in (policy, ref, value, reward) if model]
    eos = common.stop_ids(policy.lm, tokenizer)
    prompts = common.load_prompts(train_rows, tokenizer, cfg, *models)
    eval_prompts = common.load_prompts(eval_rows, tokenizer, cfg, *models)
    if cfg.ptx_coef:
        rows = common.read_jsonl(cfg.ptx_data)
        room = min(limit, common.context_length(policy.lm))
        demonstrations = common.load_demonstrations(rows, tokenizer, eos, room)

    B, budget = cfg.batch_size, common.token_budget(cfg, device)
    longest = max(len(p["ids"]) for p in prompts + eval_prompts) + cfg.max_new_tokens
    slots = min(cfg.slots, B // common.world_size())
    # The model that samples: the policy or a copy. Of pi_old the ratios need only `old_logprobs`.
    sampling = common.sampling_copy(policy, cfg)
    policy_optimizer = common.make_optimizer(policy, cfg, cfg.lr)
    trained = dict(policy=(policy, policy_optimizer))
    if value:
        value_optimizer = common.make_optimizer(value, cfg, cfg.value_lr)
        trained["value"] = (value, value_optimizer)
    sampler = common.Sampler(sampling, eos, cfg.max_new_tokens, longest, cfg.temperature, slots)
    evaluation = (policy, sampler, ref, eval_prompts, tokenizer, score, gold, cfg)
    before = common.answer_prompts(*evaluation)  # of the policy as it starts, in a resumed run too
    coefs = dict(kl_coef=cfg.kl_coef, beta=cfg.beta)  # what the two KL controllers move
    run.begin(**trained, coefs=coefs)
    sampler.sync(policy)  # run.begin may have loaded a checkpoint's policy

    epochs = 1 if cfg.objective == "pg" else cfg.ppo_epochs
    value_warmup = cfg.value_warmup if value else 0  # steps
    print(
        f"PPO ({cfg.objective}, {cfg.advantage}) on {device}: {' and '.join(trained)} of "
        f"{policy.lm.num_parameters() / 1e6:.1f}M parameters; {len(prompts)} prompts; {cfg.steps} "
        f"steps of {B} episodes, each {epochs} epochs of {cfg.minibatches} minibatches"
        + (f"; in the first {value_warmup} only the value model learns" if value_warmup else "")
    )

    for step in run.steps(cfg.steps):
        # 1. Sample: pi_old answers the next prompts of an endless shuffled series.
        began = time.perf_counter()
        indices = common.epoch_batch(len(prompts), B // per_prompt, step, cfg.seed)
        questions = [prompts[i] for i in indices for _ in range(per_prompt)]
        queries = [question["ids"] for question in questions]
        responses, sampler_logprobs = sampler.sample(queries, cfg.seed, step, "rollout")
        sampled = time.perf_counter()

        # 2. Score: the reward model reads each whole answer; one that was cut at the limit is
        # penalised, and every token pays for leaving the reference.
        scores = score(questions, responses)  # (B,)
        ended = torch.tensor([float(response[-1] in eos) for response in responses])  # (B,)
        penalised = scores - cfg.missing_eos_penalty * (1 - ended)
        examples = [common.join(query, response) for query, response in zip(queries, responses)]
        lengths = [len(example["ids"]) for example in examples]
        rollout = common.collate(examples)  # on the host
        mask = rollout["mask"]  # (B, T)

        def measure(batch):
            logprobs, entropy = policy(batch, cfg.temperature)  # still pi_old: no update so far
            with common.without_adapter(ref):
                ref_logprobs, _ = ref(batch, cfg.temperature)
            tensors = [logprobs, ref_logprobs, entropy]
            if value:
                tensors.append(state_values(value(batch)) * batch["mask"])
            return torch.stack(tensors, dim=-1)  # (b, t, 3 or 4)

        measured = common.evaluate(measure, examples, cfg, device).unbind(-1)
        names = ["old_logprobs", "ref_logprobs", "entropy", "old_values"]
        rollout |= dict(zip(names, measured))  # each (B, T), on the host
        rewards = token_rewards(
            penalised, rollout["old_logprobs"], rollout["ref_logprobs"], mask, coefs["kl_coef"]
        )
        rollout["rewards"] = rewards

        # 3. Advantages: how much better than expected each token did.
        if value:
            advantages, rollout["returns"] = common.gae(
                rewards, rollout["old_values"], mask, cfg.gamma, cfg.lam
            )
            rollout["advantages"] = whiten(advantages, mask, scale=cfg.whiten)
            if cfg.objective == "pg":  # (8.8): the episode's total reward R, with no baseline
                rollout["advantages"] = rewards.sum(1, keepdim=True) * mask
        else:
            rollout["advantages"] = group_advantages(rewards, mask, cfg.group)
        scored = time.perf_counter()

        # 4. K epochs of the objective on this rollout, dealt into minibatches anew in each. Policy
        # and value take turns, so that only one of them holds gradients.
        lr = common.set_lr(policy_optimizer, cfg.lr, step, cfg.steps, cfg)
        if value:
            common.set_lr(value_optimizer, cfg.value_lr, step, cfg.steps, cfg)
        shuffle = common.make_generator("cpu", cfg.seed, step, "minibatches")
        history = []  # the statistics of each minibatch
        for _ in range(epochs):
            for minibatch in torch.randperm(B, generator=shuffle).chunk(cfg.minibatches):
                parts = common.micro_batches(minibatch.tolist(), lengths, budget)
                batches = [common.take(rollout, part, device) for part in parts]
                # A micro-batch weighs as its tokens: gradients add up to that of the minibatch.
                tokens = mask[minibatch].sum()
                shares = [(mask[part].sum() / tokens).item() for part in parts]

                totals = {}
                for batch, share in zip(batches, shares):
                    logprobs, _ = policy(batch, cfg.temperature)
                    loss, tensors = policy_loss(
                        logprobs,
                        batch["old_logprobs"],
                        batch["advantages"],
                        batch["mask"],
                        objective=cfg.objective,
                        cliprange=cfg.cliprange,
                        beta=coefs["beta"],
                    )
                    (loss * share).backward()
                    common.add_up(totals, share, pg_loss=loss, **tensors)
                if cfg.ptx_coef:
                    update = (step - 1) * epochs * cfg.minibatches + len(history) + 1
                    ptx_backward(policy, demonstrations, update, totals, cfg)
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                stats = common.read_stats(totals, grad_norm=norm)  # raises where not finite
                if step > value_warmup:
                    policy_optimizer.step()
                policy_optimizer.zero_grad()
                history.append(stats)  # the value model's statistics are added to it below
                if not value:
                    continue

                totals = {}
                for batch, share in zip(batches, shares):
                    loss, clipfrac = value_loss(
                        state_values(value(batch)),
                        batch["old_values"],
                        batch["returns"],
                        batch["mask"],
                        cfg.cliprange_value,
                    )
                    (loss * share).backward()
                    common.add_up(totals, share, vf_loss=loss, vf_clipfrac=clipfrac)
                norm = torch.nn.utils.clip_grad_norm_(value.parameters(), cfg.max_grad_norm)
                stats |= common.read_stats(totals, vf_grad_norm=norm)
                value_optimizer.step()
                value_optimizer.zero_grad()
            if cfg.stop_kl and stats["approx_kl"] > cfg.stop_kl:
                break
        updated = time.perf_counter()

        # 5. Sync: pi_old <- pi, and the KL weights move towards their targets.
        sampler.sync(policy)
        metrics = {key: sum(h[key] for h in history) / len(history) for key in history[0]}
        metrics |= rollout_metrics(rollout, sum(sampler_logprobs, [])) | coefs
        if cfg.kl_target and step > value_warmup:
            kl_coef, kl = coefs["kl_coef"], metrics["kl"]
            coefs["kl_coef"] = adapt_kl_coef(kl_coef, kl, cfg.kl_target, B, cfg.kl_horizon)
        if cfg.objective == "kl" and step > value_warmup:
            last_kl = history[-1]["approx_kl"]
            coefs["beta"] = adapt_beta(coefs["beta"], last_kl, cfg.beta_target)

        # From here on nothing is learned: metrics and samples.
        if gold:
            good = gold(questions, responses) >= 0.5  # the "good answers" of README
            metrics["gold"] = good.float().mean().item()
        passes = len(history) / cfg.minibatches  # over the rollout
        run.log(
            ("score", "kl", "entropy"),
            episodes=step * B,
            score=scores.mean().item(),
            score_std=scores.std(correction=0).item(),
            score_penalised=penalised.mean().item(),
            eos_rate=ended.mean().item(),
            lr=lr,
            epochs=passes,
            rollout_seconds=sampled - began,
            score_seconds=scored - sampled,
            update_seconds=updated - scored,
            rollout_tokens_per_s=mask.sum().item() / (sampled - began),
            update_tokens_per_s=passes * sum(lengths) / (updated - scored),
            **metrics,
        )
        if cfg.sample_every and step % cfg.sample_every == 0:
            for i in range(min(2, B)):
                text = tokenizer.decode(responses[i], skip_special_tokens=True)[:200]
                question = common.as_text(questions[i]["prompt"])[-200:]
                run.print(f"  {question}  ->  {text}  ({scores[i]:.2f})")
        if cfg.trace and step % cfg.trace == 0:
            question = common.as_text(questions[0]["prompt"])[-200:]
            run.print(f"step {step}: {question}\n{trace_table(tokenizer, rollout)}")

    after = common.answer_prompts(*evaluation)
    samples, results = common.compare(eval_prompts, before=before, after=after)
    results["kl"] = sum(after["kl"]) / len(after["kl"])
    common.write_jsonl(run.out / "samples.jsonl", samples)
    run.finish(policy, tokenizer, results)
    common.print_answers(results, samples)

if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
