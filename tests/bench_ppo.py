"""Seconds and memory of a PPO step, the whole of ppo.py's loop; a JSON line a configuration.

    python tests/bench_ppo.py                                      # all that the targets speak of
    python tests/bench_ppo.py --only demo                          # on a CPU
    python tests/bench_ppo.py --peer SCRIPT                        # another trainer beside it

Random weights; every answer runs to the limit. A configuration is
policy:value:episodes:prompt+new:epochs, and with LoRA :rank. Medians over the steps after the
second, in which layers compile and graphs are captured. The two floors of a step: its decode
steps' bytes over the bandwidth of a large copy, and its forwards' and backwards' operations over
the rate of a large matrix product. SCRIPT takes --arch, --batch, --prompt, --new and --epochs, and
prints JSON.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_shapes import (
    kv_bytes,
    matmul_flops,
    memory_bandwidth,
    peak_gib,
    print_row,
    random_model,
    start_memory,
    training_flops,
    word_tokenizer,
)

import common
import ppo

CONFIGURATIONS = {
    "135m": "135m:135m:64:128+128:4",
    "0.5b": "0.5b:0.5b:64:128+128:4",
    "1.5b": "1.5b:1.5b:64:128+128:4",
    "deepspeed": "opt-1.3b:opt-350m:512:256+256:1",
    "memory": "1.5b:1.5b:64:256+256:4",
    "lora1.5b": "1.5b:1.5b:64:256+256:4:16",
    "lora7b": "7b:7b:64:256+256:4:16",
    "growth128": "135m:135m:128:128+128:4",
    "growth256": "135m:135m:256:128+128:4",
    "growth512": "135m:135m:512:128+128:4",
    "demo": "demo:demo:32:16+16:4",
}


def measure(configuration, steps, folder, more):
    """Run ppo.main with models of random weights; returns medians of what its metrics say."""
    policy, value, episodes, lengths, epochs, *rank = configuration.split(":")
    prompt, new = map(int, lengths.split("+"))
    vocab = random_model(policy, "meta", torch.float32).config.vocab_size
    tokenizer = word_tokenizer(vocab)
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, vocab, (4 * int(episodes), prompt), generator=generator).tolist()
    rows = [dict(prompt=" ".join(f"t{word}" for word in row)) for row in words]
    common.write_jsonl(folder / "prompts.jsonl", rows)
    common.write_jsonl(folder / "eval.jsonl", rows[:2])

    # The scripts' own loops, on models that no folder holds.
    def load_policy(path, device, max_length=float("inf"), frozen=False):
        dtype = common.weight_dtype(device, frozen)
        return common.Policy(random_model(policy, device, dtype), max_length)

    def load_scorer(path, device, frozen=False, new_head=False):
        dtype = common.weight_dtype(device, frozen)
        return common.Scorer(random_model(value, device, dtype, reward=True))

    common.load_policy, common.load_scorer = load_policy, load_scorer
    common.load_tokenizer = lambda path, lm=None: tokenizer
    common.stop_ids = lambda lm, tokenizer: []  # no answer ends before the limit
    common.Run.finish = lambda self, *args: self.metrics.close()
    # What fits 80 GB: OPT keeps the K/V of all its heads, 0.1 GiB a slot of 512 tokens.
    slots = 128 if policy.startswith("opt") else int(episodes)
    if policy in ("1.5b", "7b") and not more["micro_tokens"]:
        more = more | dict(micro_tokens=4096)
    cfg = ppo.Config(
        policy="random", reward="random", data=str(folder / "prompts.jsonl"),
        eval_data=str(folder / "eval.jsonl"), out=str(folder / "ppo"), steps=steps,
        batch_size=int(episodes), max_new_tokens=new, ppo_epochs=int(epochs), lr=1e-6,
        value_lr=1e-6, save_every=0, sample_every=0, slots=slots,
        lora_rank=int(rank[0]) if rank else 0, **more,
    )  # fmt: skip
    ppo.main(cfg)
    rows = [json.loads(line) for line in open(folder / "ppo/metrics.jsonl")]
    found = {}
    for name in rows[-1]:
        found[name] = statistics.median(row[name] for row in rows[2:] or rows)
    return found


def floors(configuration, device):
    """Seconds that a step cannot beat: (of the decode steps' bytes, of the arithmetic)."""
    policy, value, episodes, lengths, epochs, *rank = configuration.split(":")
    prompt, new = map(int, lengths.split("+"))
    B, tokens = int(episodes), int(episodes) * (prompt + new)
    models = [random_model(policy, "meta", torch.float32)]
    models.append(random_model(value, "meta", torch.float32, reward=True))
    dtype = common.weight_dtype(device, frozen=True)
    cached = B * (prompt + new / 2)  # tokens, on average
    step_bytes = dtype.itemsize * models[0].num_parameters()
    step_bytes += cached * kv_bytes(models[0].config, dtype)
    # Backward is twice the forward: old log-probs, reference, value and reward are a forward each.
    passes = int(epochs) + 2 / 3
    operations = sum(training_flops(lm, tokens, B * new, frozen=bool(rank)) for lm in models)
    return new * step_bytes / memory_bandwidth(device), passes * operations / matmul_flops(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ", ".join(CONFIGURATIONS)
    parser.add_argument("--only", default=",".join(n for n in CONFIGURATIONS if n != "demo"),
                        help=f"of {names}, or configurations spelt out")  # fmt: skip
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--micro_tokens", type=int, default=0)
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--peer", type=Path, help="a script, see above")
    args = parser.parse_args()
    device = common.choose_device("auto")
    more = dict(gradient_checkpointing=args.gradient_checkpointing, compile=args.compile)
    more |= dict(micro_tokens=args.micro_tokens)
    if "," in args.only:  # each in a process of its own, so that none pays for another's memory
        flags = [f"--{k}={v}" for k, v in vars(args).items() if v and k not in ("only", *more)]
        flags += [f"--compile={args.compile}", f"--micro_tokens={args.micro_tokens}"]
        flags += ["--gradient_checkpointing"] * args.gradient_checkpointing
        for name in args.only.split(","):
            subprocess.run([sys.executable, __file__, "--only", name, *flags])
        return
    configuration = CONFIGURATIONS.get(args.only, args.only)
    start_memory(device)
    # What ppo.py prints goes to stderr: stdout is for the results.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = measure(configuration, args.steps, Path(folder), more)
    keys = """seconds rollout_seconds score_seconds update_seconds rollout_tokens_per_s
        update_tokens_per_s sampler_gap""".split()
    row = dict(name=args.only, configuration=configuration, device=str(device))
    row |= {key: found[key] for key in keys} | dict(peak_gib=peak_gib(device))
    row["episodes_per_s"] = int(configuration.split(":")[2]) / found["seconds"]
    row["floor_decode_s"], row["floor_arithmetic_s"] = floors(configuration, device)
    policy, _, episodes, lengths, epochs, *_ = configuration.split(":")
    if args.peer:
        prompt, new = lengths.split("+")
        arch = {"135m": "smollm2-135m", "0.5b": "qwen2.5-0.5b", "1.5b": "qwen2.5-1.5b"}.get(policy)
        command = [sys.executable, str(args.peer), "--arch", arch, "--batch", episodes]
        command += ["--prompt", prompt, "--new", new, "--epochs", epochs]
        done = arch and subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done and done.returncode == 0:
            row["peer"] = json.loads(done.stdout.strip().splitlines()[-1])
    print_row(**row)


if __name__ == "__main__":
    main()
