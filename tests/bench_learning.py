"""Experiments on the embedded world: what learns, how well, on which seeds.

    pip install matplotlib
    python tests/bench_learning.py                   # all parts; prints its plan and time first
    python tests/bench_learning.py --only 1,4 --seeds 3

Each run is one of the project's own commands, on one thread, two at a time; it is printed, and one
that is finished is not run again. SFT and reward models are made once a seed. Runs go to --work,
tables and pictures to tests/results/.

1  objectives   policy gradient, clip and kl from the same start: gold over the steps, and the rate
                at which each begins to collapse
2  seeds        clip at its defaults on ten seeds
3  frontier     reward against KL: PPO at several kl_coef, best-of-N, SFT on the best, DPO, RSO; and
                over-optimisation of a reward model that saw few pairs
4  ingredients  PPO with one of them left out
5  reward       the three losses of the reward model from the same number of judgements
6  factors      how the defaults were found: PPO with one setting changed at a time, three seeds
7  fresh        those defaults on ten seeds that had not been used before, 10 to 19

A real model on real text is in tests/bench_real.py.

A run has collapsed when it ends with fewer good answers than its SFT model gave. Gold is the share
of good answers by the exact judge; the scripts' own --seed is the seed.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import rejection_sample  # noqa: E402
import reward as reward_stage  # noqa: E402
from data import hhh  # noqa: E402

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "0"}  # text stays text
import matplotlib.pyplot as plt  # noqa: E402

DATA, RESULTS = ROOT / "data", ROOT / "tests/results"
SECONDS = {"sft.py": 40, "reward.py": 30, "ppo.py": 75, "rejection_sample.py": 60}  # one thread


# ----------------------------------------------------------------------------------------------
# Runs


def command(script, out, patch="", **flags):
    """The command line of a run, as a list; `patch` is a line of Python run before it."""
    parts = [sys.executable, str(ROOT / script)]
    if patch:
        stage = script.removesuffix(".py")
        start = f"common.command_line({stage}.Config, {stage}.main, {stage}.__doc__)"
        parts = [sys.executable, "-c", f"import common, {stage}; {patch}; {start}"]
    parts += ["--out", str(out), "--device", "cpu"]
    for name, value in flags.items():
        parts += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return parts


def out_of(parts):
    return Path(parts[parts.index("--out") + 1])


def run_all(waves):
    """Run waves of commands, two at a time within a wave, leaving out the finished ones."""
    todo = [
        [parts for parts in {str(out_of(p)): p for p in wave}.values()
         if not (out_of(parts) / "eval.json").exists()]
        for wave in waves
    ]  # fmt: skip
    scripts = [next((s for s in SECONDS if s in " ".join(p)), "ppo.py") for w in todo for p in w]
    hours = sum(SECONDS[script] for script in scripts) / 2 / 3600
    print(f"{len(scripts)} runs to make, about {hours:.1f} hours on two cores", flush=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1")

    def run(parts):
        start = time.time()
        resume = ["--resume"] if (out_of(parts) / "run.json").exists() else []
        done = subprocess.run(
            [*parts, *resume], env=environment, cwd=ROOT, capture_output=True, text=True
        )
        print(f"{time.time() - start:4.0f} s  {shlex.join(parts[1:])}", flush=True)
        if done.returncode:
            print(f"FAILED, left out of the tables:\n{done.stderr[-2000:]}", flush=True)

    for wave in todo:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, wave))


def results_of(out):
    """eval.json of a run, or None where it failed."""
    path = Path(out) / "eval.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def metrics_of(out, *keys):
    """Columns of metrics.jsonl: (steps, keys)."""
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([[json.loads(line)[key] for key in keys] for line in lines])


def stages(work, seed):
    """The SFT and the reward model of a seed, which all its runs share."""
    sft, reward = work / f"{seed}/sft", work / f"{seed}/reward"
    return (
        [command("sft.py", sft, seed=seed)],
        [command("reward.py", reward, seed=seed, model=sft)],
    )


def start_of(work, seed):
    """The flags of a run that starts from them."""
    return dict(policy=work / f"{seed}/sft", reward=work / f"{seed}/reward", seed=seed)


def table(columns, rows):
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows]) + "\n"


def spread(values, style=".1f", scale=1):
    """Median (least to greatest)."""
    low, mid, high = (format(scale * x, style) for x in (min(values), median(values), max(values)))
    return f"{mid} ({low} to {high})"


def summary(found):
    """Cells of some runs' results: gold, KL, collapses."""
    found = [r for r in found if r]
    collapsed = sum(r["gold_after"] < r["gold_before"] for r in found)
    gold, kl = [r["gold_after"] for r in found], [r["kl"] for r in found]
    return [spread(gold, scale=100), spread(kl, ".2f"), f"{collapsed} of {len(found)}"]


