"""Seconds of generation beside `model.generate` and beside the floor; a JSON line a configuration.

    python tests/bench_generate.py                                  # all that the targets speak of
    python tests/bench_generate.py --shapes demo --batches 128 --prompt 24 --new 48     # on a CPU

Random weights, prompts of a quarter to the whole of --prompt tokens, no EOS, temperature 1. The
floor of a decode step is its bytes over the bandwidth of a large copy: every weight once, and the
keys and values of the tokens that are there on average.
"""

import argparse
import gc

import torch
from bench_shapes import (
    SHAPES,
    kv_bytes,
    memory_bandwidth,
    peak_gib,
    print_row,
    random_model,
    seconds,
    start_memory,
)

import common


def peer_generate(lm, prompts, new):
    """`model.generate` on the same prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=lm.device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(lm.device)
    with torch.compiler.set_stance("force_eager"):  # its cache would compile every layer anew
        lm.generate(
            ids, attention_mask=seen, max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="135m,1.5b", help=", ".join(SHAPES))
    parser.add_argument("--batches", default="64,256,512")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--lora_rank", type=int, default=0, help="rollouts through adapters")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--peer", type=int, default=64, help="largest batch the peer is timed at")
    args = parser.parse_args()
    device = common.choose_device("auto")
    dtype = common.weight_dtype(device, frozen=True)
    bandwidth = memory_bandwidth(device)
    settings = argparse.Namespace(
        lora_rank=args.lora_rank, lora_alpha=32.0, seed=0, compile=args.compile
    )
    for shape in args.shapes.split(","):
        policy = None
        gc.collect()  # a compiled layer refers to itself; two models would share the memory
        policy = common.Policy(random_model(shape, device, dtype).requires_grad_(False))
        common.add_lora(policy, settings)
        common.prepare(policy, settings)
        config = policy.lm.config
        for batch in map(int, args.batches.split(",")):
            generator = torch.Generator().manual_seed(0)
            low = max(1, args.prompt // 4)
            lengths = torch.randint(low, args.prompt + 1, (batch,), generator=generator).tolist()
            prompts = [
                torch.randint(5, config.vocab_size, (n,), generator=generator).tolist()
                for n in lengths
            ]
            start_memory(device)
            longest = max(lengths) + args.new
            sampler = common.Sampler(policy, [], args.new, longest, slots=batch)
            ours, warm_up = seconds(lambda: sampler(prompts), device)
            cached = sum(lengths) + batch * args.new / 2  # tokens, on average
            weights = sum(p.numel() * p.element_size() for p in policy.parameters())
            floor = (weights + cached * kv_bytes(config, dtype)) / bandwidth
            row = dict(
                shape=shape, lora_rank=args.lora_rank, batch=batch, prompt=args.prompt,
                new=args.new, device=str(device), ms_per_step=1e3 * ours / args.new,
                tokens_per_s=batch * args.new / ours, floor_ms_per_step=1e3 * floor,
                bandwidth_gb_s=bandwidth / 1e9, warm_up_s=warm_up, peak_gib=peak_gib(device),
            )  # fmt: skip
            sampler.close()
            if batch <= args.peer:
                ours_attends = config._attn_implementation
                policy.lm.set_attn_implementation("sdpa")  # slots know no left padding
                theirs, _ = seconds(lambda: peer_generate(policy.lm, prompts, args.new), device, 1)
                policy.lm.set_attn_implementation(ours_attends)
                row["peer_ms_per_step"] = 1e3 * theirs / args.new
            print_row(**row)


if __name__ == "__main__":
    main()
