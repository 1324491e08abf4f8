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
    6 For (8.21), beta adapts to the KL before a step's last update: 0 where a step has only one.
"""

import time
from collections import defaultdict
from dataclasses import asdict, dataclass

import torch

import common
from common import flag, gae, masked_mean, masked_variance, whiten  # flag: default, help, limits

@dataclass
class Config(common.Settings):  # what all stages share: folder, seed, device, LoRA, ...
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
    rows = torch.arange(mask.shape[0], device=mask.device)  # (B,)
    positions = torch.arange(mask.shape[1], device=mask.device)  # (T,)
    last = (mask * positions).argmax(1)  # (B,): the last position where the mask is 1
    rewards[rows, last] += scores
    return rewards

def group_advantages(rewards, mask, group):
    """RLOO (Ahmadian et al. 2024): an episode's total reward less the mean total of the `group` - 1
    other answers to its prompt, on each of its tokens: (B, T).
    """
    totals = rewards.sum(1).view(-1, group)  # (B / group, group): a prompt's answers in a row
    others = totals.sum(1, keepdim=True) - totals  # their sum
    advantages = totals - others / (group - 1)
    return advantages.view(-1, 1) * mask  # (B, 1) * (B, T): the same on every token

def policy_loss(
    logprobs, old_logprobs, advantages, mask, objective="clip", cliprange=0.2, beta=0.0
):
    """Minus the objective (8.20), (8.21) or (8.8), a mean over real tokens; all inputs (B, T).

    Returns (loss, stats): approx_kl, of pi_old from pi; clipfrac, the share of tokens that the clip
    stops; ratio, its mean. Raises ValueError for another objective.
    """
    logratio = (logprobs - old_logprobs) * mask  # (B, T)
    ratio = logratio.exp()  # rho_t; 1 on padding
    kl = (ratio - 1) - logratio  # Schulman (2020): never negative, its mean is KL(pi_old, pi)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    if objective == "clip":
        gain = torch.min(unclipped, clipped)  # no more to gain once the ratio has moved by eps
    elif objective == "kl":
        gain = unclipped - beta * kl
    elif objective == "pg":
        gain = logprobs * advantages  # no ratio: right for one update only
    else:
        raise ValueError(f"objective {objective!r}: expected clip, kl or pg")
    with torch.no_grad():
        cut = (clipped < unclipped).float()  # 1 where the clip stops the gradient, or would
        stats = dict(approx_kl=masked_mean(kl, mask), clipfrac=masked_mean(cut, mask))
        stats["ratio"] = masked_mean(ratio, mask)
    return -masked_mean(gain, mask), stats

def value_loss(values, old_values, returns, mask, cliprange_value=0.2):
    """(loss, clipfrac): half the squared error, the larger of the unclipped and clipped value's."""
    change = (values - old_values).clamp(-cliprange_value, cliprange_value)  # (B, T)
    clipped = old_values + change
    error = (values - returns) ** 2
    clipped_error = (clipped - returns) ** 2
    cut = (clipped_error > error).float()  # where it moved too far: no gradient
    loss = 0.5 * masked_mean(torch.max(error, clipped_error), mask)
    return loss, masked_mean(cut, mask)

def adapt_coefs(coefs, kl, approx_kl, cfg):
    """Move kl_coef and beta so that the KLs that they weigh come nearer to their targets."""
    if cfg.kl_target:  # Ziegler et al. 2019, section 2.2: by the relative error, at most 20%
        error = max(-0.2, min(0.2, kl / cfg.kl_target - 1))
        coefs["kl_coef"] *= 1 + error * cfg.batch_size / cfg.kl_horizon
    if cfg.objective == "kl":  # Schulman et al. 2017, section 4
        if approx_kl < cfg.beta_target / 1.5:
            coefs["beta"] /= 2
        elif approx_kl > cfg.beta_target * 1.5:
            coefs["beta"] *= 2

def state_values(outputs):
    """V(s_t), (B, T): a value model that has read token t puts out V(s_{t+1}), one too far left."""
    return torch.nn.functional.pad(outputs[:, :-1], (1, 0))

def load_value(cfg, reward, device):
    """The value model starts as the reward model, or else as the policy with a head of zeros."""
    if reward and cfg.lora_rank:
        return reward  # its adapters are the value model's: scoring switches them off
    if not reward:  # or it does not read the policy's tokens
        print("the value model starts from the policy with a zero head")
    start = cfg.reward if reward else cfg.policy
    value = common.load_scorer(start, device, frozen=cfg.lora_rank, new_head=not reward)
    common.add_lora(value, cfg)
    return value