def picture(name, columns=1):
    figure, axes = plt.subplots(1, columns, figsize=(5.2 * columns, 3.6), squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.file = RESULTS / f"{name}.svg"
    return figure, axes[0]


def save(figure):
    figure.tight_layout()
    figure.savefig(figure.file, metadata=dict(Date=None))
    plt.close(figure)


# ----------------------------------------------------------------------------------------------
# 1 and 2: objectives, rates, seeds

OBJECTIVES = dict(pg="tab:red", clip="tab:blue", kl="tab:green")
RATES = (1, 3, 5, 10, 30)  # times the default


def objective_run(work, seed, objective, rate):
    name = f"ppo_{objective}" + (f"_x{rate}" if rate > 1 else "")
    name = "ppo" if name == "ppo_clip" else name
    flags = {} if name == "ppo" else dict(objective=objective, lr=1e-3 * rate)
    return command("ppo.py", work / f"{seed}/{name}", **start_of(work, seed), **flags)


def plan_objectives(work, seeds):
    waves = [[], [], [], []]
    for seed in seeds:
        for wave, commands in zip(waves, stages(work, seed)):
            wave += commands
        for rate in RATES if seed in seeds[:3] else RATES[:1]:
            waves[2] += [objective_run(work, seed, o, rate) for o in OBJECTIVES]
    return waves


def report_objectives(work, seeds):
    figure, (left, right) = picture("1_objectives", 2)
    rows = []
    for objective, colour in OBJECTIVES.items():
        outs = [out_of(objective_run(work, seed, objective, 1)) for seed in seeds]
        outs = [out for out in outs if results_of(out)]
        curves = np.array([metrics_of(out, "gold")[:, 0] for out in outs]) * 100  # (seeds, steps)
        steps = np.arange(1, curves.shape[1] + 1)
        left.plot(steps, np.median(curves, 0), color=colour, label=objective)
        left.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.15, lw=0)
        middle = []
        for rate in RATES:
            own = seeds if rate == 1 else seeds[:3]
            found = [results_of(out_of(objective_run(work, s, objective, rate))) for s in own]
            rows.append([objective, f"{rate} x", *summary(found)])
            golds = [100 * r["gold_after"] for r in found if r]
            middle.append(median(golds))
            right.scatter([rate] * len(golds), golds, color=colour, s=14)
        right.plot(RATES, middle, color=colour, label=objective)
    left.set(xlabel="PPO step, 128 episodes each", ylabel="good answers while training, %")
    left.set_title(f"median and range of {len(seeds)} seeds", fontsize=10)
    before = [results_of(work / f"{seed}/ppo")["gold_before"] for seed in seeds[:3]]
    right.axhline(100 * median(before), color="grey", ls=":", label="SFT model")
    right.set(xscale="log", xlabel="times the default rate", ylabel="good answers at the end, %")
    right.set_xticks(RATES, RATES)
    right.minorticks_off()
    right.set_title("median and runs: 10 seeds at 1, else 3", fontsize=10)
    left.legend(), right.legend()
    save(figure)
    columns = ["objective", "rate", "gold, %: median (range)", "KL, nats", "collapsed"]
    return f"## Policy gradient, clip and kl, seeds {seeds[0]} to {seeds[-1]}\n\n" + table(
        columns, rows
    )


def plan_seeds(work, seeds):
    waves = plan_objectives(work, seeds)
    waves[2] = [objective_run(work, seed, "clip", 1) for seed in seeds]
    return waves


def report_seeds(work, seeds):
    rows = []
    for seed in seeds:
        reward, ppo = results_of(work / f"{seed}/reward"), results_of(work / f"{seed}/ppo")
        shares = [ppo[f"gold_after_{kind}"] for kind in ("helpful", "honest", "harmless")]
        shares = [f"{100 * x:.1f}" for x in (ppo["gold_before"], ppo["gold_after"], *shares)]
        rows.append([seed, f"{100 * reward['accuracy']:.1f}", *shares, f"{ppo['kl']:.2f}"])
    columns = ["seed", "reward model, %", "before, %", "**after, %**", "helpful", "honest"]
    return "## clip at its defaults\n\n" + table(columns + ["harmless", "KL, nats"], rows)


