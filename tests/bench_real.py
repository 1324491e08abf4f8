"""A real language model on real text, on two CPU cores: a large model's words, a lexicon's reward.

    pip install matplotlib vaderSentiment peft
    python tests/bench_real.py --model SmolLM2-135M-Instruct      # prints its plan and time first
    python tests/bench_real.py --model SmolLM2-135M-Instruct --only hh

sentiment  the first words of film reviews are continued by 16 tokens; the reward is VADER's
           sentiment, the gold what people's labels say (tests/sentiment.py): PPO with a value model
           and with groups of four, three seeds; kl_coef 0.2 and 0, best-of-N, DPO, RSO, one
hh         a reward model on HH-RLHF's human preference pairs of at most 256 tokens, one epoch
peer       --advantage group beside TRL's RLOOTrainer (pip install trl): same model, adapters,
           prompts, reward, answers and tokens, in turns, on two threads

The scripts' own commands, on one thread, two at a time, as in bench_learning.py; finished runs are
not run again. Tables go to tests/results/8_real.md, the picture to 8_real.svg.
"""

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import bench_learning
import numpy as np
import torch
from bench_learning import (
    RESULTS,
    ROOT,
    best_of_groups,
    command,
    metrics_of,
    picture,
    results_of,
    run_all,
    save,
    table,
)

import common
import rejection_sample
import sentiment

SHARED = sentiment.DATA
JUDGES = dict(reward_fn="tests/sentiment.py:vader", gold_fn="tests/sentiment.py:gold")
STEPS, BATCH, NEW = 60, 16, 16  # PPO steps, episodes a step, tokens an answer
PPO = dict(  # folder: what it is, seeds, flags
    gae=("PPO, value model, kl_coef 0.05", 3, dict(kl_coef=0.05)),
    group=("PPO, group of 4, kl_coef 0.05", 3, dict(kl_coef=0.05, advantage="group")),
    kl_02=("PPO, value model, kl_coef 0.2", 1, dict(kl_coef=0.2)),
    kl_0=("PPO, value model, kl_coef 0", 1, dict(kl_coef=0.0)),
)
PREFERENCE = dict(
    dpo=("DPO, best against worst of 16", 1, dict(epochs=2)),
    rso=("DPO, RSO's 8 of 16", 1, dict(method="rso", epochs=0.5)),
)
PROMPTS = 300  # that DPO and RSO see, 16 answers each; PPO sees 960 answers