def make_rollout(queries, responses, policy, ref, value, cfg):
    """What the models say of each token before the update, in the form above; on the host."""
    examples = [common.join(query, response) for query, response in zip(queries, responses)]

    def measure(batch):  # a micro-batch on the device; no gradients
        tensors = list(common.both_logprobs(policy, ref, batch, cfg.temperature))  # (b, t) each
        if value:
            tensors.append(state_values(value(batch)) * batch["mask"])
        return torch.stack(tensors, dim=-1)  # (b, t, 3 or 4)

    measured = common.evaluate(measure, examples, cfg, policy.lm.device)  # (B, T, 3 or 4)
    names = ["old_logprobs", "ref_logprobs", "entropy", "old_values"]  # as in `tensors`
    tensors = measured.unbind(-1)  # 3 or 4 of (B, T)
    return common.collate(examples) | dict(zip(names, tensors))

def weighted_parts(rollout, minibatch, lengths, cfg, device):
    """The episodes `minibatch` in parts that fit the device, each with its share of the tokens."""
    tokens = rollout["mask"][minibatch].sum()  # response tokens
    budget = common.token_budget(cfg, device)  # padded tokens a part
    parts = []
    for part in common.micro_batches(minibatch.tolist(), lengths, budget):
        share = rollout["mask"][part].sum() / tokens  # parts' means times these add up
        batch = common.take(rollout, part, device)  # (b, t), t the longest of them
        parts.append((batch, share.item()))
    return parts

def ptx_backward(policy, demonstrations, update, totals, cfg):
    """PPO-ptx (InstructGPT, eq. 2): add the SFT loss's gradient, which keeps what was learned."""
    device = policy.lm.device
    size = cfg.batch_size // cfg.minibatches  # as many as the episodes of a minibatch
    rows = common.epoch_batch(len(demonstrations), size, update, cfg.seed)  # update: from 1
    lengths = {i: len(demonstrations[i]["ids"]) for i in rows}
    tokens = sum(sum(demonstrations[i]["mask"]) for i in rows)  # to be learned, in the whole batch
    for part in common.micro_batches(rows, lengths, common.token_budget(cfg, device)):
        batch = common.collate([demonstrations[i] for i in part], device)
        logprobs, _ = policy(batch)  # (b, t), at temperature 1
        loss = -logprobs.sum() / tokens  # the parts add up to the batch's mean
        (cfg.ptx_coef * loss).backward()
        totals["ptx_loss"] += loss.detach()

# Looking at what it does

def print_samples(run, questions, responses, scores, rollout, tokenizer, cfg):
    """Now and then: two answers, and with --trace the first one token by token."""
    sampled, traced = (n and run.step % n == 0 for n in (cfg.sample_every, cfg.trace))
    if not sampled and not traced:
        return
    queries = [question["ids"] for question in questions[:2]]
    asked = [tokenizer.decode(query, skip_special_tokens=True)[-200:] for query in queries]
    if sampled:
        for question, response, score in zip(asked, responses, scores):
            text = tokenizer.decode(response, skip_special_tokens=True)[:200]
            run.bar.write(f"  {question}  ->  {text}  ({score:.2f})")
    if traced:
        run.bar.write(f"step {run.step}: {asked[0]}\n{trace_table(tokenizer, rollout)}")

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
        columns["advantage"] = rollout["returns"] - rollout["old_values"]
        columns["value"] = rollout["old_values"]
        columns["return"] = rollout["returns"]
    lines = ["token".rjust(14) + "".join(name.rjust(12) for name in columns)]
    for t in rollout["mask"][0].nonzero().flatten().tolist():  # of the response
        token = tokenizer.decode([rollout["ids"][0, t].item()])
        numbers = [f"{column[0, t].item():12.4f}" for column in columns.values()]
        lines.append(f"{token!r:>14}" + "".join(numbers))
    return "\n".join(lines)

def rollout_metrics(rollout, sampler_logprobs):
    """Means over real tokens; `kl` and `reward` are sums over a response, averaged."""
    mask = rollout["mask"]
    kl = rollout["old_logprobs"] - rollout["ref_logprobs"]  # (B, T), nats; 0 on padding
    sampled = torch.tensor(sum(sampler_logprobs, []))  # (N,): one response after the other
    trained = rollout["old_logprobs"][mask.bool()]  # (N,): likewise
    gaps = (sampled - trained).abs()  # the sampler's forward against the training one: rounding
    metrics = dict(
        kl=kl.sum(1).mean().item(),
        reward=rollout["rewards"].sum(1).mean().item(),
        entropy=masked_mean(rollout["entropy"], mask).item(),
        response_len=mask.sum(1).mean().item(),
        sampler_gap=gaps.mean().item(),
        sampler_gap_max=gaps.max().item(),
    )
    if "returns" in rollout:
        returns = rollout["returns"]
        error = masked_variance(returns - rollout["old_values"], mask)
        variance = masked_variance(returns, mask)
        unexplained = error / (variance + 1e-8)
        metrics["explained_variance"] = 1 - unexplained.item()  # 1: V foretells every return
    return metrics