# ----------------------------------------------------------------------------------------------
# 3: reward against KL, and too much of it

KL_COEFS = (0.1, 0.2, 0.8, 1.6)  # beside the default 0.4
JUDGE = dict(reward_fn=f"{DATA / 'hhh.py'}:gold_score", kl_coef=0.1)  # 0 to 1: a smaller scale
BASELINES = dict(  # folder: what it is, flags
    group_4=("PPO, group of 4", dict(advantage="group", group=4)),
    group_8=("PPO, group of 8", dict(advantage="group", group=8)),
    judge=("PPO, the exact judge", JUDGE),
    judge_group=("PPO, the exact judge, group of 4", JUDGE | dict(advantage="group")),
)  # fmt: skip
HUMAN = DATA / "pairs.jsonl"
PREFERENCE = dict(  # folder: what it is, flags
    direct=("DPO on 12,000 human pairs (direct)", dict(pairs=HUMAN, epochs=1)),
    direct_1920=("DPO on 1,920 of them", dict(pairs=HUMAN, epochs=1, steps=60)),
    best_of_8=("DPO on the best against the worst of 8", dict(n=8)),
    sample_rank=(
        "DPO on any 8 of 64 answers, ranked (sample-rank)", dict(method="rso", rso_beta=1e9)
    ),
    rso_2=("DPO on 8 of 64 by RSO, rso_beta 2", dict(method="rso", rso_beta=2)),
    rso_half=("DPO on 8 of 64 by RSO, rso_beta 0.5", dict(method="rso", rso_beta=0.5)),
)  # fmt: skip
FEW = 512  # pairs that the weak reward model sees


def few_pairs(work, seed):
    """A file of the seed's own few pairs."""
    path = work / f"{seed}/few_pairs.jsonl"
    lines = HUMAN.read_text(encoding="utf-8").splitlines(keepends=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines[FEW * seed : FEW * (seed + 1)]), encoding="utf-8")
    return path


def plan_frontier(work, seeds):
    waves = [[], [], [], []]
    for seed in seeds:
        sft, weak = work / f"{seed}/sft", work / f"{seed}/reward_weak"
        for wave, commands in zip(waves, stages(work, seed)):
            wave += commands
        waves[1].append(command(
            "reward.py", weak, model=sft, data=few_pairs(work, seed), epochs=4, seed=seed,
            eval_data=DATA / "eval_pairs.jsonl",
        ))  # fmt: skip
        shared = start_of(work, seed)
        waves[2].append(objective_run(work, seed, "clip", 1))
        for kl_coef in KL_COEFS:
            out = work / f"{seed}/ppo_kl_{kl_coef}"
            waves[2].append(command("ppo.py", out, **shared, kl_coef=kl_coef))
        for name, (_, flags) in BASELINES.items():
            waves[2].append(command("ppo.py", work / f"{seed}/{name}", **shared | flags))
        for name, (_, flags) in PREFERENCE.items():
            out = work / f"{seed}/{name}"
            waves[2].append(command("rejection_sample.py", out, **shared, **flags))
        waves[2].append(command(
            "ppo.py", work / f"{seed}/ppo_weak", **shared | dict(reward=weak), kl_coef=0.0,
            steps=100, lr_schedule="constant",
        ))  # fmt: skip
        waves[2].append(command(
            "rejection_sample.py", work / f"{seed}/best_weak", **shared | dict(reward=weak),
            n=64, loss="none",
        ))  # fmt: skip
        waves[3].append(command(
            "sft.py", work / f"{seed}/sft_on_best", model=sft, seed=seed, lr=1e-3, warmup=5,
            data=work / f"{seed}/best_of_8/sft.jsonl", eval_data=DATA / "eval_sft.jsonl", epochs=4,
        ))  # fmt: skip
    return waves


