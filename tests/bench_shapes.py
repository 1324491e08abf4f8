"""What the benchmarks share: random weights in the shapes of known models, and the machine's floor.

Speed does not depend on what the weights are, so nothing is downloaded.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {
    "demo": lambda: LlamaConfig(  # what sft.py makes
        hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=2048, tie_word_embeddings=True,
    ),
    "135m": lambda: LlamaConfig(  # SmolLM2
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    ),
    "0.5b": lambda: Qwen2Config(  # Qwen2.5
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
    "1.5b": lambda: Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
    ),
    "7b": lambda: Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
    "opt-350m": lambda: OPTConfig(
        hidden_size=1024, ffn_dim=4096, num_attention_heads=16, num_hidden_layers=24
    ),
    "opt-1.3b": lambda: OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_attention_heads=32, num_hidden_layers=24
    ),
}  # fmt: skip


def random_model(shape, device, dtype, reward=False):
    config = SHAPES[shape]()
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, None, 1
    auto_class = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    config.num_labels = 1
    config.dropout = config.attention_dropout = 0.0  # as common.load_model makes it
    with torch.device(device):
        return auto_class.from_config(config, dtype=dtype).train()


def word_tokenizer(vocab_size):
    """A tokenizer whose words are t0, t1, ...: a prompt of n words has n tokens."""
    words = models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t2")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="t0", eos_token="t1")


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run, device, repeats=3):
    """The best of `repeats` timings, after one run to warm up: (seconds, of the warm-up)."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:]), times[0]


def memory_bandwidth(device):
    """Bytes a second, read and written, of a large copy."""
    a = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    best, _ = seconds(lambda: b.copy_(a), device, repeats=10)
    return 2 * a.numel() * a.element_size() / best


def matmul_flops(device):
    """Floating-point operations a second of a large product, in the type that training uses."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best, _ = seconds(lambda: a @ b, device, repeats=10)
    return 2 * n**3 / best


def training_flops(lm, tokens, head_tokens, frozen=False):
    """Operations of a forward and a backward: 6 for each token and weight of the layers, and for
    each response token and weight of an LM head; 4 where the weights are frozen under LoRA.
    Attention's products of tokens with tokens are left out.
    """
    lists = [part for part in lm.modules() if isinstance(part, torch.nn.ModuleList)]
    layers = sum(p.numel() for p in max(lists, key=len).parameters())
    head = lm.get_output_embeddings()
    head = 0 if head is None else head.weight.numel()
    return (4 if frozen else 6) * (tokens * layers + head_tokens * head)


def kv_bytes(config, dtype):
    """Of one token in the cache."""
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_size = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_size * dtype.itemsize


def start_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device):
    """Of the device since `start_memory`; on the CPU of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


def print_row(**row):
    """A line of JSON, numbers to four digits."""
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = float(f"{value:.4g}")
    print(json.dumps(row), flush=True)