def prompt_files(work):
    """Prompts to train on, a few of them, and 200 held out: three files."""
    with gzip.open(SHARED / "rt_polarity_prompts.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = file.readlines()
    random.Random(0).shuffle(lines)
    work.mkdir(parents=True, exist_ok=True)
    parts = dict(eval=lines[:200], train=lines[200:], few=lines[200 : 200 + PROMPTS])
    for name, some in parts.items():
        common.write_jsonl(work / f"{name}.jsonl", map(json.loads, some))
    return [work / f"{name}.jsonl" for name in ("train", "few", "eval")]


def ppo_command(out, files, model, seed, **flags):
    train, _, held_out = files
    return command(
        "ppo.py", out, policy=model, data=train, eval_data=held_out, **JUDGES, lora_rank=8,
        lr=5e-4, value_lr=1e-3, lr_schedule="constant", batch_size=BATCH, max_new_tokens=NEW,
        missing_eos_penalty=0.0, save_every=20, seed=seed, **dict(steps=STEPS) | flags,
    )  # fmt: skip


def plan_sentiment(work, files, model):
    _, few, held_out = files
    wave = [
        ppo_command(work / f"{seed}/{name}", files, model, seed, **flags)
        for name, (_, seeds, flags) in PPO.items()
        for seed in range(seeds)
    ]
    for name, (_, _, flags) in PREFERENCE.items():
        wave.append(command(
            "rejection_sample.py", work / f"0/{name}", policy=model, data=few, eval_data=held_out,
            **JUDGES, lora_rank=8, lr=5e-4, beta=0.1, n=16, batch_size=16, max_new_tokens=NEW,
            missing_eos_penalty=0.0, seed=0, **flags,
        ))  # fmt: skip
    return wave


def plan_hh(work, model):
    data = dict(
        data=SHARED / "hh_harmless_train.jsonl.gz", eval_data=SHARED / "hh_harmless_valid.jsonl.gz"
    )
    return [command(
        "reward.py", work / "0/hh", model=model, **data, lora_rank=16, lr=2e-4, batch_size=16,
        max_length=256, seed=0,
    )]  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Sentiment


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def judged(prompts, texts, kl):
    """What is known of one answer to each prompt: a dict of numbers."""
    pairs = [pair for text in texts for pair in zip(words(text), words(text)[1:])]
    gold = np.array(sentiment.gold(prompts, texts))
    return dict(
        vader=float(np.mean(sentiment.vader(prompts, texts))),
        gold=float((gold >= 0.5).mean()),
        kl=kl,
        words=float(np.mean([len(words(text)) for text in texts])),
        pairs=len(set(pairs)) / max(1, len(pairs)),
    )


def finished(work, name):
    """The runs of that name, of all seeds."""
    outs = [work / f"{seed}/{name}" for seed in range((PPO | PREFERENCE)[name][1])]
    return [out for out in outs if results_of(out)]


def answers(out, name="after"):
    rows = common.read_jsonl(out / "samples.jsonl")
    return [row["prompt"] for row in rows], [row[name] for row in rows]


def best_of_n(out):
    """Best-of-n by VADER for n = 1, 2, ... 16, from sixteen answers to each held-out prompt."""
    rows = common.read_jsonl(out / "eval_candidates.jsonl")
    prompts = [row["prompt"] for row in rows]
    rewards = torch.tensor([row["rewards"] for row in rows])
    tokenizer = common.load_tokenizer(json.loads((out / "run.json").read_text())["policy"])
    found = {}
    for n in (1, 2, 4, 8, 16):
        points = []
        for best in best_of_groups(rewards, n).T:
            texts = [
                tokenizer.decode(row["responses"][i], skip_special_tokens=True)
                for row, i in zip(rows, best)
            ]
            points.append(judged(prompts, texts, rejection_sample.best_of_n_kl(n)))
        found[f"best of {n}"] = [{k: float(np.mean([p[k] for p in points])) for k in points[0]}]
    return found


def report_sentiment(work):
    found = best_of_n(work / "0/dpo")
    for name, (title, *_) in (PPO | PREFERENCE).items():
        for out in finished(work, name):
            prompts, texts = answers(out)
            kl = results_of(out)["kl"]
            found.setdefault(title, []).append(judged(prompts, texts, kl))
    cells = lambda points, key, style: " / ".join(format(p[key], style) for p in points)
    rows = [
        [name, cells(points, "vader", ".2f"), cells(points, "gold", ".0%"),
         cells(points, "kl", ".1f"), cells(points, "words", ".1f"), cells(points, "pairs", ".0%")]
        for name, points in found.items()
    ]  # fmt: skip
    columns = ["", "VADER", "gold", "KL, nats", "words", "different pairs of words"]
    text = table(columns, rows) + "\n" + turns(work) + "\n" + favourites(work)
    draw(work, found)
    return text


def windows(work, name, size=10):
    """VADER, gold and KL over training, means of `size` steps and all seeds: (windows, 3)."""
    steps = [metrics_of(out, "score", "gold", "kl") for out in finished(work, name)]
    means = np.mean(steps, axis=0)
    return means.reshape(-1, size, 3).mean(1)


def turns(work):
    """Does gold follow the proxy? Over training, from answers to training prompts."""
    rows = []
    for name, (title, *_) in PPO.items():
        for i, what in enumerate(("VADER", "gold", "KL, nats")):
            style = (".2f", ".0%", ".1f")[i]
            rows.append([f"{title}: {what}", *(format(x[i], style) for x in windows(work, name))])
    columns = ["steps", *(f"{i + 1} to {i + 10}" for i in range(0, STEPS, 10))]
    return table(columns, rows)


def favourites(work):
    """The words that became most frequent, by how many more of the 200 answers hold them."""
    lines = []
    for name, (title, *_) in PPO.items():
        gained, n = Counter(), 0
        for out in finished(work, name):
            for row in common.read_jsonl(out / "samples.jsonl"):
                gained.update(set(words(row["after"])))
                gained.subtract(set(words(row["before"])))
                n += 1
        top = ", ".join(f"{word} {count / n:+.0%}" for word, count in gained.most_common(12))
        lines.append(f"- {title}: {top}")
    return "Words in more of the held-out answers than before:\n\n" + "\n".join(lines)


def draw(work, found):
    figure, axes = picture("8_real", 2)
    best = [points[0] for name, points in found.items() if name.startswith("best of")]
    palette = ["tab:blue", "tab:cyan", "tab:green", "tab:red", "tab:purple", "tab:brown"]
    colours = dict(zip([title for title, *_ in (PPO | PREFERENCE).values()], palette))
    for axis, key, column, scale in zip(axes, ("vader", "gold"), (0, 1), (1, 100)):
        axis.plot([p["kl"] for p in best], [p[key] * scale for p in best], "o-", ms=4,
                  color="tab:orange", label="best of 1, 2, 4, 8, 16")  # fmt: skip
        for title, colour in colours.items():
            points = found.get(title, [])
            axis.plot([p["kl"] for p in points], [p[key] * scale for p in points], "o", ms=5,
                      color=colour, label=title)  # fmt: skip
        for name, (title, *_) in PPO.items():
            curve = windows(work, name)
            axis.plot(curve[:, 2], curve[:, column] * scale, lw=1, color=colours[title])
        axis.set(xlabel="KL to the model before, nats an answer")
    axes[0].set(ylabel="VADER, the reward")
    axes[1].set(ylabel="gold: positive, %")
    axes[1].legend(fontsize=7)
    axes[0].set_title("dots: held-out answers; lines: over training", fontsize=9)
    save(figure)


# ----------------------------------------------------------------------------------------------
# HH-RLHF, and a peer


def report_hh(work):
    results = results_of(work / "0/hh")
    low, high = results["interval"]
    minutes = metrics_of(work / "0/hh", "seconds").sum() / 60
    return (
        f"{results['accuracy']:.1%} of {results['n']} held-out pairs "
        f"(95% interval {low:.1%} to {high:.1%}), {minutes:.0f} minutes"
    )


def peer(work, files, model, steps=8):
    """In turns, two of each on two threads: a run of ours, one of TRL's."""
    env = dict(os.environ, OMP_NUM_THREADS="2")
    lines = []
    for turn in (1, 2):
        out = work / f"peer/{turn}"
        flags = dict(kl_coef=0.05, advantage="group", steps=steps)
        ours = ppo_command(out / "ours", files, model, turn, **flags)
        theirs = [
            sys.executable, str(ROOT / "tests/peer_trl.py"), "--model", model, "--data",
            str(files[0]), "--out", str(out / "theirs"), "--steps", str(steps), "--seed", str(turn),
        ]  # fmt: skip
        if not results_of(out / "ours"):
            subprocess.run(ours, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        if not (out / "theirs/steps.json").exists():
            subprocess.run(theirs, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
        seconds, score = metrics_of(out / "ours", "seconds", "score").T
        own = json.loads((out / "theirs/steps.json").read_text())
        for who, s, r in (("ours", seconds, score), ("TRL", own["seconds"], own["reward"])):
            half = len(s) // 2
            lines.append([who, turn, f"{np.median(s[2:]):.1f}", f"{np.mean(r[:half]):.2f}",
                          f"{np.mean(r[half:]):.2f}"])  # fmt: skip
    columns = ["", "turn", "s a step, median", "reward, first half", "second half"]
    return table(columns, lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--only", default="sentiment,hh,peer", help="parts, by commas")
    parser.add_argument("--work", type=Path, default=Path("out/bench_real"))
    args = parser.parse_args()
    work, parts = args.work.resolve(), args.only.split(",")
    model = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    bench_learning.SECONDS |= {"ppo.py": 900, "rejection_sample.py": 900, "reward.py": 2400}
    files = prompt_files(work)
    wave = plan_sentiment(work, files, model) if "sentiment" in parts else []
    run_all([wave + (plan_hh(work, model) if "hh" in parts else [])])
    text = ""
    if "sentiment" in parts:
        text += "## Sentiment\n\n" + report_sentiment(work) + "\n"
    if "hh" in parts:
        text += "## HH-RLHF\n\n" + report_hh(work) + "\n"
    if "peer" in parts:
        text += "## Beside TRL\n\n" + peer(work, files, model)
    print(text)
    (RESULTS / "8_real.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
