"""Part 6 of bench_learning.py: a real model and real preferences. Made for a GPU.

    python tests/bench_real.py --model SmolLM2-135M-Instruct --train hh_harmless_train.jsonl.gz \\
        --valid hh_harmless_valid.jsonl.gz [--trl PYTHON_WITH_TRL_1.12]

reward  accuracy on the valid pairs over rates and epochs, mean of the seeds with its 95% interval;
        the best setting against the peer's (2e-5, 1 epoch) on the same pairs (McNemar, exact)
ppo     the peer's setting: 64 episodes a step, 64 new tokens, constant rate 3e-6, kl_coef 0.05;
        with --trl also TRL's PPOTrainer with the same reward model and prompts; all policies'
        answers to the valid prompts scored by that reward model before any penalty: score against
        KL, seconds
answers twenty prompts before and after, to read

Finished runs are skipped. Tables go to tests/results/6_real.md.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import mean

from bench_learning import RESULTS, ROOT, command, judge, metrics_of, out_of, results_of, table

import common
import rejection_sample
import reward

RATES, EPOCHS, STEPS = (1e-5, 2e-5, 5e-5), (1, 2, 3), (10, 20, 40)
PEER = (2e-5, 1)  # rate and epochs of the peer's reward model


def run(parts):
    """One run at a time, on whatever device there is; nothing where it is finished."""
    if (out_of(parts) / "eval.json").exists():
        return
    parts[parts.index("--device") + 1] = "auto"
    print(" ".join(parts[1:]), flush=True)
    parts += ["--resume"] if (out_of(parts) / "run.json").exists() else []
    done = subprocess.run(parts, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(done.returncode)


def right_pairs(folder, rows, device):
    """Which of the valid pairs a reward model puts in order."""
    tokenizer, scorer = common.load_tokenizer(folder), common.load_scorer(folder, device)
    ends = common.stop_ids(scorer.lm, tokenizer)
    judgements = [reward.read_judgement(tokenizer, ends, row) for row in rows]
    scores = reward.score_all(scorer, judgements, reward.Config())
    return [bool(chosen > rejected) for chosen, rejected in scores]


def mcnemar(first, second):
    """Exact two-sided p of two models on the same pairs, from those that only one gets right."""
    only_first = sum(a and not b for a, b in zip(first, second))
    only_second = sum(b and not a for a, b in zip(first, second))
    n, k = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def reward_model(work, args, rate, epochs, seed):
    """The folder of a reward model, made if missing."""
    out = work / f"{seed}/reward_{rate:g}_{epochs}"
    run(command(
        "reward.py", out, model=args.model, data=args.train, eval_data=args.valid, lr=rate,
        epochs=epochs, batch_size=16, warmup=8, max_length=512, seed=seed,
    ))  # fmt: skip
    return out


def reward_models(work, args, device):
    rows = []
    for rate in args.rates:
        for epochs in args.epochs:
            outs = [reward_model(work, args, rate, epochs, seed) for seed in args.seeds]
            found = [results_of(out) for out in outs]
            accuracy, n = mean(r["accuracy"] for r in found), found[0]["n"]
            low, high = reward.wilson_interval(accuracy, n)
            each = " / ".join(f"{100 * r['accuracy']:.1f}" for r in found)
            interval = f"{100 * low:.1f} to {100 * high:.1f}"
            rows.append([f"{rate:g}", epochs, f"{100 * accuracy:.1f}", interval, each])
    text = table(["rate", "epochs", "accuracy, %", f"95% interval, n = {n}", "seeds"], rows)
    rate, epochs, *_ = max(rows, key=lambda row: float(row[2]))
    best = (float(rate), epochs)
    pairs = common.read_jsonl(args.valid)
    if best != PEER and PEER[0] in args.rates and PEER[1] in args.epochs:
        p = []
        for seed in args.seeds:
            both = [
                right_pairs(reward_model(work, args, *s, seed), pairs, device) for s in (best, PEER)
            ]
            p.append(f"{mcnemar(*both):.3f}")
        text += (
            f"\nBest against {PEER[0]:g}, {PEER[1]} epoch, on the same pairs: p {' / '.join(p)}\n"
        )
    return text


def policies(work, args, device):
    rows = []
    for seed in args.seeds:
        reward_folder = reward_model(work, args, *PEER, seed)
        cfg = rejection_sample.Config(
            reward=str(reward_folder), seed=seed, max_new_tokens=args.max_new_tokens,
            max_prompt_tokens=128,
        )  # fmt: skip
        for steps in args.steps:
            out = work / f"{seed}/ppo_{steps}"
            run(command(
                "ppo.py", out, policy=args.model, reward=reward_folder, data=args.train,
                eval_data=args.valid, steps=steps, batch_size=args.batch_size,
                max_new_tokens=args.max_new_tokens, max_prompt_tokens=128, lr=3e-6, value_lr=1e-5,
                lr_schedule="constant", warmup=0, kl_coef=0.05, seed=seed, save_every=0,
            ))  # fmt: skip
            own = judge(out, args.model, device, args.valid, cfg)
            seconds = sorted(metrics_of(out, "seconds")[:, 0])[steps // 2]
            rows.append(["ours", seed, steps, own, f"{seconds:.2f}"])
        if args.trl:
            out = work / f"{seed}/trl"
            if not (out / "done.json").exists():
                steps = ",".join(map(str, args.steps))
                done = subprocess.run(
                    [args.trl, str(ROOT / "tests/peer_trl.py"), "--model", args.model,
                     "--reward", str(reward_folder), "--data", args.train, "--out", str(out),
                     "--steps", steps, "--seed", str(seed), "--batch_size", str(args.batch_size),
                     "--max_new_tokens", str(args.max_new_tokens)],
                    stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                if done.returncode:
                    sys.exit(done.returncode)
                (out / "done.json").write_text(done.stdout.strip().splitlines()[-1])
            seconds = json.loads((out / "done.json").read_text())["seconds_per_step"]
            for steps in args.steps:
                own = judge(out / str(steps), args.model, device, args.valid, cfg)
                rows.append(["TRL 1.12", seed, steps, own, f"{seconds:.2f}"])
    before = results_of(work / f"{args.seeds[0]}/ppo_{args.steps[0]}")["score_before"]
    cells = [
        [who, seed, steps, f"{own['score_after']:.3f}", f"{own['kl']:.2f}",
         f"{own['eos_rate_after']:.2f}", seconds]
        for who, seed, steps, own, seconds in rows
    ]  # fmt: skip
    columns = ["", "seed", "steps", "score", "KL, nats", "answers that end", "s a step"]
    return f"Score before: {before:.3f} (seed {args.seeds[0]})\n\n" + table(columns, cells)


def answers(work, args):
    """Twenty prompts before and after, of the first seed's longest run."""
    path = work / f"{args.seeds[0]}/ppo_{max(args.steps)}/samples.jsonl"
    lines = common.read_jsonl(path)
    text = ""
    for sample in lines[:: max(1, len(lines) // 20)][:20]:
        text += f"\n**{common.as_text(sample['prompt'])[-300:].strip()}**\n"
        for when in ("before", "after"):
            text += f"- {when} ({sample[f'score_{when}']:.2f}): {sample[when].strip()[:400]}\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--trl", help="a Python with trl 1.12, datasets and accelerate")
    parser.add_argument("--only", default="reward,ppo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--epochs", type=int, nargs="+", default=EPOCHS)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="PPO steps")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--work", type=Path, default=Path("out/bench_real"))
    args = parser.parse_args()
    for name in ("model", "train", "valid"):
        path = Path(getattr(args, name))
        setattr(args, name, str(path.resolve()) if path.exists() else str(path))
    work, device = args.work.resolve(), common.choose_device("auto")
    text = "## A real model and real preferences\n"
    if "reward" in args.only:
        text += "\n### Reward models\n\n" + reward_models(work, args, device)
    if "ppo" in args.only:
        text += "\n### PPO\n\n" + policies(work, args, device)
        text += "\n### Before and after\n" + answers(work, args)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "6_real.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