def judge(folder, ref, device, prompts, cfg, answers=1):
    """eval.json's means, among them score, gold and KL to `ref`, of so many answers a prompt by a
    policy, found as the scripts do it. `cfg` says the reward model, seed and lengths.
    """
    done = folder / (f"judged_{answers}.json" if answers > 1 else "judged.json")
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    policy, ref = common.load_policy(folder, device), common.load_policy(ref, device)
    tokenizer = common.load_tokenizer(folder, policy.lm)
    score, _ = common.load_score(cfg, policy, tokenizer)
    gold = common.load_gold(cfg, prompts, tokenizer)
    rows = common.load_prompts(common.read_jsonl(prompts), tokenizer, cfg, policy) * answers
    eos = common.stop_ids(policy.lm, tokenizer)
    longest = max(len(row["ids"]) for row in rows) + cfg.max_new_tokens
    sampler = common.Sampler(
        common.sampling_copy(policy, cfg), eos, cfg.max_new_tokens, longest, cfg.temperature,
        cfg.slots,
    )  # fmt: skip
    found = common.answer_prompts(policy, sampler, ref, rows, tokenizer, score, gold, cfg)
    _, results = common.compare(rows, after=found)
    results["kl"] = sum(found["kl"]) / len(rows)
    done.write_text(json.dumps(results), encoding="utf-8")
    return results


