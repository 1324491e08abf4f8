"""Stage 1, supervised fine-tuning: demonstrations -> a model that answers.

    python sft.py                                                    # the embedded world
    python sft.py --model Qwen/Qwen3-0.6B --data my.jsonl --lr 1e-5  # your own

Maximises the log-likelihood of the demonstrated response y to the prompt x, its EOS included and
the prompt excluded:

    L = - sum_t log pi(y_t | x, y_<t) / (number of response tokens in the batch)

A line of data is {"prompt", "completion"}, {"messages"} (every assistant turn is learned), or
{"prompt", "chosen", "rejected"} (the chosen answer is). Without --model a small Llama is made
from nothing, and a tokenizer with it.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.hf_argparser import HfArg

import common


# fmt: off
@dataclass
class Config:
    # model and data
    model: str = HfArg(default="", help="folder or hub name; empty: made from nothing")
    data: str = HfArg(default=str(common.EMBEDDED / "sft.jsonl"), help="demonstrations, JSONL")
    eval_data: str = HfArg(default="", help="held-out ones; empty: a part of --data")
    max_length: int = HfArg(default=1024, help="tokens; longer ones are left out")
    # optimisation
    epochs: float = HfArg(default=2.0, help="passes over the data")
    steps: int = HfArg(default=0, help="cap on the optimiser steps; 0: none")
    batch_size: int = HfArg(default=32, help="demonstrations per optimiser step")
    lr: float = HfArg(default=5e-3, help="peak rate; about 1e-5 for a real model")
    warmup: int = HfArg(default=20, help="optimiser steps of linear warm-up")
    lr_schedule: Literal["linear", "constant"] = HfArg(default="linear", help="after the warm-up")
    max_grad_norm: float = HfArg(default=1.0, help="gradient clipping, L2 norm")
    micro_tokens: int = HfArg(default=0, help="padded tokens a forward; 0: 8192 CUDA, 512 CPU")
    gradient_checkpointing: bool = HfArg(default=False, help="less memory, slower")
    shard: bool = HfArg(default=False, help="torchrun: each process keeps a part of the weights")
    # LoRA
    lora_rank: int = HfArg(default=0, help="train adapters of this rank, not the weights; 0: off")
    lora_alpha: float = HfArg(default=32.0, help="the adapters count alpha / rank times")
    merge: bool = HfArg(default=False, help="save with the adapter merged, not the adapter alone")
    # the run
    out: str = HfArg(default="out/sft", help="folder of the run")
    resume: bool = HfArg(default=False, help="continue the run in --out")
    overwrite: bool = HfArg(default=False, help="replace the run in --out")
    save_every: int = HfArg(default=200, help="steps between checkpoints; 0: only when stopped")
    keep: int = HfArg(default=1, help="checkpoints to keep")
    tensorboard: bool = HfArg(default=False, help="log there too; pip install tensorboard")
    wandb: bool = HfArg(default=False, help="log to Weights & Biases too; pip install wandb")
    quiet: bool = HfArg(default=False, help="print nothing but errors")
    seed: int = HfArg(default=0, help="of the initial weights and the order of the data")
    device: str = HfArg(default="auto", help="auto, cpu, cuda, cuda:1, ...")
    compile: Literal["auto", "on", "off"] = HfArg(default="auto", help="auto: large and on CUDA")
# fmt: on


def check(cfg):
    common.require(cfg, "epochs", "steps", max_length=(1, math.inf))
    if cfg.lora_rank and not cfg.model:
        raise common.UserError("--lora_rank: adapters need a --model that has learned something")


def texts_of(rows):
    """All that a model may read or say in these lines; not where they come from."""
    values = [value for row in rows for key, value in row.items() if key != "where"]
    messages = [m for value in values if isinstance(value, list) for m in value]
    values += [m.get("content") for m in messages if isinstance(m, dict)]
    return [value for value in values if isinstance(value, str)]


def new_tokenizer(texts, vocab_size=2048):
    """A byte-level BPE tokenizer trained on `texts`. A prompt gets <bos>; a response is what
    follows, up to <eos>.
    """
    tokenizer = Tokenizer(models.BPE())
    # Chinese has no spaces: each character is a word, or BPE would merge whole sentences into
    # tokens of no use elsewhere.
    by_character = pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), "isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_character, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        # every byte, so that no text is unknown
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    wrapped.chat_template = (
        "{% for m in messages %}"
        "{{ m.content + eos_token if m.role == 'assistant' else bos_token + m.content }}"
        "{% endfor %}"
    )
    return wrapped


def new_model(tokenizer, seed):
    """A small Llama (about 0.9M parameters) with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.08,  # the usual 0.02 is for wide models, and learns slowly here
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@torch.no_grad()
def evaluate(model, examples, micro_tokens):
    """Mean negative log-likelihood of the response tokens, in nats."""
    total = tokens = 0.0
    for batch in common.batches(examples, micro_tokens, model.device):
        logprobs = common.response_logprobs(model, batch)  # (b, R)
        total -= logprobs.sum().item()
        tokens += batch.mask.sum().item()
    return total / tokens


def main(cfg):
    check(cfg)
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)
    train_rows, eval_rows = common.read_split(cfg.data, cfg.eval_data, "eval_sft.jsonl")

    if cfg.model:
        tokenizer = common.load_tokenizer(cfg.model)
        model = common.load_policy(cfg.model, device, common.trained_dtype(cfg, device))
    else:
        tokenizer = new_tokenizer(texts_of(train_rows))
        model = new_model(tokenizer, cfg.seed).to(device)

    limit = min(cfg.max_length, common.context_length(model))
    examples = common.load_demonstrations(train_rows, tokenizer, limit)
    eval_examples = common.load_demonstrations(eval_rows, tokenizer, limit)

    optimizer = common.make_trainable(model, cfg, cfg.lr)
    run.begin(model=model, optimizer=optimizer)

    micro_tokens = common.token_budget(cfg, device)
    steps = common.total_steps(cfg, len(examples))
    tokens = sum(sum(mask) for _, mask in examples)
    print(
        f"SFT on {device}: {model.num_parameters() / 1e6:.1f}M parameters, {len(examples)} "
        f"demonstrations ({tokens} response tokens), {steps} steps of {cfg.batch_size}"
    )
    common.print_memory_plan(device, cfg, [model])

    for step in run.steps(steps):
        rows = common.epoch_batch(len(examples), cfg.batch_size, step, cfg.seed)
        batch_tokens = sum(sum(examples[row][1]) for row in rows)
        loss = torch.zeros((), device=device)
        for batch in common.batches(examples, micro_tokens, device, common.share(rows)):
            logprobs = common.response_logprobs(model, batch)  # (b, R)
            # Every token of the whole batch weighs the same, however the batch is cut.
            micro_loss = -logprobs.sum() / batch_tokens
            micro_loss.backward()
            loss += micro_loss.detach()

        lr = common.set_lr(optimizer, cfg.lr, step, steps, cfg.warmup, cfg.lr_schedule)
        ids = (examples[row][0] for row in rows)
        stats = common.optimizer_step(model, optimizer, dict(loss=loss), ids, cfg)
        run.log(("loss", "lr"), lr=lr, tokens=batch_tokens, **stats)

    loss = evaluate(model, eval_examples, micro_tokens)
    print(
        f"held-out loss {loss:.3f} nats a token (perplexity {math.exp(loss):.2f}), "
        f"{len(eval_examples)} demonstrations"
    )
    run.finish(model, tokenizer, dict(loss=loss, perplexity=math.exp(loss), n=len(eval_examples)))


if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
