"""Experiments on the embedded world: what learns, how well, on which seeds.

    python tests/bench_learning.py                      # all parts, seeds 0 1 2
    python tests/bench_learning.py --only rejection --seeds 0

Each run is one of the project's own commands, on one thread, two at a time; it is printed, and one
that is finished is not run again. SFT and reward models are made once a seed. Tables go to
tests/results/, runs to --work.

rejection   rejection sampling beside PPO: best-of-N, SFT on best-of-8, DPO on human pairs, on
            sampled and ranked pairs, and on RSO pairs, on one axis of reward against KL
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = ROOT / "data"


def command(script, out, **flags):
    """The command line of a run, as a list."""
    parts = [sys.executable, str(ROOT / script), "--out", str(out), "--device", "cpu"]
    for name, value in flags.items():
        parts += [f"--{name}", str(value)]
    return parts


def run_all(waves):
    """Run waves of commands, two at a time within a wave, leaving out the finished ones."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")

    def run(parts):
        out = Path(parts[parts.index("--out") + 1])
        if (out / "eval.json").exists():
            return
        print(" ".join(parts[1:]), flush=True)
        if (out / "run.json").exists():
            parts = [*parts, "--resume"]
        done = subprocess.run(parts, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{out}: {done.stderr[-2000:]}")

    for wave in waves:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, wave))


def results_of(out):
    return json.loads((Path(out) / "eval.json").read_text(encoding="utf-8"))


def judge(policy, ref, reward, seed):
    """Score, gold and KL to `ref` of a policy that no script evaluated, as the scripts do it."""
    import torch

    import common
    import rejection_sample

    device = torch.device("cpu")
    cfg = rejection_sample.Config(policy=str(policy), reward=str(reward), seed=seed, device="cpu")
    tokenizer = common.load_tokenizer(policy)
    model = common.load_policy(policy, device)
    score, *_ = common.load_scorer(cfg, tokenizer, device, torch.float32)
    found = common.evaluate(
        model, model, common.load_policy(ref, device),
        common.load_prompts(common.read_jsonl(DATA / "eval_prompts.jsonl"), tokenizer, 512),
        tokenizer, common.stop_ids(model, tokenizer), score,
        common.load_gold("", cfg.data, tokenizer), cfg,
    )  # fmt: skip
    good = (found["gold"] >= 0.5).float().mean().item()
    return dict(gold_after=good, score_after=found["scores"].mean().item(), kl=found["kl"])


def stages(work, seed):
    """The SFT and the reward model of a seed, which all its runs share."""
    sft, reward = work / f"{seed}/sft", work / f"{seed}/reward"
    return (
        [command("sft.py", sft, seed=seed)],
        [command("reward.py", reward, seed=seed, model=sft)],
    )


def table(title, columns, rows):
    lines = [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, row))} |" for row in rows]) + "\n"


# ----------------------------------------------------------------------------------------------


def rejection(work, seeds):
    human = DATA / "pairs.jsonl"
    dpo = dict(  # folder: what it is, flags
        direct=("DPO on 12,000 human pairs (direct)", dict(pairs=human, epochs=1)),
        direct_1920=("DPO on 1,920 of them", dict(pairs=human, epochs=1, steps=60)),
        best_of_8=("DPO on the best against the worst of 8", dict(n=8)),
        sample_rank=(
            "DPO on any 8 of 64 answers, ranked (sample-rank)", dict(method="rso", rso_beta=1e9)
        ),
        rso_2=("DPO on 8 of 64 by RSO, rso_beta 2", dict(method="rso", rso_beta=2)),
        rso_half=("DPO on 8 of 64 by RSO, rso_beta 0.5", dict(method="rso", rso_beta=0.5)),
    )  # fmt: skip
    waves = [[], [], [], []]
    for seed in seeds:
        sft, reward = work / f"{seed}/sft", work / f"{seed}/reward"
        shared = dict(policy=sft, reward=reward, seed=seed)
        for wave, commands in zip(waves, stages(work, seed)):
            wave += commands
        waves[2].append(command("ppo.py", work / f"{seed}/ppo", **shared))
        for name, (_, flags) in dpo.items():
            out = work / f"{seed}/{name}"
            waves[2].append(command("rejection_sample.py", out, **shared, **flags))
        best = work / f"{seed}/best_of_8/sft.jsonl"
        waves[3].append(command(
            "sft.py", work / f"{seed}/sft_on_best", model=sft, data=best, seed=seed,
            eval_data=DATA / "eval_sft.jsonl", lr=1e-3, warmup=5, epochs=4,
        ))  # fmt: skip
    run_all(waves)

    found = {}  # what -> a result for each seed
    for seed in seeds:
        sft, reward = work / f"{seed}/sft", work / f"{seed}/reward"
        for point in results_of(work / f"{seed}/sample_rank")["best_of_n"]:
            own = dict(gold_after=point["gold"], score_after=point["score"], kl=point["kl"])
            found.setdefault(f"best of {point['n']} (KL: the bound)", []).append(own)
        own = judge(work / f"{seed}/sft_on_best", sft, reward, seed)
        found.setdefault("SFT on best of 8", []).append(own)
        for name, (title, _) in dpo.items():
            found.setdefault(title, []).append(results_of(work / f"{seed}/{name}"))
        found.setdefault("PPO", []).append(results_of(work / f"{seed}/ppo"))
    rows = []
    for name, results in found.items():
        row = [name, " / ".join(f"{100 * r['gold_after']:.1f}" for r in results)]
        row.append(" / ".join(f"{r['score_after']:.2f}" for r in results))
        row.append(" / ".join(f"{r['kl']:.2f}" for r in results))
        rows.append(row)
    columns = ["", "gold, %", "reward model's score", "KL to the SFT model, nats"]
    seeds = "/".join(map(str, seeds))
    return table(f"Rejection sampling beside PPO, seeds {seeds}", columns, rows)


PARTS = dict(rejection=rejection)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("out/bench_learning"))
    args = parser.parse_args()
    for name in args.only.split(","):
        text = PARTS[name](args.work, args.seeds)
        print(text)
        folder = ROOT / "tests/results"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