def best_of_groups(rewards, n):
    """Of N answers to each prompt, the best of every n: indices (P, N // n) for rewards (P, N). All
    groups of n count, so that a small n is not noisy.
    """
    P, N = rewards.shape
    groups = rewards[:, : N // n * n].reshape(P, -1, n)
    return groups.argmax(-1) + n * torch.arange(groups.shape[1])


def best_of_n_curve(folder, tokenizer):
    """Best-of-n for n = 1, 2, 4, ... from a run's answers to the held-out prompts: dicts of n, the
    bound of the KL, mean score and share of good answers.
    """
    candidates = common.read_jsonl(folder / "eval_candidates.jsonl")
    rewards, scores, ended = (
        torch.tensor([candidate[key] for candidate in candidates])
        for key in ("rewards", "scores", "ended")
    )  # (P, N) each
    answers = [(c, response) for c in candidates for response in c["responses"]]
    judge_gold = common.function_score(f"{DATA / 'hhh.py'}:gold_score", tokenizer)
    asked, said = map(list, zip(*answers))
    gold = judge_gold(asked, said).view_as(scores)
    ranked = rewards.double() - 1e6 * ~ended  # the cut ones lose to any that ended
    curve = []
    for n in (2**i for i in range(rewards.shape[1].bit_length())):
        best = best_of_groups(ranked, n)
        good = (gold.gather(1, best) >= 0.5).float().mean().item()
        point = dict(n=n, kl=rejection_sample.best_of_n_kl(n), gold_after=good)
        curve.append(point | dict(score_after=scores.gather(1, best).mean().item()))
    return curve


def frontier_points(work, seeds):
    """name -> one dict of gold_after, score_after, kl a seed."""
    found = {}
    for seed in seeds:
        start = start_of(work, seed)
        tokenizer = common.load_tokenizer(start["policy"])
        for point in best_of_n_curve(work / f"{seed}/sample_rank", tokenizer):
            found.setdefault(f"best of {point['n']} (KL: the bound)", []).append(point)
        cfg = rejection_sample.Config(reward=str(start["reward"]), seed=seed, device="cpu")
        prompts, device = DATA / "eval_prompts.jsonl", torch.device("cpu")
        best = judge(work / f"{seed}/sft_on_best", start["policy"], device, prompts, cfg)
        found.setdefault("SFT on best of 8", []).append(best)
        for name, (title, _) in PREFERENCE.items():
            found.setdefault(title, []).append(results_of(work / f"{seed}/{name}"))
        for kl_coef in sorted((*KL_COEFS, 0.4), reverse=True):
            name = "ppo" if kl_coef == 0.4 else f"ppo_kl_{kl_coef}"
            result = results_of(work / f"{seed}/{name}")
            found.setdefault(f"PPO, kl_coef {kl_coef}", []).append(result)
        for name, (title, _) in BASELINES.items():  # all scored by the reward model
            folder = work / f"{seed}/{name}"
            result = judge(folder, start["policy"], device, prompts, cfg)
            found.setdefault(title, []).append(result)
    return found


def report_frontier(work, seeds):
    found = frontier_points(work, seeds)
    rows = []
    for name, results in found.items():
        gold = " / ".join(f"{100 * r['gold_after']:.1f}" for r in results)
        score = " / ".join(f"{r['score_after']:.2f}" for r in results)
        rows.append([name, gold, score, " / ".join(f"{r['kl']:.2f}" for r in results)])

    figure, axes = picture("3_frontier", 2)
    families = {
        "best of N (KL: the bound)": ("best of", "tab:orange", "-"),
        "PPO, by kl_coef": ("PPO, kl_coef", "tab:blue", "-"),
        "PPO, group of 4 and 8": (("PPO, group of 4", "PPO, group of 8"), "tab:cyan", "none"),
        "PPO, the exact judge as reward": ("PPO, the exact judge", "black", "none"),
        "SFT on best of 8": ("SFT", "tab:purple", "none"),
        "DPO on human pairs": ("DPO on 1", "tab:green", "none"),
        "DPO on sampled pairs": (("DPO on the", "DPO on any"), "tab:red", "none"),
        "DPO on RSO's pairs": ("DPO on 8", "tab:brown", "none"),
    }
    for axis, key, scale in zip(axes, ("score_after", "gold_after"), (1, 100)):
        for label, (start, colour, line) in families.items():
            own = [results for name, results in found.items() if name.startswith(start)]
            mean = [[np.mean([r[k] for r in results]) for k in ("kl", key)] for results in own]
            x, y = np.array(mean).T
            axis.plot(x, y * scale, ls=line, marker="o", ms=4, color=colour, label=label)
        axis.set(xlabel="KL to the SFT model, nats a response")
    axes[0].set(ylabel="reward model's score")
    axes[1].set(ylabel="good answers, %")
    axes[1].legend(fontsize=8)
    axes[0].set_title(f"means of {len(seeds)} seeds", fontsize=10)
    save(figure)
    columns = ["", "gold, %", "reward model's score", "KL to the SFT model, nats"]
    text = f"## Reward against KL, seeds {' / '.join(map(str, seeds))}\n\n" + table(columns, rows)
    return text + "\n" + report_over_optimisation(work, seeds)


def fit(d, reward, shape):
    """Least squares of Gao et al. (2022): R(d) = d (alpha - beta g(d)), g = log for RL and d for
    best-of-N. Returns alpha, beta and the share of the variance explained.
    """
    columns = np.stack([d, -d * (np.log(d) if shape == "rl" else d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, reward, rcond=None)
    rest = reward - columns @ (alpha, beta)
    return alpha, beta, 1 - (rest**2).sum() / ((reward - reward.mean()) ** 2).sum()


def report_over_optimisation(work, seeds):
    figure, axes = picture("3_overoptimisation", 2)
    rows = []
    for axis, shape in zip(axes, ("rl", "best-of-N")):
        right = axis.twinx()
        points = []
        for seed in seeds:
            before = results_of(work / f"{seed}/ppo_weak")
            if shape == "rl":
                kl, gold, score = metrics_of(work / f"{seed}/ppo_weak", "kl", "gold", "score").T
                gold, score = gold - before["gold_before"], score - before["score_before"]
            else:
                tokenizer = common.load_tokenizer(work / f"{seed}/sft")
                found = best_of_n_curve(work / f"{seed}/best_weak", tokenizer)
                keys = ("kl", "gold_after", "score_after")
                kl, gold, score = np.array([[point[key] for key in keys] for point in found]).T
                gold, score = gold - gold[0], score - score[0]
            d, gold, score = np.sqrt(kl[kl > 0]), gold[kl > 0], score[kl > 0]
            points.append((d, gold, score))
            axis.scatter(d, 100 * gold, s=8, color="tab:blue", alpha=0.6)
            right.scatter(d, score, s=8, color="tab:orange", alpha=0.6)
            peak = gold.argmax()
            alpha, beta, explained = fit(d, gold, shape)
            rows.append([
                shape, seed, f"{score[-1]:+.2f}", f"{100 * gold[peak]:+.0f} at {d[peak]:.2f}",
                f"{100 * gold[-1]:+.0f} at {d[-1]:.2f}", f"{alpha:.2f}", f"{beta:.2f}",
                f"{explained:.2f}",
            ])  # fmt: skip
        d, gold, score = (np.concatenate(x) for x in zip(*points))
        line = np.linspace(0.05, d.max(), 100)
        for values, where, colour, scale in (
            (gold, axis, "tab:blue", 100),
            (score, right, "tab:orange", 1),
        ):
            alpha, beta, _ = fit(d, values, shape)
            inner = np.log(line) if shape == "rl" else line
            where.plot(line, scale * line * (alpha - beta * inner), color=colour)
        axis.set(xlabel="d = sqrt(KL)", ylabel="gain in good answers, points")
        right.set_ylabel("gain in the weak reward model's score")
        title = "PPO without a KL penalty" if shape == "rl" else "best of N"
        axis.set_title(f"{title}: gold (blue), proxy (orange)", fontsize=10)
        right.spines["top"].set_visible(False)
    save(figure)
    accuracy = [100 * results_of(work / f"{seed}/reward_weak")["accuracy"] for seed in seeds]
    columns = ["", "seed", "proxy at the end", "gold's peak, points", "gold at the end", "alpha"]
    return (
        f"## Over-optimisation of a reward model of {FEW} pairs\n\n"
        f"Its held-out accuracy: {spread(accuracy)}%. The fit is of gold.\n\n"
        + table(columns + ["beta", "R squared"], rows)
    )


# ----------------------------------------------------------------------------------------------
# 4: what each ingredient is worth

LEFT_OUT = dict(  # folder: what it is, flags; a patch edits a line of ppo.py
    ppo=("all of them (the defaults)", {}),
    value_zero=("value model from the policy, zero head", dict(
        patch="load = common.load_score; "
        "common.load_score = lambda *args, **more: (load(*args, **more)[0], None)"
    )),
    whitening=("whitening (off by default)", dict(whiten=True)),
    no_kl=("no KL penalty", dict(kl_coef=0.0)),
    no_value_clip=("no value clipping", dict(cliprange_value=1e9)),
    no_eos=("no missing-EOS penalty", dict(missing_eos_penalty=0.0)),
    ptx=("with PPO-ptx, 0.5 (off by default)", dict(ptx_coef=0.5)),
)  # fmt: skip


def plan_settings(folder, settings, work, seeds):
    """PPO with each of the settings (name: (title, flags)), a run in work/seed/folder/name."""
    waves = [[], [], [], []]
    for seed in seeds:
        for wave, commands in zip(waves, stages(work, seed)):
            wave += commands
        for name, (_, flags) in settings.items():
            out = work / f"{seed}" / folder / name
            waves[2].append(command("ppo.py", out, **start_of(work, seed) | flags))
    return waves


def report_ingredients(work, seeds):
    rows = []
    for name, (title, _) in LEFT_OUT.items():
        found = [results_of(work / f"{seed}/{name}") for seed in seeds]
        own = [metrics_of(work / f"{seed}/{name}", "response_len")[-5:].mean() for seed in seeds]
        gold, kl, collapsed = summary(found)
        score = spread([r["score_after"] for r in found if r], ".2f")
        rows.append([title, gold, score, kl, spread(own), collapsed])
    columns = ["PPO with", "gold, %: median (range)", "reward model's score", "KL, nats"]
    columns += ["tokens a response", "collapsed"]
    return f"## Each ingredient, seeds {seeds[0]} to {seeds[-1]}\n\n" + table(columns, rows)


# ----------------------------------------------------------------------------------------------
# 5: reward models from the same number of judgements

# Judgements a step: a score or a comparison is one, and to rank 4 answers takes 5 comparisons.
REWARD_LOSSES = dict(pointwise=(32, 1), pairwise=(32, 1), listwise=(6, 5))
REWARD_STEPS = (31, 125, 375)
COLOURS = dict(pointwise="tab:purple", pairwise="tab:blue", listwise="tab:green")


def reward_run(work, seed, loss, steps):
    batch_size, _ = REWARD_LOSSES[loss]
    return command(
        "reward.py", work / f"{seed}/reward_{loss}_{steps}", seed=seed, model=work / f"{seed}/sft",
        loss=loss, batch_size=batch_size, steps=steps, eval_data=DATA / "eval_pairs.jsonl",
    )  # fmt: skip


def plan_reward(work, seeds):
    return [
        [commands for seed in seeds for commands in stages(work, seed)[0]],
        [
            reward_run(work, s, loss, n)
            for s in seeds
            for loss in REWARD_LOSSES
            for n in REWARD_STEPS
        ],
        [],
        [],
    ]


def calibration(folder, loss, pairs):
    """(predicted probability that the first answer is preferred, whether it was) of each pair."""
    device = torch.device("cpu")
    tokenizer, scorer = common.load_tokenizer(folder), common.load_scorer(folder, device)
    answers = [sorted([p["chosen"], p["rejected"]]) for p in pairs]  # an order that tells nothing
    examples = [
        common.encode(tokenizer, p["prompt"], answer)
        for p, both in zip(pairs, answers)
        for answer in both
    ]
    cfg = reward_stage.Config()
    scores = common.evaluate(scorer.last, examples, cfg, device).view(-1, 2)
    # A pointwise model speaks in units of gold; the annotator's own noise makes log-odds of them.
    log_odds = (scores[:, 0] - scores[:, 1]) / (hhh.TAU if loss == "pointwise" else 1)
    first = [float(p["chosen"] == both[0]) for p, both in zip(pairs, answers)]
    return torch.sigmoid(log_odds).numpy(), np.array(first)


def report_reward(work, seeds):
    rng = random.Random("calibration")
    questions = [q for q in hhh.QUESTIONS if q.split == "eval"]
    pairs = [hhh.pair(rng, rng.choice(questions)) for _ in range(2000)]
    pairs = [p for p in pairs if p["chosen"].strip() and p["rejected"].strip()]
    figure, (left, right) = picture("5_reward_models", 2)
    rows = []
    for loss, (batch_size, each) in REWARD_LOSSES.items():
        middle = []
        for steps in REWARD_STEPS:
            found = [results_of(out_of(reward_run(work, s, loss, steps))) for s in seeds]
            accuracy = [100 * r["accuracy"] for r in found if r]
            middle.append(median(accuracy))
            judgements = steps * batch_size * each
            rows.append([loss, f"{judgements:,}", f"{steps * batch_size:,}", spread(accuracy)])
            left.scatter([judgements] * len(accuracy), accuracy, s=12, color=COLOURS[loss])
        x = [steps * batch_size * each for steps in REWARD_STEPS]
        left.plot(x, middle, color=COLOURS[loss], label=loss)
        both = [calibration(out_of(reward_run(work, s, loss, steps)), loss, pairs) for s in seeds]
        predicted, seen = (np.concatenate(x) for x in zip(*both))
        bins = np.clip((predicted * 10).astype(int), 0, 9)
        means = np.array([[predicted[bins == b].mean(), seen[bins == b].mean()] for b in range(10)])
        weights = np.bincount(bins, minlength=10) / len(bins)
        error = (weights * abs(means[:, 0] - means[:, 1])).sum()
        rows[-1].append(f"{100 * error:.1f}")
        right.plot(*means.T, marker="o", ms=4, color=COLOURS[loss], label=loss)
    for row in rows:
        row += [""] * (5 - len(row))
    left.set(xscale="log", xlabel="human judgements", ylabel="held-out pairs in order, %")
    left.set_title(f"median and runs of {len(seeds)} seeds", fontsize=10)
    right.plot([0, 1], [0, 1], color="grey", ls=":")
    right.set(xlabel="predicted preference", ylabel="observed share")
    right.set_title("calibration on the annotator's held-out choices", fontsize=10)
    left.legend(), right.legend()
    save(figure)
    columns = ["loss", "judgements", "lines of data", "accuracy, %: median (range)"]
    columns.append("calibration error, points")
    return f"## The three losses of the reward model, seeds {seeds[0]} to {seeds[-1]}\n\n" + table(
        columns, rows
    )


# ----------------------------------------------------------------------------------------------
# 6 and 7: how the defaults were found, and whether they hold

FIRST = dict(steps=40, ppo_epochs=4, lr=7e-4, whiten=True)  # where the search began
PLAIN = {key: value for key, value in FIRST.items() if key != "whiten"}
FEWER = dict(steps=60, ppo_epochs=2, lr=1e-3)
FACTORS = dict(  # folder: what it is, flags
    base=("40 steps, 4 epochs, rate 7e-4, whitened, gae", FIRST),
    nw=("no whitening", PLAIN),
    s80=("80 steps", FIRST | dict(steps=80)),
    s80e2=("80 steps, 2 epochs", FIRST | dict(steps=80, ppo_epochs=2)),
    b256=("256 episodes a step", FIRST | dict(batch_size=256)),
    const=("constant rate", FIRST | dict(lr_schedule="constant")),
    vlr3=("value model's rate 3e-3", FIRST | dict(value_lr=3e-3)),
    vw5=("5 more steps, in which only the value model learns",
         FIRST | dict(value_warmup=5, steps=45)),
    lam1=("lam 1", FIRST | dict(lam=1)),
    kl3=("kl_coef 0.3", FIRST | dict(kl_coef=0.3)),
    g4=("group of 4", PLAIN | dict(advantage="group")),
    g8=("group of 8", PLAIN | dict(advantage="group", group=8)),
    g4_s80=("group of 4, 80 steps", PLAIN | dict(advantage="group", steps=80)),
    g8_s80e2=("group of 8, 80 steps, 2 epochs",
              PLAIN | dict(advantage="group", group=8, steps=80, ppo_epochs=2)),
    judge=("the exact judge as the reward, kl_coef 0.1", FIRST | JUDGE),
    judge_vw5=("the same, 5 more steps for the value model",
               FIRST | JUDGE | dict(value_warmup=5, steps=45)),
    s60e2_lr1=("60 steps, 2 epochs, rate 1e-3", FEWER | dict(whiten=True)),
    nw_s50e2_lr1=("50 steps, 2 epochs, rate 1e-3, no whitening", FEWER | dict(steps=50)),
    nw_s60e2_lr1=("**60 steps, 2 epochs, rate 1e-3, no whitening: the defaults**", FEWER),
    g4_s60e2_lr1=("the same, group of 4", FEWER | dict(advantage="group")),
    nw_judge=("the same, gae, the exact judge", FEWER | JUDGE),
    nw_judge_g4=("the same, group of 4, the exact judge", FEWER | JUDGE | dict(advantage="group")),
)  # fmt: skip


def report_factors(work, seeds):
    rows = []
    for name, (title, _) in FACTORS.items():
        outs = [work / f"{seed}/factors/{name}" for seed in seeds]
        found = [results_of(out) for out in outs]
        gold = " / ".join(f"{100 * r['gold_after']:.1f}" for r in found)
        last = [100 * metrics_of(out, "gold")[-6:].mean() for out in outs]
        rows.append([
            title, gold, f"{np.mean(last):.1f}", " / ".join(f"{r['kl']:.2f}" for r in found),
            f"{np.mean([r['score_after'] for r in found]):.2f}",
        ])  # fmt: skip
    columns = ["PPO with", "good held-out answers, %", "in the last 6 steps, mean", "KL, nats"]
    columns += ["score, mean"]
    title = f"## One factor at a time, seeds {' / '.join(map(str, seeds))}\n\n"
    return title + table(columns, rows)


def report_fresh(work, seeds):
    """With eight answers a prompt, too, whose mean is a third as uncertain."""
    text = report_seeds(work, seeds).replace("clip at its defaults", "The defaults on fresh seeds")
    rows, device, prompts = [], torch.device("cpu"), DATA / "eval_prompts.jsonl"
    for seed in seeds:
        start = start_of(work, seed)
        cfg = rejection_sample.Config(reward=str(start["reward"]), seed=seed, device="cpu")
        found = judge(work / f"{seed}/ppo", start["policy"], device, prompts, cfg, answers=8)
        rows.append([seed, f"{100 * found['gold_after']:.1f}", f"{found['kl']:.2f}"])
    return text + "\n" + table(["seed", "good of eight answers a prompt, %", "KL, nats"], rows)


# ----------------------------------------------------------------------------------------------

PARTS = {  # name, plan, report, how many seeds
    "1": ("objectives", plan_objectives, report_objectives, 10),
    "2": ("seeds", plan_seeds, report_seeds, 10),
    "3": ("frontier", plan_frontier, report_frontier, 3),
    "4": ("ingredients", partial(plan_settings, "", LEFT_OUT), report_ingredients, 5),
    "5": ("reward", plan_reward, report_reward, 5),
    "6": ("factors", partial(plan_settings, "factors", FACTORS), report_factors, 3),
    "7": ("fresh", plan_seeds, report_fresh, 10),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--seeds", type=int, default=10, help="at most so many")
    parser.add_argument("--work", type=Path, default=Path("out/bench_learning"))
    args = parser.parse_args()
    work = args.work.resolve()
    parts = {key: PARTS[key] for key in args.only.split(",")}
    seeds = {key: list(range(min(args.seeds, n))) for key, (*_, n) in parts.items()}
    if "7" in seeds:
        seeds["7"] = [10 + seed for seed in seeds["7"]]
    waves = [[], [], [], []]
    for key, (_, plan, _, _) in parts.items():
        for wave, commands in zip(waves, plan(work, seeds[key])):
            wave += commands
    run_all(waves)
    RESULTS.mkdir(exist_ok=True)
    for key, (name, _, report, _) in parts.items():
        text = report(work, seeds[key])
        print(text)
        (RESULTS / f"{key}_{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
