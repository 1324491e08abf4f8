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

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common
from common import flag  # a default, what it means, its limits

@dataclass
class Config(common.Settings):  # what all stages share: folder, seed, device, LoRA, ...
    # model and data
    model: str = flag("", "folder or hub name; empty: made from nothing")
    data: str = flag(str(common.EMBEDDED / "sft.jsonl"), "demonstrations, JSONL")
    eval_data: str = flag("", "held-out ones; empty: a part of --data")
    max_length: int = flag(1024, "tokens; longer ones are left out", over=1)
    # optimisation
    epochs: float = flag(2.0, "passes over the data", over=0)
    steps: int = flag(0, "cap on the optimiser steps; 0: none", least=0)
    batch_size: int = flag(32, "demonstrations per optimiser step", over=0)
    lr: float = flag(5e-3, "peak rate; 1e-3 from out/sft on; about 1e-5 for a real model", over=0)
    warmup: int = flag(20, "steps of linear warm-up, at most half of all", least=0)
    out: str = flag("out/sft", "folder of the run")

def texts_of(rows):
    """Every text in these rows, which a model may read or say; `where` (file:line) is none."""
    values = []
    for row in rows:
        values += [value for key, value in row.items() if key != "where"]
    messages = [m for value in values if isinstance(value, list) for m in value]
    values += [m["content"] for m in messages if isinstance(m, dict) and "content" in m]
    return [value for value in values if isinstance(value, str)]

def new_tokenizer(texts, vocab_size=2048):
    """A byte-level BPE tokenizer trained on `texts`. A prompt gets <bos>; a response is what
    follows, up to <eos>.
    """
    tokenizer = Tokenizer(models.BPE())
    # Chinese has no spaces: each character is a word, or whole sentences would become tokens.
    by_character = pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), "isolated")
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([by_character, by_byte])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],  # ids 0, 1, 2
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: no text is unknown
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
    """A small Llama (about 0.7M parameters) with random weights."""
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
    with torch.random.fork_rng():  # Llama draws from the global generator
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)

def main(cfg):
    if cfg.lora_rank and not cfg.model:
        raise common.UserError("--lora_rank: adapters need a --model that has learned something")
    device = common.choose_device(cfg.device)
    run = common.Run(cfg)  # the folder --out: metrics, checkpoints, the result
    train_rows, eval_rows = common.read_split(cfg.data, cfg.eval_data, "eval_sft.jsonl")

    if cfg.model:
        policy = common.load_policy(cfg.model, device, cfg.max_length, frozen=cfg.lora_rank)
        tokenizer = common.load_tokenizer(cfg.model, policy.lm)
        common.add_lora(policy, cfg)  # only with --lora_rank
    else:
        tokenizer = new_tokenizer(texts_of(train_rows))
        policy = common.Policy(new_model(tokenizer, cfg.seed).to(device))

    room = min(cfg.max_length, common.context_length(policy.lm))  # tokens
    ends = common.stop_ids(policy.lm, tokenizer)  # ids that end a response
    examples = common.load_demonstrations(train_rows, tokenizer, ends, room)
    held_out = common.load_demonstrations(eval_rows, tokenizer, ends, room)
    lengths = [len(example["ids"]) for example in examples]
    budget = common.token_budget(cfg, device)  # padded tokens a forward

    optimizer = common.make_optimizer(policy, cfg, cfg.lr)
    run.begin(policy=(policy, optimizer))  # what a checkpoint holds; --resume loads it
    steps = common.total_steps(cfg, len(examples))
    print(
        f"SFT on {device}: {policy.lm.num_parameters() / 1e6:.1f}M parameters, {len(examples)} "
        f"demonstrations, {steps} steps of {cfg.batch_size}"
    )

    for step in run.steps(steps):
        lr = common.set_lr(optimizer, cfg.lr, step, steps, cfg)
        indices = common.epoch_batch(len(examples), cfg.batch_size, step, cfg.seed)
        tokens = sum(sum(examples[i]["mask"]) for i in indices)  # to be learned, in the whole batch
        total = 0.0  # the batch's mean loss, a tensor on the device
        for part in common.micro_batches(indices, lengths, budget):
            batch = common.collate([examples[i] for i in part], device)
            logprobs, _ = policy(batch)  # (b, t), 0 on the prompt and on padding
            loss = -logprobs.sum() / tokens  # the parts add up to the batch's mean
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), cfg.max_grad_norm)
        stats = common.read_stats(dict(loss=total), norm)  # raises where not finite
        optimizer.step()
        optimizer.zero_grad()
        run.log(("loss", "lr"), lr=lr, tokens=tokens, **stats)

    nll = common.evaluate(lambda batch: -policy(batch)[0].sum(1), held_out, cfg, device)  # (B,)
    tokens = sum(sum(example["mask"]) for example in held_out)  # held-out response tokens
    loss = nll.sum().item() / tokens  # nats a token
    perplexity = math.exp(min(loss, 700.0))  # what has diverged must not overflow
    results = dict(loss=loss, perplexity=perplexity, n=len(held_out))
    run.finish(policy, tokenizer, results)
    print(f"held-out loss {loss:.3f}, perplexity {perplexity:.2f}, n = {len(held_out)}")

if __name__ == "__main__":
    common.command_line(Config, main, __doc__)