def main(cfg):  # Algorithm 1
    B = cfg.batch_size
    by_value = cfg.advantage == "gae"
    per_prompt = 1 if by_value else cfg.group  # answers to each prompt of a rollout
    if B % cfg.minibatches:
        raise common.UserError(f"--batch_size: no multiple of --minibatches {cfg.minibatches}")
    if B % per_prompt:
        raise common.UserError(f"--batch_size: no multiple of --group {per_prompt}")
    of_gae = ["gamma", "lam", "whiten", "value_lr", "value_warmup", "cliprange_value"]
    names = ["group"] if by_value else of_gae
    given, default = asdict(cfg), asdict(Config())
    unused = [f"--{name}" for name in names if given[name] != default[name]]
    if unused:
        print(f"--advantage {cfg.advantage} has no use for {', '.join(unused)}")
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)  # the folder --out: metrics, checkpoints, the result
    train_rows, eval_rows = common.read_split(cfg.data, cfg.eval_data, "eval_prompts.jsonl")
    common.make_missing_stages(cfg)  # out/sft and out/reward

    # The four models      by default                          with --lora_rank
    #   policy  trained    float32 weights                     adapters on the frozen SFT model
    #   ref     frozen     a second copy, bfloat16 on a GPU    the policy, its adapters off
    #   value   trained    float32, starts as the reward       adapters on the reward model
    #   reward  frozen     a copy of its own                   the value model, its adapters off
    # policy(batch, temperature) gives log-probs and entropy, value(batch) an output at each token:
    # (B, T); score(questions, responses) gives (B,).
    limit = cfg.max_prompt_tokens + cfg.max_new_tokens  # tokens of an episode
    policy = common.load_policy(cfg.policy, device, limit, frozen=cfg.lora_rank)
    tokenizer = common.load_tokenizer(cfg.policy, policy.lm)
    common.add_lora(policy, cfg)  # only with --lora_rank
    ref = policy
    if cfg.ref or not cfg.lora_rank:
        ref = common.load_policy(cfg.ref or cfg.policy, device, limit, frozen=True)
        common.prepare(ref.requires_grad_(False), cfg)  # compile and shard, where asked for
    score, reward = common.load_score(cfg, policy, tokenizer, adapters=by_value)
    value = load_value(cfg, reward, device) if by_value else None
    gold = common.load_gold(cfg, cfg.data, tokenizer)  # a judge for the metrics, or None

    models = [model for model in (policy, ref, value, reward) if model]
    ends = common.stop_ids(policy.lm, tokenizer)  # ids that end a response
    prompts = common.load_prompts(train_rows, tokenizer, cfg, *models)  # that fit all models
    eval_prompts = common.load_prompts(eval_rows, tokenizer, cfg, *models)
    if cfg.ptx_coef:
        rows = common.read_jsonl(cfg.ptx_data)
        room = min(limit, common.context_length(policy.lm))
        demonstrations = common.load_demonstrations(rows, tokenizer, ends, room)

    longest = max(len(p["ids"]) for p in prompts + eval_prompts) + cfg.max_new_tokens
    slots = min(cfg.slots, B // common.world_size())  # each process samples its share
    sampling = common.sampling_copy(policy, cfg)  # pi_old: the policy itself, or a copy
    policy_optimizer = common.make_optimizer(policy, cfg, cfg.lr)
    trained = dict(policy=(policy, policy_optimizer))
    if value:
        value_optimizer = common.make_optimizer(value, cfg, cfg.value_lr)
        trained["value"] = (value, value_optimizer)
    sampler = common.Sampler(sampling, ends, cfg.max_new_tokens, longest, cfg.temperature, slots)
    evaluation = (policy, sampler, ref, eval_prompts, tokenizer, score, gold, cfg)
    before = common.answer_prompts(*evaluation)  # of the policy as it starts, in a resumed run too
    coefs = dict(kl_coef=cfg.kl_coef, beta=cfg.beta)  # what the two KL controllers move
    run.begin(**trained, coefs=coefs)  # what a checkpoint holds; --resume loads it
    sampler.sync(policy)  # run.begin may have loaded a checkpoint's policy

    epochs = 1 if cfg.objective == "pg" else cfg.ppo_epochs  # K
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
        questions = [prompts[i] for i in indices for _ in range(per_prompt)]  # B rows of data
        queries = [question["ids"] for question in questions]
        responses, sampler_logprobs = sampler.sample(queries, cfg.seed, step, "rollout")  # B lists
        lengths = [len(query) + len(response) for query, response in zip(queries, responses)]
        sampled = time.perf_counter()

        # 2. Score: the reward model reads each answer; every token pays for leaving the reference.
        scores = score(questions, responses)  # (B,)
        ended = torch.tensor([float(response[-1] in ends) for response in responses])  # (B,)
        penalised = scores - cfg.missing_eos_penalty * (1 - ended)  # of those cut at the limit
        rollout = make_rollout(queries, responses, policy, ref, value, cfg)
        mask = rollout["mask"]  # (B, T)
        old_logprobs, ref_logprobs = rollout["old_logprobs"], rollout["ref_logprobs"]
        rewards = token_rewards(penalised, old_logprobs, ref_logprobs, mask, coefs["kl_coef"])

        # 3. Advantages: how much better than expected each token did.
        if value:
            values = rollout["old_values"]
            advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)  # (B, T) each
            rollout["returns"] = returns
            advantages = whiten(advantages, mask, scale=cfg.whiten)  # over the whole rollout
            if cfg.objective == "pg":  # (8.8): the episode's total reward R, with no baseline
                advantages = rewards.sum(1, keepdim=True) * mask
        else:
            advantages = group_advantages(rewards, mask, cfg.group)
        rollout |= dict(rewards=rewards, advantages=advantages)  # (B, T)
        scored = time.perf_counter()

        # 4. K epochs of the objective on this rollout, dealt into minibatches anew in each.
        lr = common.set_lr(policy_optimizer, cfg.lr, step, cfg.steps, cfg)
        if value:
            common.set_lr(value_optimizer, cfg.value_lr, step, cfg.steps, cfg)
        shuffle = common.make_generator("cpu", cfg.seed, step, "minibatches")
        history = []  # the statistics of each minibatch
        for _ in range(epochs):
            for minibatch in torch.randperm(B, generator=shuffle).chunk(cfg.minibatches):
                batches = weighted_parts(rollout, minibatch, lengths, cfg, device)
                totals = defaultdict(float)  # the minibatch's means, tensors on the device
                for batch, share in batches:
                    logprobs, _ = policy(batch, cfg.temperature)  # (b, t), of pi
                    loss, measured = policy_loss(
                        logprobs, batch["old_logprobs"], batch["advantages"], batch["mask"],
                        cfg.objective, cfg.cliprange, coefs["beta"],
                    )  # fmt: skip
                    (loss * share).backward()
                    totals["pg_loss"] += loss.detach() * share
                    for name, mean in measured.items():
                        totals[name] += mean * share
                if cfg.ptx_coef:
                    update = (step - 1) * epochs * cfg.minibatches + len(history) + 1
                    ptx_backward(policy, demonstrations, update, totals, cfg)
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
                stats = common.read_stats(totals, norm)  # floats; raises where not finite
                if step > value_warmup:
                    policy_optimizer.step()
                policy_optimizer.zero_grad()  # only one model at a time holds gradients

                if value:
                    totals = defaultdict(float)
                    for batch, share in batches:
                        values = state_values(value(batch))  # (b, t)
                        old_values, returns = batch["old_values"], batch["returns"]
                        loss, clipfrac = value_loss(
                            values, old_values, returns, batch["mask"], cfg.cliprange_value
                        )
                        (loss * share).backward()
                        totals["vf_loss"] += loss.detach() * share
                        totals["vf_clipfrac"] += clipfrac * share
                    norm = torch.nn.utils.clip_grad_norm_(value.parameters(), cfg.max_grad_norm)
                    stats |= common.read_stats(totals, norm, "vf_grad_norm")
                    value_optimizer.step()
                    value_optimizer.zero_grad()
                history.append(stats)
            if cfg.stop_kl and stats["approx_kl"] > cfg.stop_kl:
                break
        updated = time.perf_counter()

        # 5. Sync: pi_old <- pi; and the KL weights move towards their targets.
        sampler.sync(policy)
        metrics = {}  # means over the minibatches
        for key in history[0]:
            metrics[key] = sum(stats[key] for stats in history) / len(history)
        metrics |= rollout_metrics(rollout, sampler_logprobs) | coefs  # those of this step
        if step > value_warmup:
            adapt_coefs(coefs, metrics["kl"], history[-1]["approx_kl"], cfg)

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
        print_samples(run, questions, responses, scores, rollout, tokenizer, cfg)

    after = common.answer_prompts(*evaluation)
    samples, results = common.compare(eval_prompts, before=before, after=after)
    results["kl"] = sum(after["kl"]) / len(eval_prompts)  # to the reference, nats a response
    run.finish(policy, tokenizer, results, samples)
    common.print_answers(results, samples)

if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
