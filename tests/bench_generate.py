"""Seconds of generation beside `model.generate` and beside the floor; a JSON line a configuration.

    python tests/bench_generate.py                                  # all that the targets speak of
    python tests/bench_generate.py --shapes demo --batches 128 --prompt 24 --new 48     # on a CPU

Random weights, prompts of a quarter to the whole of --prompt tokens, no EOS, temperature 1. The
floor of a decode step is its bytes over the bandwidth of a large copy: every weight once, and the
keys and values of the tokens that are there on average.
"""

import argparse
import gc
import json

import torch
from bench_shapes import SHAPES, memory_bandwidth, random_model, seconds

import common


def peer_generate(model, prompts, new):
    """`model.generate` on the same prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).to(model.device)
    with common.as_it_is(model):  # its cache would compile every layer anew
        model.generate(
            ids, attention_mask=seen, max_new_tokens=new, do_sample=True, top_k=0, top_p=1.0,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="135m,1.5b", help=", ".join(SHAPES))
    parser.add_argument("--batches", default="64,256,512")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--lora_rank", type=int, default=0)
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--peer", type=int, default=64, help="largest batch the peer is timed at")
    args = parser.parse_args()
    device = common.choose_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bandwidth = memory_bandwidth(device)
    for shape in args.shapes.split(","):
        model = None
        gc.collect()  # a compiled layer refers to itself; two models would share the memory
        model = random_model(shape, device, dtype).eval().requires_grad_(False)
        common.has_plain_head(model)
        lora = argparse.Namespace(lora_rank=args.lora_rank, lora_alpha=32.0, seed=0)
        common.add_lora(model, lora)
        common.compile_layers(model, args.compile)
        config = model.config
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        head_size = config.hidden_size // config.num_attention_heads
        kv_bytes = 2 * config.num_hidden_layers * heads * head_size * dtype.itemsize  # a token
        for batch in map(int, args.batches.split(",")):
            generator = torch.Generator().manual_seed(0)
            low = max(1, args.prompt // 4)
            lengths = torch.randint(low, args.prompt + 1, (batch,), generator=generator).tolist()
            prompts = [
                torch.randint(5, config.vocab_size, (n,), generator=generator).tolist()
                for n in lengths
            ]
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            ours, warm_up = seconds(
                lambda: common.generate(model, prompts, args.new, -1, slots=batch), device
            )
            cached = batch * (sum(lengths) / batch + args.new / 2)
            weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
            row = dict(
                shape=shape, lora_rank=args.lora_rank, batch=batch, prompt=args.prompt, new=args.new, device=str(device),
                ms_per_step=1e3 * ours / args.new, tokens_per_s=batch * args.new / ours,
                floor_ms_per_step=1e3 * (weights + cached * kv_bytes) / bandwidth,
                bandwidth_gb_s=bandwidth / 1e9, warm_up_s=warm_up,
                peak_gib=common.peak_memory_gib(),
            )  # fmt: skip
            if batch <= args.peer:
                theirs, _ = seconds(lambda: peer_generate(model, prompts, args.new), device, 1)
                row["peer_ms_per_step"] = 1e3 * theirs / args.new
            print(json.dumps({k: v if isinstance(v, (int, str)) else float(f"{v:.4g}")
                              for k, v in row.items()}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
