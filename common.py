"""What the stages share, in reading order: log-probs and GAE; batches; models with the
forward that training needs; sampling; training, in one process or several; data; scores and
answers; the run's settings, folder and command line.

Shapes: B sequences (b of a micro-batch), T (t) tokens, N where the mask is 1, V vocabulary, d
hidden size; S slots of a Sampler, n some of them.

An example is a dict of lists, one entry a token: `ids`, and a `mask` that is 1 on the tokens of the
response, EOS included, and 0 on the prompt. A batch has the same keys, padded on the right to
(B, T), and entry t is about token t. Causal attention never looks right, so it needs no attention
mask and no position ids; and no mask is guessed from `ids != pad`, as pad often is EOS.
"""

import argparse
import copy
import fcntl
import gzip
import importlib
import json
import math
import os
import random
import runpy
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as states
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

torch.backends.cuda.enable_cudnn_sdp(False)  # its plan for each new shape takes up to a second

EMBEDDED = Path(__file__).resolve().parent / "data"  # the small HHH world, for lack of other data

class UserError(Exception):
    """A mistake of the user's, told in one line; the command line turns it into exit code 2."""

@contextmanager
def reading(what, error=UserError):
    """Around what the user brings (a file, a model, a function): a problem becomes one line."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise  # both have a message of their own
    except (Exception, SystemExit) as problem:  # a user's function may call exit()
        calls = traceback.extract_tb(problem.__traceback__)
        lines = [f":{call.lineno}" for call in calls if call.filename == str(what)]  # of a script
        says_itself = isinstance(problem, ValueError) and str(problem)  # what was expected
        kind = "" if says_itself else f"{type(problem).__name__}: "
        message = f"{kind}{problem}".strip().partition("\n")[0]
        raise error(f"{what}{''.join(lines[-1:])}: {message}") from problem

# ------------------------------------------------------------------------------ log-probs and GAE

def token_logprobs(logits, tokens, temperature=1.0):
    """log softmax(logits / temperature) at `tokens`: (..., V), (...) -> (...), in float32."""
    log_p = (logits.float() / temperature).log_softmax(-1)  # (..., V)
    return log_p.gather(-1, tokens[..., None]).squeeze(-1)  # (...)

def masked_mean(x, mask):
    """Mean of `x` over the entries where `mask` is 1: a scalar, 0 when there is none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)

def masked_variance(x, mask):
    """Population variance of `x` over the entries where `mask` is 1: a scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

def whiten(x, mask, scale=True):
    """`x` shifted to mean 0 and, with `scale`, scaled to variance 1 over the mask; 0 elsewhere."""
    centred = (x - masked_mean(x, mask)) * mask
    if not scale:
        return centred
    return centred * torch.rsqrt(masked_variance(x, mask) + 1e-8)  # where all are equal: 0, not nan

def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2015, eq. 16) over real response tokens.

    All (B, T). values[:, t] is V(s_t), the state before token t is chosen. The episode ends after
    its last real token, so nothing is bootstrapped past it. Returns (advantages, returns), both 0
    where mask is 0.
    """
    advantages = torch.zeros_like(values)  # (B, T)
    next_value = torch.zeros_like(values[:, 0])  # (B,), V(s_{t+1})
    next_advantage = torch.zeros_like(values[:, 0])  # (B,), A_{t+1}
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]  # padding stays 0: the episode is over
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask  # return = A + V, the target of V

# ---------------------------------------------------------------------------------------- batches

def join(prompt, response):
    """Prompt and response ids as one example."""
    return dict(ids=prompt + response, mask=[0] * len(prompt) + [1] * len(response))

def pad_right(rows):
    """Lists of different lengths -> (B, longest) tensor with zeros on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

def collate(examples, device="cpu"):
    """Examples as one batch on `device`, padded with 0 on the right: every key (B, T), the mask
    float32, and `at` (N,), the flat indices b * T + t of the tokens where the mask is 1.
    One example with ids 5 6 7 2 and mask 0 0 1 1 (prompt 5 6, response 7 2) gives
    ids [[5, 6, 7, 2]], mask [[0., 0., 1., 1.]] and at [2, 3]. An empty prompt is an AssertionError.
    """
    batch = {}
    for key in examples[0]:
        batch[key] = pad_right([example[key] for example in examples])  # (B, T)
    batch["mask"] = batch["mask"].float()
    # A first token has no log-prob, and its `at - 1` would be the last token of the row above.
    assert not batch["mask"][:, 0].any(), "a response must not begin with the first token"
    return take(batch, slice(None), device)

def take(batch, rows, device):
    """The sequences `rows` of a batch that lies on the host, cut to the longest of them."""
    used = batch["mask"][rows].any(0)  # (T,); a response ends its sequence
    T = int(used.nonzero().max()) + 1
    part = {key: x[rows, :T] for key, x in batch.items() if key != "at"}
    part["at"] = part["mask"].flatten().nonzero().squeeze(1)  # (N,); on a GPU nonzero() would wait
    return {key: x.to(device, non_blocking=True) for key, x in part.items()}

def micro_batches(rows, lengths, max_tokens):
    """Cut `rows` into lists of rows of similar length, each at most `max_tokens` when padded.

    micro_batches([0, 1, 2], [3, 9, 4], 8) -> [[0, 2], [1]]: one long sequence may exceed the limit.
    Of P processes each gets one of every P neighbours, so that all have equally many lists, as the
    forward of a sharded model needs every process. There must be a multiple of P rows.
    """
    rows = sorted(rows, key=lambda row: lengths[row])
    parts = [[]]
    for start in range(0, len(rows), world_size()):
        neighbours = rows[start : start + world_size()]  # one for each process
        padded = (len(parts[-1]) + 1) * lengths[neighbours[-1]]  # tokens, were it to take one more
        if parts[-1] and padded > max_tokens:
            parts.append([])
        parts[-1].append(neighbours[rank()])
    return parts

@torch.no_grad()
def evaluate(function, examples, cfg, device):
    """function(batch) over all examples, without gradients, by micro-batches of similar length; of
    several processes each runs a share, and all get the whole: one float32 tensor on the host.
    A function that returns (b,), a number a sequence, gives (B,); one that returns (b, t, k), k
    numbers a token, gives (B, T, k), 0 past the end of a micro-batch.
    """
    B = len(examples)
    examples = examples + examples[:1] * (-B % world_size())  # a multiple of the processes
    lengths = [len(example["ids"]) for example in examples]
    results = None  # until the first result shows the shape
    for rows in micro_batches(range(len(examples)), lengths, token_budget(cfg, device)):
        batch = collate([examples[row] for row in rows], device)
        x = function(batch).float().cpu()  # (b,) or (b, t, k)
        if x.dim() > 1:
            x = F.pad(x, (0, 0, 0, max(lengths) - x.shape[1]))  # (b, T, k)
        if results is None:
            results = torch.zeros(len(examples), *x.shape[1:])
        results[rows] = x
    return all_sum(results)[:B]  # a row is 0 in all processes but the one that has run it

def token_budget(cfg, device):
    """Padded tokens a forward may hold. A CPU gains nothing by more, and loses by the padding."""
    return cfg.micro_tokens or (8192 if device.type == "cuda" else 512)

# ----------------------------------------------------------------------------------------- models
# Two modules around a Hugging Face model `lm`; what is known of the model is a field of theirs.

class Policy(torch.nn.Module):
    """A causal LM: Policy(lm)(batch, temperature) -> (logprobs, entropy), each (B, T) float32: of
    the response tokens under softmax(logits / temperature), and 0 elsewhere.
    Only the hidden states before response tokens reach the LM head, 1,024 at a time, and each chunk
    is computed again in the backward pass: the float32 logits (B, T, V), larger than all else,
    never exist. A model is not `usual` if it scales its logits or has windows shorter than
    `max_length`; then it runs more slowly, by its own forward alone.
    """

    def __init__(self, lm, max_length=math.inf):
        super().__init__()
        self.lm = lm
        self.peft = None  # with LoRA the PeftModel around lm
        self.head_logprobs, self.draw = head_logprobs, draw  # or the same, compiled
        self.usual = True  # so that sample_one tries the fast way
        self.usual = same_logits(lm, self.sample_one, max_length) == "slots"
        if not self.usual:
            print(f"{type(lm).__name__}: unusual logits or attention, it will run more slowly")

    def sample_one(self, ids):
        """The logits (V,) after `ids` (1, T) by a Sampler: of a decode step, after a prefill."""
        ids = ids[0].tolist()
        sampler = Sampler(self, [], max_new_tokens=2, max_length=len(ids), slots=2)
        ragged = [ids[:-1], ids[:4]]  # all but the last token, and a prompt of another length
        sampler.prefill([0, 1], ragged, torch.Generator(sampler.device))
        sampler.ids[0, -2] = ids[-1]  # for the step, in place of the token that was drawn
        logits = sampler.logits(len(ids))[0]
        sampler.close()
        return logits

    def hidden(self, ids, **kwargs):
        """What `head` makes logits of: hidden states (B, T, d), or the model's own logits."""
        if self.usual:
            return hidden_states(self.lm, ids, **kwargs)
        return self.lm(input_ids=ids, use_cache=False).logits

    def head(self, hidden):
        return self.lm.get_output_embeddings()(hidden) if self.usual else hidden

    def forward(self, batch, temperature=1.0):
        """(logprobs, entropy), see above; while gradients are recorded the entropy is all 0."""
        ids, at = batch["ids"], batch["at"]  # (B, T), (N,)
        parts = []
        with autocast(ids.device):
            hidden = self.hidden(ids).flatten(0, 1)[at - 1]  # (N, d): position t - 1 predicts t
            tokens = ids.flatten()[at]  # (N,)
            for chunk in zip(hidden.split(1024), tokens.split(1024)):
                inputs = (self.head, *chunk, temperature)
                if torch.is_grad_enabled() and len(tokens) > 1024:  # one chunk has nothing to save
                    outputs = checkpoint(self.head_logprobs, *inputs, use_reentrant=False)
                else:
                    outputs = self.head_logprobs(*inputs)
                parts.append(outputs)  # (log-probs, entropies), at most 1,024 each
        zeros = torch.zeros(ids.shape, device=ids.device)  # (B, T)
        where = at // ids.shape[1], at % ids.shape[1]  # rows and columns
        logprobs, entropy = map(torch.cat, zip(*parts))  # (N,), (N,)
        return zeros.index_put(where, logprobs), zeros.index_put(where, entropy)

def head_logprobs(head, hidden, tokens, temperature):
    """Hidden states (N, d) and the tokens after them (N,) -> log-probs and entropies, (N,) each."""
    log_p = (head(hidden).float() / temperature).log_softmax(-1)  # (N, V)
    logprobs = log_p.gather(-1, tokens[:, None]).squeeze(-1)  # (N,)
    if torch.is_grad_enabled():  # in training nobody asks for it, and it takes a tenth of the time
        return logprobs, torch.zeros_like(logprobs)
    return logprobs, -(log_p.exp() * log_p).sum(-1)

class Scorer(torch.nn.Module):
    """A reward or value model: Scorer(lm)(batch) -> scores (B, T). Entry t is the score head on the
    hidden state of token t, which has read all up to t, less the mean that reward.py stored.
    """

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.peft = None  # with LoRA the PeftModel around lm
        self.mean = lm.config.to_dict().get("reward_mean", 0.0)  # 0: not reward.py's
        at_the_last = lambda ids: lm.score(hidden_states(lm, ids))[0, -1]  # noqa: E731
        self.reads_tokens = same_logits(lm, at_the_last) is not None  # None: an encoder of a text
        if self.reads_tokens:
            lm.score.float()  # a score rounded to bfloat16 has three digits

    def forward(self, batch):
        """(B, T) float32; past the end of a sequence it means nothing."""
        with autocast(batch["ids"].device):
            hidden = hidden_states(self.lm, batch["ids"])  # (B, T, d)
        return self.lm.score(hidden.float()).squeeze(-1) - self.mean  # in float32, as the head is

    def last(self, batch):
        """The score of each sequence, (B,): read at the last token of its response."""
        last = batch["mask"].cumsum(1).argmax(1, keepdim=True)  # (B, 1): where all are counted
        return self(batch).gather(1, last).squeeze(1)  # (B,)

def hidden_states(lm, ids, **kwargs):
    return lm.base_model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state

@torch.no_grad()
def same_logits(lm, ours, max_length=math.inf):
    """Whether ours(ids) gives the model's own logits after a few tokens: with slot_attention, which
    unlike transformers' own never waits for the device, or else with the model's own attention.
    Returns "slots", the name of its own, or None for neither, and leaves the last one tried set.
    """
    config = lm.config.get_text_config().to_dict()
    ids = [i % lm.get_input_embeddings().num_embeddings for i in range(10)]
    ids = [i for i in ids if i != config.get("pad_token_id")]  # a classifier skips pads
    ids = torch.tensor([ids], device=lm.device)  # (1, 9 or 10)
    logits = lm(input_ids=ids).logits  # (1, 10, V); of a classifier (1, 1)
    logits = logits.flatten(0, -2)[-1].float()  # (V,); or (1,)
    tolerance = (1e-4 if lm.dtype == torch.float32 else 0.05) * logits.abs().max()
    ways = ["slots", lm.config._attn_implementation]
    window = config.get("use_sliding_window", True) and config.get("sliding_window")
    if window and window < min(max_length, context_length(lm)):  # tokens
        ways.remove("slots")  # which sees everything to the left
    for attention in ways:
        try:
            lm.set_attn_implementation(attention)
            gap = (ours(ids).float() - logits).abs().max()
            if gap <= tolerance:
                return attention
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model raises that cannot do what ours asks for
            pass

def load_policy(path, device, max_length=math.inf, frozen=False):
    """A causal LM as a Policy, for sequences of up to `max_length`."""
    return Policy(load_model(transformers.AutoModelForCausalLM, path, device, frozen), max_length)

def load_scorer(path, device, frozen=False, new_head=False):
    """A reward or value model as a Scorer; `new_head`: a causal LM under a score head of zeros."""
    kind = transformers.AutoModelForSequenceClassification
    return Scorer(load_model(kind, path, device, frozen, new_head))

def load_model(kind, path, device, frozen, new_head=False):
    """A Hugging Face model with all its weights and no dropout, in train() mode, or a UserError."""
    if (Path(path) / "adapter_config.json").exists():
        return load_adapter(kind, path, device, frozen, new_head)
    # No code of a model's folder ever runs. Of misfits transformers only warns.
    how = dict(trust_remote_code=False, ignore_mismatched_sizes=True, output_loading_info=True)
    scorer = kind is transformers.AutoModelForSequenceClassification
    if scorer:
        how["num_labels"] = 1  # one score, whatever the config says
    with reading(path):
        lm, found = kind.from_pretrained(path, dtype=weight_dtype(device, frozen), **how)
    architecture = (lm.config.architectures or ["a model"])[0]  # as saved
    needed = "a reward model" if scorer and not new_head else "a causal language model"
    if ("ForSequenceClassification" in architecture) != (needed == "a reward model"):
        raise UserError(f"{path}: {architecture}, where {needed} is needed")
    missing = set(found["missing_keys"])
    if new_head and "score.weight" in missing:  # an encoder's head has another name
        missing.remove("score.weight")
        lm.score.weight.data.zero_()  # (1, d)
    layers = lm.config.get_text_config().num_hidden_layers
    problems = {
        "missing": missing,
        "of another shape": [name for name, *_ in found["mismatched_keys"]],
        # A spare LM head is fine, a layer that the model lacks is not.
        "of a layer too many": [n for n in found["unexpected_keys"] if f".{layers}." in n],
        "not finite": [n for n, p in lm.named_parameters() if not p.isfinite().all()],
    }
    for problem, names in problems.items():
        if names:
            raise UserError(f"{path}: {len(names)} weights {problem}, such as {min(names)}")
    # No dropout, or no ratio starts at 1; not by eval(), which ends gradient checkpointing.
    for module in lm.modules():
        dropout = isinstance(module, torch.nn.Dropout)
        for name, value in vars(module).items():
            if isinstance(value, float) and (dropout or "drop" in name):  # attention_dropout, say
                setattr(module, name, 0.0)
    return lm.to(device).train()

def load_adapter(kind, path, device, frozen, new_head):
    """The model that an adapter of peft was made for, with the adapter merged into its weights."""
    with reading(f"{path} is an adapter: pip install peft"):
        import peft
    scorer = kind is transformers.AutoModelForSequenceClassification  # the adapter has its head
    with reading(path), warnings.catch_warnings():
        adapter = peft.PeftConfig.from_pretrained(path)
        if (adapter.task_type == "SEQ_CLS") != (scorer and not new_head):
            raise UserError(f"{path}: an adapter ({adapter.task_type}) of another kind")
        lm = load_model(kind, adapter.base_model_name_or_path, device, frozen, new_head=scorer)
        adapter.task_type = None  # or peft would look for what only a causal model has
        warnings.filterwarnings("error", "Found missing adapter keys")  # told by `reading`
        lm = peft.PeftModel.from_pretrained(lm, path, config=adapter)
        lm = lm.merge_and_unload(safe_merge=True)  # raises where there is a NaN
    return lm.requires_grad_(True).train()  # as it was before peft

def load_tokenizer(path, lm=None):
    """A tokenizer; that of a policy `lm` has EOS, and no id beyond the embeddings. UserError."""
    with reading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if lm is not None and tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so no response could end")
    if lm is not None and len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        raise UserError(f"{path}: the tokenizer has more ids than the model has embeddings")
    return tokenizer

def save_model(module, folder):
    """A folder for plain transformers. Merging adapters spoils `module`. All processes call it."""
    if module.peft:
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.unshard()  # merging needs whole weights
        cast(module.lm, torch.float32)  # in bfloat16 a small update would be lost
        module.lm = module.peft.merge_and_unload()
        weights = dict(module.lm.named_parameters())
    else:
        weights = states.get_model_state_dict(module.lm, options=SAVING)
    if rank() == 0:
        module.lm.save_pretrained(folder, state_dict=weights)

def cast(lm, dtype):
    """The parameters alone: lm.to(dtype) would round the rotary frequencies, too."""
    for parameter in lm.parameters():
        parameter.data = parameter.data.to(dtype)

def weight_dtype(device, frozen):  # frozen: the whole model, or all but its adapters
    return torch.bfloat16 if frozen and device.type == "cuda" else torch.float32

def autocast(device):
    """bfloat16 arithmetic over float32 weights on a GPU; plain float32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

def context_length(lm):
    """The longest sequence that the model is made for; infinity where its config names none."""
    config = lm.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf  # GPT-2's n_positions too
    rope = config.to_dict().get("rope_parameters") or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):  # past this length the angles change
        return rope.get("original_max_position_embeddings") or limit
    return limit

# --------------------------------------------------------------------------------------- sampling

def slot_attention(module, query, key, value, attention_mask, scaling=None, slots=None, **kwargs):
    """Plain causal attention; with a Sampler as `slots` over the K/V that it keeps on the module.

    query (B, H, Q, D), key and value (B, G, Q, D): G groups of H/G heads. Returns (B, Q, H, D).
    """
    assert not kwargs.get("softcap") and kwargs.get("s_aux") is None, "capped scores, or sinks"
    if attention_mask is not None or key.shape[2] != query.shape[2]:
        raise ValueError("slot_attention takes no padding and no cache: sample by common.generate")
    B, H, Q, D = query.shape  # in a decode step B = S and Q = 1
    G = key.shape[1]
    if slots is not None:
        if not hasattr(module, "slot_kv"):
            shape = slots.size, G, slots.max_length
            module.slot_kv = [x.new_zeros(*shape, x.shape[-1]) for x in (key, value)]
        keys, values = module.slot_kv  # (S, G, max_length, D) each
        rows, positions = slots.into  # of the slots, and in them: they broadcast to (B, Q)
        keys[rows, :, positions] = key.transpose(1, 2)  # (B, Q, G, D)
        values[rows, :, positions] = value.transpose(1, 2)
    if slots is None or slots.visible is None:  # whole sequences: in training, and prompts
        how = dict(is_causal=True, scale=scaling, enable_gqa=G != H)
        return F.scaled_dot_product_attention(query, key, value, **how).transpose(1, 2), None
    # One token a slot. Heads that share keys stand on the query-length axis: K is not repeated.
    kv = slots.visible.shape[-1]  # cached positions that are read
    query = query.view(B, G, H // G, D)  # from (B, H, 1, D)
    how = dict(attn_mask=slots.visible, scale=scaling)
    out = F.scaled_dot_product_attention(query, keys[:, :, :kv], values[:, :, :kv], **how)
    return out.reshape(B, 1, H, -1), None  # None: no attention weights

transformers.AttentionInterface.register("slots", slot_attention)

def draw(logits, noise, temperature):
    """Tokens (n,) drawn from softmax(logits / temperature), (n, V), and their log-probs (n,); at
    temperature 0 the likeliest. `noise` (n, V) is uniform in [0, 1).
    """
    scaled = logits.float() / (temperature or 1.0)  # at temperature 0 log-probs are those of 1
    # argmax(logits + Gumbel noise) is a draw from softmax(logits); -log(-log(uniform)) is Gumbel.
    gumbel = 0 if temperature == 0 else -(-noise.log()).log()  # (n, V)
    tokens = (scaled + gumbel).argmax(-1)  # (n,)
    return tokens, token_logprobs(scaled, tokens)

class Sampler:
    """Draws responses from a policy: `responses, logprobs = sampler(prompts, generator)`.

    S slots hold S sequences of different lengths. Each attention module keeps K/V buffers for them;
    a decode step writes each sequence's new key and value at that sequence's length, so nothing is
    padded on the left. When a response ends, its slot takes the next prompt. The tensors that a
    step reads and writes are never replaced, so on CUDA it is recorded as a graph: one launch.
    """

    def __init__(self, policy, eos_ids, max_new_tokens, max_length, temperature=1.0, slots=256):
        self.policy, self.lm = policy, policy.lm
        self.device = policy.lm.device
        free_slots(self.lm)  # of another Sampler
        self.eos_ids = list(eos_ids)
        self.max_new_tokens = max_new_tokens
        self.max_length = max_length  # of prompt and response
        self.temperature = temperature  # 0 is greedy
        self.size = slots
        with self.device:
            self.rows = torch.arange(slots)  # (S,)
            self.ids = torch.zeros(slots, max_length + 1, dtype=torch.long)  # + 1 for done rows
            self.logprobs = torch.zeros(slots, max_length + 1)  # 0 or old numbers at prompts
            self.length = torch.zeros(slots, dtype=torch.long)  # cached; ids[length] is not yet
            self.end = torch.zeros(slots, dtype=torch.long)  # where the longest response ends
            self.done = torch.ones(slots, dtype=torch.bool)  # (S,); True in free slots
            self.eos = torch.tensor(self.eos_ids)
            V = self.lm.get_output_embeddings().out_features
            self.noise = torch.empty(slots, V)  # uniform numbers, drawn afresh for each step
        self.graphs = {}  # kv: the decode step over that many cached positions
        self.use_graphs = self.device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.use_graphs else None  # for all graphs

    @torch.no_grad()
    def __call__(self, prompts, generator=None):
        """Answer prompts, lists of token ids. Returns (responses, logprobs) in their order: token
        ids, EOS kept where sampled, and their log-probs under softmax(logits / temperature).
        """
        # Steps until the host looks at the device again, and lengths that one graph serves.
        burst, bucket = (16, 128) if self.use_graphs else (1, 1)
        together = max(1, 16384 // self.max_length)  # prompts of one prefill, for its memory
        self.length.zero_()
        n = len(prompts)
        responses, logprobs = [None] * n, [None] * n
        begun = 0  # prompts that have had a slot
        answering = {}  # slot: the number of its prompt
        while begun < n or answering:
            free = [slot for slot in range(self.size) if slot not in answering]
            # A prefill costs as much as a decode step or more: it waits for an eighth of the slots.
            if begun < n and len(free) >= max(1, self.size // 8):
                first, begun = begun, min(n, begun + len(free), begun + together)
                answering.update(zip(free, range(first, begun)))
                self.prefill(free[: begun - first], prompts[first:begun], generator)
                continue
            longest = int(self.length.max()) + burst  # tokens in the cache when the burst is over
            kv = min(math.ceil(longest / bucket) * bucket, self.max_length)
            for _ in range(burst):
                self.step(kv, generator)
            for slot in self.done.nonzero().flatten().tolist():
                if slot in answering:  # else the slot was free before
                    i = answering.pop(slot)
                    response = slice(len(prompts[i]), self.length[slot] + 1)  # columns of ids
                    responses[i] = self.ids[slot, response].tolist()
                    logprobs[i] = self.logprobs[slot, response].tolist()
        return responses, logprobs

    def sample(self, prompts, *key):
        """By all processes: each answers a share, seeded by `key` and its rank, and gets all."""
        generator = make_generator(self.device, *key, rank())
        responses, logprobs = self(prompts[rank() :: world_size()], generator)
        return gather(responses), gather(logprobs)

    def prefill(self, slots, prompts, generator):
        """Run n prompts into n free slots and draw the first token of each response."""
        rows = torch.tensor(slots, device=self.device)  # (n,)
        ids = pad_right(prompts).to(self.device)
        n, P = ids.shape  # P: the longest of these prompts
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)  # (n,)
        self.ids[rows, :P] = ids
        self.length[rows] = lengths
        self.end[rows] = lengths + self.max_new_tokens - 1
        self.done[rows] = False
        # For slot_attention: where the K/V go, slots (n, 1) and positions; nothing is read there.
        self.into, self.visible = (rows[:, None], torch.arange(P, device=self.device)), None
        noise = self.noise[:n].uniform_(generator=generator)  # (n, V)
        with torch.compiler.set_stance("force_eager"):  # or every number of prompts would compile
            hidden = self.policy.hidden(ids, slots=self)[self.rows[:n], lengths - 1]  # (n, d)
            self.append(rows, self.policy.head(hidden), noise)

    def step(self, kv, generator):
        """The next token of every slot that is not done yet, from the graph where there is one."""
        self.noise.uniform_(generator=generator)
        if kv in self.graphs:
            return self.graphs[kv].replay()
        self.decode(kv)
        if self.use_graphs:  # it has run once, so nothing is left to compile or to set up
            try:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    self.decode(kv)
                self.graphs[kv] = graph
            except RuntimeError as error:
                self.use_graphs = False
                print(f"the decode step is no CUDA graph, so it is slower: {error}")

    def decode(self, kv):
        logits = self.logits(kv)
        self.length += ~self.done
        self.append(self.rows, logits, self.noise)

    def logits(self, kv):
        """Feed every slot its last token; it sees `kv` positions at most. (S, V)"""
        if not self.policy.usual:  # no cache: read the whole sequences again
            return self.policy.hidden(self.ids[:, :kv])[self.rows, self.length]
        at = self.length[:, None]  # (S, 1)
        self.into = self.rows[:, None], at
        self.visible = (torch.arange(kv, device=self.device) <= at)[:, None, None]  # (S, 1, 1, kv)
        token = self.ids.gather(1, at)  # (S, 1)
        hidden = self.policy.hidden(token, position_ids=at, slots=self)[:, 0]  # (S, d)
        return self.policy.head(hidden)

    def append(self, rows, logits, noise):
        """Draw a token from logits (n, V) for each of `rows` (n,) that is not done yet."""
        tokens, logprobs = self.policy.draw(logits, noise, self.temperature)  # (n,), (n,)
        at = self.length[rows] + self.done[rows]  # of a row that is done, one past its answer
        self.ids[rows, at] = tokens
        self.logprobs[rows, at] = logprobs
        ended = (tokens[:, None] == self.eos).any(-1)  # (n,)
        self.done[rows] |= ended | (self.length[rows] == self.end[rows])

    @torch.no_grad()
    def sync(self, policy):
        """pi_old <- pi, in place, as the graphs read these very tensors."""
        if policy.lm is not self.lm:  # or this samples by the very weights that are trained
            for old, new in zip(self.lm.parameters(), policy.lm.parameters()):
                old.copy_(new.full_tensor() if isinstance(new, DTensor) else new)

    def close(self):
        """Free the K/V buffers and the graphs; another call makes new ones."""
        self.graphs.clear()
        free_slots(self.lm)

def free_slots(lm):
    for module in lm.modules():
        vars(module).pop("slot_kv", None)  # slot_attention's

def sampling_copy(policy, cfg):
    """The policy that samples: itself where that is fast, else a whole copy, for `Sampler.sync`."""
    dtype = weight_dtype(policy.lm.device, frozen=True)
    if world_size() == 1 and policy.lm.dtype == dtype:
        return policy
    copied = copy.deepcopy(policy).requires_grad_(False)  # so it is called before sharding
    cast(copied.lm, dtype)
    return prepare(copied, cfg, shard=False)

def generate(lm, prompts, max_new_tokens, eos_id, temperature=1.0, generator=None, slots=256):
    """Sample a response to each prompt from any Hugging Face causal LM, which is left as it was.

    prompts: lists of token ids, of any lengths. eos_id: an int or several. temperature 0 is greedy.
    generator: a torch.Generator on the model's device; None: the global one. `slots` run at once.
    Returns lists of ids in the order of the prompts, EOS kept. ValueError for an empty prompt.
    """
    if not all(map(len, prompts)):
        raise ValueError("generate: an empty prompt has no token to continue from")
    eos_ids = [eos_id] if isinstance(eos_id, int) else eos_id
    longest = max(map(len, prompts), default=0) + max_new_tokens  # tokens of prompt and response
    training, attention = lm.training, lm.config._attn_implementation  # to be put back
    slots = min(slots, len(prompts))
    try:
        policy = Policy(lm.eval(), longest)
        sampler = Sampler(policy, eos_ids, max_new_tokens, longest, temperature, slots)
        return sampler(prompts, generator)[0]
    finally:
        free_slots(lm)
        lm.train(training).set_attn_implementation(attention)

# ----------------------------------------------------------- training, in one process or several
# Started by torchrun, each process takes rows[rank::world_size] of a batch, and FSDP2 keeps a part
# of every weight on each. What is small (answers, scores, (B, T) tensors) every process has whole,
# so that the scripts read as for one.

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def all_sum(tensor):
    """The tensor, summed over the processes in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

def gather(rows):
    """Undoes rows[rank::world_size]: one list from the shares of all processes."""
    if not dist.is_initialized():
        return rows
    P = world_size()
    parts = [None] * P
    dist.all_gather_object(parts, rows)
    return [parts[i % P][i // P] for i in range(sum(map(len, parts)))]

def add_lora(module, cfg):
    """With --lora_rank: freeze a model under new adapters of no effect (Hu et al. 2021; PEFT's)."""
    if not cfg.lora_rank:
        return
    with reading("--lora_rank: pip install peft"):
        import peft
    settings = dict(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules="all-linear")
    if isinstance(module, Scorer):
        settings |= dict(task_type="SEQ_CLS", modules_to_save=["score"])  # the head: trained whole
    with torch.random.fork_rng(), reading("--lora_rank"):
        torch.manual_seed(cfg.seed)  # peft draws from the global generator
        wrapped = peft.get_peft_model(module.lm, peft.LoraConfig(**settings))
    module.lm = wrapped.get_base_model()
    object.__setattr__(module, "peft", wrapped)  # torch's setattr would register lm twice

def without_adapter(module):
    """A context with the LoRA adapter, if any, switched off."""
    return module.peft.disable_adapter() if module.peft else nullcontext()

def prepare(module, cfg, shard=True):
    """Compile a model (`auto`: a large one on CUDA) and shard it over the processes; returns it."""
    device = module.lm.device
    size = sum(p.numel() for p in module.parameters())
    lists = [part for part in module.lm.modules() if isinstance(part, torch.nn.ModuleList)]
    layers = max(lists, key=len, default=[])  # the transformer layers are the longest list
    if device.type == "cpu" and size < 5e6 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second thread gains a third; on busy cores it loses tenfold
    if cfg.compile == "on" or (cfg.compile == "auto" and device.type == "cuda" and size > 50e6):
        torch._dynamo.config.recompile_limit = 64  # all models of a family count together
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs eagerly
        for layer in layers:  # one by one: the first one's code serves all
            layer.compile(dynamic=True)
        module.head_logprobs = torch.compile(head_logprobs, dynamic=True)
        module.draw = torch.compile(draw, dynamic=False)
    if shard and world_size() > 1:
        mesh = dist.init_device_mesh(device.type, (world_size(),))
        for part in (*layers, module):
            # Sharded again after each forward, or adapters once switched off would train no more.
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
            part.set_gradient_divide_factor(1.0)  # losses are shares of a whole: no average
            part.set_force_sum_reduction_for_comms(True)
    return module

def make_optimizer(module, cfg, lr):
    """Prepare a model for training; returns AdamW over what is trained of it."""
    if cfg.gradient_checkpointing:
        module.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    trained = [p for p in prepare(module, cfg).parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

def read_stats(totals, norm, name="grad_norm"):
    """Scalars, summed over the processes, and the norm of a gradient, as floats: the one time in an
    optimiser step that the host waits for the device. UserError where one is not finite.
    """
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # it is of all processes
    numbers = [*all_sum(torch.stack(list(totals.values()))), norm.detach()]
    stats = dict(zip([*totals, name], torch.stack(numbers).tolist()))
    check_finite(stats, "this update was not made: try a lower rate or a longer --warmup")
    return stats

def check_finite(numbers, then):
    for name, number in numbers.items():
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{name} is {number}; {then}")

def set_lr(optimizer, lr, step, steps, cfg):
    """Set and return the rate of `step` (from 1): linear warm-up, then constant or linear decay."""
    warmup = min(cfg.warmup, steps // 2)  # steps; a short run would never reach its rate
    lr = lr * min(1.0, step / max(1, warmup))
    if cfg.lr_schedule == "linear" and step > warmup:
        lr = lr * (steps - step + 1) / (steps - warmup + 1)  # it would be 0 at steps + 1
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr

def total_steps(cfg, n):
    """Optimiser steps of --epochs over `n` examples, or fewer by --steps."""
    steps = math.ceil(cfg.epochs * n / cfg.batch_size)
    return min(steps, cfg.steps or steps)

def make_generator(device, *key):
    """A generator seeded by (seed, step, purpose), so that a resumed run draws the same numbers."""
    seed = random.Random(repr(key)).getrandbits(63)  # hash() would differ between processes
    return torch.Generator(device).manual_seed(seed)

def seed_global(*key):
    """The same for code that draws from the global generators: a --reward_fn, say."""
    transformers.set_seed(make_generator("cpu", *key, rank()).initial_seed() % 2**32)  # for NumPy

def epoch_batch(n, size, step, seed):
    """The rows of batch `step` (from 1) in an endless series of shuffled epochs of n rows."""
    rows = []
    first = (step - 1) * size
    while len(rows) < size:  # a batch may reach into the next epoch
        epoch, at = divmod(first + len(rows), n)
        order = torch.randperm(n, generator=make_generator("cpu", seed, "epoch", epoch)).tolist()
        rows += order[at : at + size - len(rows)]
    return rows

# ------------------------------------------------------------------------------------------- data
# A line of a data file becomes a row: its keys, and its `where`, "file:line". A prompt or response
# is text, or chat messages, which go to the chat template with all they hold and the row's `tools`.

class Unlearnable(ValueError):
    """Raised for a line from which nothing can be learned: it is left out and counted."""

def read_jsonl(path):
    """The rows of a .jsonl(.gz) file. Raises UserError."""
    rows = []
    open_file = gzip.open if str(path).endswith(".gz") else open
    with reading(path), open_file(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            with reading(where):
                if line.strip():
                    rows.append(read_row(line) | dict(where=where))
    if not rows:
        raise UserError(f"{path}: no lines in it")
    return rows

def read_row(line):
    """The keys of a line that are not null: texts and messages `plain`, tools as a list."""
    texts = "prompt messages completion response responses chosen rejected".split()
    row = json.loads(line.decode("utf-8-sig"))  # Windows writes a byte order mark
    json.dumps(row, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    row = {key: value for key, value in row.items() if value is not None}
    for key in row.keys() & texts:
        with reading(f'"{key}" is not text, nor chat messages', error=ValueError):
            if key == "responses":
                row[key] = list(map(plain, [] + row[key]))  # raises where it is no list
            else:
                row[key] = plain(row[key])
    if isinstance(row.get("tools"), str):  # Parquet cannot hold schemas that differ
        row["tools"] = json.loads(row["tools"])
    return row

def plain(value):
    """Text or messages, whose content becomes text where it is null or a list of parts."""
    if isinstance(value, str):
        return value
    messages = []
    for message in value:
        content = message.get("content") if "tool_calls" in message else message["content"]
        if isinstance(content, list):
            content = "".join([part["text"] for part in content])  # an image has none: KeyError
        content = "" if content is None else "" + content  # raises where it is no text
        messages.append(message | dict(role=message["role"], content=content))
    return messages

def is_embedded(path):
    names = "sft pairs scores rankings prompts eval_sft eval_pairs eval_prompts probe_prompts"
    return Path(path).resolve() in [EMBEDDED / f"{name}.jsonl" for name in names.split()]

def read_split(path, eval_path, embedded_eval):
    """Training and held-out rows: eval_path, the embedded file, or the last 5%, at most 200."""
    rows = read_jsonl(path)
    if eval_path or is_embedded(path):
        return rows, read_jsonl(eval_path or EMBEDDED / embedded_eval)
    if len(rows) == 1:
        raise UserError(f"{path}: one line cannot be training and held-out data; name --eval_data")
    held_out = min(200, max(1, len(rows) // 20))  # lines
    print(f"no --eval_data: the last {held_out} of {len(rows)} lines of {path} are held out")
    return rows[:-held_out], rows[-held_out:]

def read_all(rows, read, what):
    """read(row) of all rows but those that are Unlearnable; UserError if there is no other."""
    items, left_out = [], []
    for row in rows:
        with reading(row["where"]):  # any other error ends the run, in one line
            try:
                items.append(read(row))
            except Unlearnable as why:
                left_out.append(f"{row['where']}: {why}")
    if left_out:
        message = f"{len(left_out)} of {len(rows)} {what} left out, such as {left_out[0]}"
        if not items:
            raise UserError(message)
        print(message)
    return items

def prompt_and_responses(row):
    """A row's prompt, and its responses: one, chosen and rejected, the K of a ranking, or none."""
    prompt, chosen = row.get("prompt"), row.get("chosen")
    responses = [row[key] for key in ("completion", "response") if key in row]
    responses += row.get("responses", [])
    if "chosen" in row:
        responses = [chosen, row["rejected"]]
    if "messages" in row and (prompt is None or not responses):
        prompt = row["messages"]
        while prompt and prompt[-1]["role"] == "assistant":  # up to what is to be answered
            prompt = prompt[:-1]
    # Pairs may be whole dialogues, without a prompt (HH-RLHF) or with it once more (UltraFeedback).
    dialogue = isinstance(chosen, list) and chosen and chosen[0]["role"] != "assistant"
    if "chosen" in row and (prompt is None or dialogue):
        n = len(chosen) - 1  # of the prompt, messages: all but the last
        if isinstance(chosen, str):  # or characters: up to where the assistant speaks
            before, turn, _ = os.path.commonprefix(responses).rpartition("\n\nAssistant:")
            n = len(before + turn)
        elif chosen[:n] != row["rejected"][:n]:
            raise Unlearnable('"chosen" and "rejected" answer different prompts')
        prompt = chosen[:n] or None
        responses = [response[n:] for response in responses]
    if prompt is None:
        raise ValueError('no "prompt" (is "conversations" to be "messages", of role and content?)')
    return prompt, responses

ANY = dict(role="assistant", content="\ufdd0")  # stands for any answer; no text holds that

def render(tokenizer, prompt, row, turn=None):
    """Messages as text, by the template: with the answer `turn`, or up to where one begins."""
    answer = turn or ANY
    # An assistant message that ends a prompt is to be continued; in `messages` each one is whole.
    if prompt and prompt[-1]["role"] == "assistant" and "messages" not in row:
        *prompt, begun = prompt
        if begun.get("tool_calls"):
            raise ValueError("the prompt ends with a tool call, which cannot be continued")
        text = begun["content"] + answer["content"]
        answer = begun | answer | dict(content=text)
    elif prompt and turn is None:
        answer = None  # the template itself begins an answer
    messages = [*prompt, answer] if answer else prompt
    how = dict(tools=row.get("tools") or None, add_generation_prompt=not answer)
    with reading("the chat template", error=Unlearnable):  # it may not know a role, say
        text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    return text.partition(ANY["content"])[0]  # up to ANY; the whole text where it is not

def encode_prompt(tokenizer, prompt, row={}):
    """Token ids: text with its special tokens (no EOS), messages through the chat template."""
    if isinstance(prompt, list):
        return tokenizer.encode(render(tokenizer, prompt, row), add_special_tokens=False)
    ids = tokenizer.encode(prompt)
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some add it
        ids = ids[:-1]
    return ids

def encode(tokenizer, prompt, response, row={}, ends=(), max_tokens=math.inf):
    """Prompt and response, each text or messages, as an example: dict(ids, mask), lists of T.
    They are tokenised apart, as generation sees them. A response in messages is the text that the
    chat template adds to the prompt. It ends with the token at which generation would: EOS, which
    is added, or before it one of the ids `ends`. Raises Unlearnable where no token is left to
    learn, above `max_tokens` and where the template fails; ValueError for a tool call after text.
    """
    turn = dict(role="assistant", content=response)
    if isinstance(response, list):
        if [message["role"] for message in response] != ["assistant"]:
            raise Unlearnable("a response in messages must be one, of the assistant")
        turn = response[0]
    if isinstance(prompt, list):
        before = render(tokenizer, prompt, row)
        whole = render(tokenizer, prompt, row, turn)
        without = turn | dict(tool_calls=None)
        if turn.get("tool_calls") and whole == render(tokenizer, prompt, row, without):
            raise Unlearnable("the chat template leaves tool calls out")
        if not whole.startswith(before):  # the template rewrites the prompt once it is answered:
            other = render(tokenizer, prompt, row, ANY)  # then it is what all answers share
            before = os.path.commonprefix([whole, other])
        prompt_ids = tokenizer.encode(before, add_special_tokens=False)  # the template has them
        text = whole[len(before) :]
    elif turn.get("tool_calls"):
        raise ValueError("a tool call needs a prompt in messages")
    else:
        prompt_ids, text = encode_prompt(tokenizer, prompt), turn["content"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    eos = tokenizer.eos_token_id
    if eos is not None:  # a reward model's tokenizer may have none
        ids = ids + [eos]
    for n, token in enumerate(ids, 1):
        if token in ends or token == eos:
            ids = ids[:n]  # what a template writes after it is never sampled
            break
    example = join(prompt_ids, ids)
    example["mask"][:1] = [0]  # a first token has no log-prob
    if not any(example["mask"]) and eos is not None:
        raise Unlearnable("no token to learn")
    if len(example["ids"]) > max_tokens:
        raise Unlearnable(f"longer than {max_tokens} tokens")
    return example

def load_demonstrations(rows, tokenizer, ends, max_tokens):
    """Examples of SFT data. Of `messages` each assistant turn is one of its own, after the history
    as the template renders it (Qwen3's drops what was thought before).
    """

    def split(row):
        prompt, responses = prompt_and_responses(row)
        messages = row.get("messages", [])
        turns = []
        if responses and "responses" not in row:  # the completion, or the chosen of a pair
            turns.append(row | dict(prompt=prompt, completion=responses[0]))
            messages = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                turns.append(row | dict(prompt=messages[:i], completion=[message]))
        if not turns:
            raise ValueError("no completion and no assistant message to learn from")
        return turns

    def read(row):
        return encode(tokenizer, row["prompt"], row["completion"], row, ends, max_tokens)

    turns = [turn for turns in read_all(rows, split, "dialogues") for turn in turns]
    return read_all(turns, read, "demonstrations")

def load_prompts(rows, tokenizer, cfg, *models):
    """Rows of any form with their `prompt` and its `ids`, which leave all models room to answer."""
    context = min(context_length(model.lm) for model in models)  # tokens
    longest = min(cfg.max_prompt_tokens, context - cfg.max_new_tokens)
    embeddings = [model.lm.get_input_embeddings().num_embeddings for model in models]
    if min(embeddings) < embeddings[0]:
        raise UserError("--ref has fewer embeddings than --policy")

    def read(row):
        prompt, _ = prompt_and_responses(row)
        ids = encode_prompt(tokenizer, prompt, row)
        if not 0 < len(ids) <= longest:
            raise Unlearnable(f"{len(ids)} tokens, not 1 to {longest}; see --max_new_tokens")
        return row | dict(prompt=prompt, ids=ids)

    return read_all(rows, read, "prompts")

def stop_ids(lm, tokenizer):
    """The ids that end a response: EOS of model and tokenizer, and of a turn in the template."""
    config = lm.generation_config if lm.can_generate() else lm.config
    if not lm.can_generate():
        with suppress(OSError):  # the causal LM's, of whose folder a new reward model is made
            config = transformers.GenerationConfig.from_pretrained(lm.name_or_path)
    ids = config.eos_token_id  # an int, a list or None
    ids = ids if isinstance(ids, list) else [ids]
    ids = {tokenizer.eos_token_id, *ids} - {None}
    with suppress(Unlearnable):  # only messages need the template, and they will say so
        question = dict(role="user", content="a")
        answer = dict(role="assistant", content="a")
        text = render(tokenizer, [question], {}, answer).strip()  # it may end with a newline
        last = tokenizer.encode(text, add_special_tokens=False)[-1:]
        added = tokenizer.added_tokens_decoder
        ids.update(i for i in last if i in added and added[i].special)  # <|im_end|>, say
    return sorted(ids)

# ----------------------------------------------------------------------------- scores and answers
# A score is a function: score(rows from `load_prompts`, responses as token ids) -> (B,).

def function_score(spec, tokenizer):
    """Scores by file.py:function(prompts, responses) -> a number for each response, as text."""
    path, _, name = spec.rpartition(":")
    if not path:
        raise UserError(f"{spec}: expected file.py:function")
    path = Path(path).resolve()
    with reading(path):  # the only code that is executed from a path
        sys.path.append(str(path.parent))  # its neighbours, as for a script
        function = runpy.run_path(str(path))[name]

    def score(prompts, responses):
        mine = slice(rank(), None, world_size())
        texts = [tokenizer.decode(r, skip_special_tokens=True) for r in responses[mine]]
        questions = copy.deepcopy([row["prompt"] for row in prompts[mine]])  # it may change its own
        n = len(texts)
        with reading(path):
            scores = [float(number) for number in function(questions, texts)] if n else []
        if len(scores) != n or not all(map(math.isfinite, scores)):
            raise UserError(f"{spec}: expected {n} finite scores, got {scores[:8]}")
        return torch.tensor(gather(scores))

    return score

def load_gold(cfg, data, tokenizer):
    """The judge --gold_fn, or the embedded world's own where `data` is its; otherwise None."""
    spec = cfg.gold_fn
    if not spec and is_embedded(data):
        spec = f"{EMBEDDED / 'hhh.py'}:gold_score"
    return function_score(spec, tokenizer) if spec else None

def load_score(cfg, policy, tokenizer, adapters=False):
    """By --reward_fn or --reward: (score, model). The model is None where it does not read the
    policy's own tokens. With `adapters` it gets those of --lora_rank, which scoring ignores.
    """
    if cfg.reward_fn:
        return function_score(cfg.reward_fn, tokenizer), None
    device = policy.lm.device
    reward = load_scorer(cfg.reward, device, frozen=True).requires_grad_(False)
    reward_tokenizer = load_tokenizer(cfg.reward)
    same = tokenizer.get_vocab().items() <= reward_tokenizer.get_vocab().items()
    ids = reward.lm.get_input_embeddings().num_embeddings
    policy_ids = policy.lm.get_input_embeddings().num_embeddings  # it may sample any of them
    if not same or ids < policy_ids or not reward.reads_tokens:
        return text_score(reward, reward_tokenizer, policy, tokenizer, cfg), None
    if adapters and cfg.lora_rank:
        add_lora(reward, cfg)
    else:
        prepare(reward, cfg)

    def score(prompts, responses):
        examples = [join(row["ids"], response) for row, response in zip(prompts, responses)]
        with without_adapter(reward):
            return evaluate(reward.last, examples, cfg, device)

    return score, reward

def text_score(reward, reward_tokenizer, policy, tokenizer, cfg):
    """Scores by a reward model with another tokenizer. A causal one reads what reward.py makes of
    the texts, an encoder the last message and the response as a text pair, one by one.
    """
    lm, stops = reward.lm, stop_ids(policy.lm, tokenizer)  # ids of the policy
    ends = stop_ids(lm, reward_tokenizer) if reward.reads_tokens else []  # of the reward model
    longest = min(context_length(lm), reward_tokenizer.model_max_length)  # tokens
    how = dict(truncation=True, max_length=longest, return_tensors="pt")

    @torch.no_grad()
    def score(prompts, responses):
        examples, scores = [], []
        for row, response in zip(prompts, responses):
            prompt = row["prompt"]
            text = tokenizer.decode(response, skip_special_tokens=True)
            with reading(f"{row['where']}: {cfg.reward}"), autocast(lm.device):
                if reward.reads_tokens:
                    ids = encode(reward_tokenizer, prompt, text, row, ends)["ids"]
                    if response[-1] not in stops and ids[-1] in ends:  # the response was cut
                        ids = ids[:-1]
                    examples.append(join(ids[:-1], ids[-1:]))  # it is scored at the last token
                else:
                    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
                    pair = reward_tokenizer(question, text, **how)  # (1, T)
                    logits = lm(**pair.to(lm.device)).logits.flatten()  # (1,)
                    scores.append(logits[0].float().cpu() - reward.mean)
        if scores:
            return torch.stack(scores)  # (B,)
        return evaluate(reward.last, examples, cfg, lm.device)

    return score

def both_logprobs(policy, ref, batch, temperature):
    """Log-probs of the policy and of the frozen reference, the policy's entropy: (B, T) each."""
    logprobs, entropy = policy(batch, temperature)
    with torch.no_grad(), without_adapter(ref):  # with LoRA the reference may be the policy
        ref_logprobs, _ = ref(batch, temperature)
    return logprobs, ref_logprobs, entropy

@torch.no_grad()
def answer_prompts(policy, sampler, ref, prompts, tokenizer, score, gold, cfg):
    """Answers with a fixed seed, as lists over the prompts: texts, scores before any penalty and
    gold scores (empty without a judge), whether they ended by themselves, KL to the reference.
    """
    ids = [prompt["ids"] for prompt in prompts]
    sampler.sync(policy)
    responses, _ = sampler.sample(ids, cfg.seed, "answers")
    seed_global(cfg.seed, "answers")  # for what the score may draw

    def kl_of(batch):
        logprobs, ref_logprobs, _ = both_logprobs(policy, ref, batch, cfg.temperature)
        return (logprobs - ref_logprobs).sum(1)  # (b,), nats a response

    examples = list(map(join, ids, responses))
    return dict(
        texts=[tokenizer.decode(r, skip_special_tokens=True) for r in responses],
        scores=score(prompts, responses).tolist() if score else [],
        gold=gold(prompts, responses).tolist() if gold else [],
        ended=[r[-1] in sampler.eos_ids for r in responses],
        kl=evaluate(kl_of, examples, cfg, policy.lm.device).tolist(),
    )

def compare(prompts, **answers):
    """Rows for samples.jsonl, and the means for eval.json, with the shares of good answers by kind
    and task. Each of `answers`, before=... or after=..., is what `answer_prompts` returns.
    """
    rows = [dict(prompt=prompt["prompt"]) for prompt in prompts]
    lists = {}  # what a mean is taken over, by its key in eval.json
    for name, answer in answers.items():
        lists[f"eos_rate_{name}"] = answer["ended"]
        if answer["scores"]:
            lists[f"score_{name}"] = answer["scores"]
        for row, text in zip(rows, answer["texts"]):
            row[name] = text
        for row, score in zip(rows, answer["scores"]):
            row[f"score_{name}"] = score
        for prompt, gold in zip(prompts, answer["gold"]):
            for group in dict.fromkeys((None, prompt.get("kind"), prompt.get("task"))):
                key = f"gold_{name}" if group is None else f"gold_{name}_{group}"
                lists.setdefault(key, []).append(gold >= 0.5)
    means = {key: sum(numbers) / len(numbers) for key, numbers in lists.items()}
    return rows, dict(n=len(prompts)) | means

def print_answers(results, samples):
    """The numbers of eval.json, then some of the answers side by side."""
    for key, number in results.items():
        print(f"  {key:36}{number:8.3f}" if isinstance(number, float) else f"  {key:36}{number}")
    for row in samples[:: max(1, len(samples) // 6)]:  # six or a few more, spread over all
        print(f"\n  {str(row['prompt'])[-300:]}")  # characters
        for name, text in row.items():
            if isinstance(text, str) and name != "prompt":
                print(f"    {name:10} {text[:300]}")

# ---------------------------------------------------------------------------------------- the run

def flag(default, help, choices=None, over=-math.inf, least=-math.inf, most=math.inf):
    """A setting, and the command line's flag of that name: a number > over, >= least, <= most."""
    kind = type(default)

    def number(text):
        value = kind(text)
        if kind is not str and not (over < value < math.inf and least <= value <= most):
            limits = f"a number over {over}, from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: expected {limits}")
        return value

    how = dict(type=number, choices=choices, metavar="|".join(choices or [kind.__name__]))
    if kind is bool:
        how = dict(action="store_true")
    return field(default=default, metadata=dict(help=f"{help} [{default}]", **how))

@dataclass
class Settings:
    """What means the same in every stage; each stage's Config adds its own."""

    out: str = flag("", "folder of the run")
    resume: bool = flag(False, "continue the run in --out")
    overwrite: bool = flag(False, "replace the run in --out")
    save_every: int = flag(200, "steps between checkpoints; 0: only when stopped", least=0)
    seed: int = flag(0, "of all that is drawn or shuffled", least=0, most=2**63 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, ...")
    compile: str = flag("auto", "layers; auto: large ones on CUDA", choices=["auto", "on", "off"])
    lr_schedule: str = flag("linear", "after the warm-up", choices=["linear", "constant"])
    max_grad_norm: float = flag(1.0, "each model's gradient is clipped to this L2 norm", over=0)
    micro_tokens: int = flag(0, "padded tokens a forward; 0: 8192 on CUDA, 512 on CPU", least=0)
    gradient_checkpointing: bool = flag(False, "less memory, slower")
    lora_rank: int = flag(0, "train adapters of this rank, by peft; 0: all weights", least=0)
    lora_alpha: float = flag(32.0, "the adapters are scaled by alpha / rank", over=0)

FREE = ("out", "resume", "overwrite", "save_every", "device")  # may change in a resumed run
INPUTS = "model policy ref reward reward_fn gold_fn data eval_data pairs ptx_data".split()  # files
# What a run writes beside run.json and metrics.jsonl. --overwrite removes these, nothing else.
OWN_FILES = """eval.json checkpoint.pt candidates.jsonl eval_candidates.jsonl sft.jsonl dpo.jsonl
    samples.jsonl report.html config.json generation_config.json model.safetensors
    model-*-of-*.safetensors model.safetensors.index.json chat_template.jinja tokenizer.json
    tokenizer_config.json tokenizer.model added_tokens.json vocab.json vocab.txt merges.txt
    spiece.model""".split()

SAVING = states.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
LOADING = states.StateDictOptions(full_state_dict=True, strict=False)  # only what is trained

class Run:
    """A stage's folder: settings, metrics, a checkpoint; at the end the model and eval.json.

    run.begin(policy=(policy, optimizer), ...)   what a checkpoint holds
    for step in run.steps(total):                progress, checkpoints, Ctrl-C
        run.log(("loss",), loss=...)             one line of metrics.jsonl a step
    run.finish(model, tokenizer, results)
    """

    def __init__(self, cfg):
        """Raises UserError when the folder is taken and no flag says what to do; writes nothing."""
        self.cfg, self.out = cfg, Path(cfg.out)
        self.stop_signal = 0  # its number, once there was one
        self.report_due = 0.0  # on the clock of time.perf_counter()
        if cfg.resume and cfg.overwrite:
            raise UserError("--resume continues the run, --overwrite replaces it: give one of them")
        sequences = cfg.batch_size // getattr(cfg, "minibatches", 1)  # of an optimiser step
        if sequences % world_size():
            raise UserError(f"--batch_size: {sequences} a step, not for {world_size()} processes")
        self.inputs = set()
        for name in INPUTS:
            value = getattr(cfg, name, "")
            path = Path(value.rpartition(":")[0] or value)  # of file.py:function, file.py
            if value and path.exists():
                self.inputs.add(path)
        self.check_folder()

    def check_folder(self):
        """True: there is a run to continue. False: one may begin. UserError: no flag allows it."""
        names = {path.name for path in self.out.glob("*") if path.lstat().st_size}
        if names <= {"run.json.tmp"}:  # a kill may leave that, and an empty metrics.jsonl
            return False
        with reading(f"--out {self.out} is not empty, and its run.json is not a run's"):
            before = json.loads((self.out / "run.json").read_text())
            if not before.keys() >= {"out", "seed", "batch_size", "lr"}:
                raise ValueError("it is another program's")
        finished = (self.out / "eval.json").exists()
        if self.cfg.resume and not finished:
            for key, value in asdict(self.cfg).items():
                if key not in FREE and before.get(key) != value:
                    raise UserError(f"--resume {self.out}: --{key} was {before.get(key)!r}")
            return True
        if not self.cfg.overwrite:
            what = "a finished run" if finished else "a run that --resume continues"
            raise UserError(f"--out {self.out} holds {what}: --overwrite it, or use another --out")
        for path in self.inputs:
            if path.resolve().is_relative_to(self.out.resolve()):
                raise UserError(f"--overwrite {self.out}: it holds what this run reads, {path}")
        return False

    def begin(self, coefs=None, **trained):
        """Write the settings, or load a checkpoint in place. Nothing is written before this."""
        self.coefs, self.trained = coefs or {}, trained
        gather([])  # as a barrier: each process has looked at the folder
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            self.metrics = open(self.out / "metrics.jsonl", "a")
            with reading(f"--out {self.out}: another run is writing there"):
                fcntl.flock(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the process ends
            if self.check_folder():  # once more: another run may have begun since
                began = (self.out / "run.json").stat().st_ctime
                for path in self.inputs:
                    if max(file.stat().st_ctime for file in [path, *path.glob("*")]) > began:
                        print(f"--resume {self.out}: {path} has changed since the run began")
            else:  # a kill in between leaves the old run or the new, none that seems finished
                for name in OWN_FILES:
                    for path in self.out.glob(name):
                        path.unlink()
                write_file(self.out / "run.json", json.dumps(asdict(self.cfg), indent=2))
        gather([])
        state = dict(step=0, rows=[])
        path = self.out / "checkpoint.pt"
        if path.exists():
            with reading(path):
                state = torch.load(path, weights_only=True, map_location="cpu")
                self.coefs.update(state["coefs"])
                for name, (model, optimizer) in trained.items():
                    weights, *moments = state[name]
                    states.set_model_state_dict(model, weights, options=LOADING)
                    for adam in moments:  # one, or none before the first optimiser step
                        states.set_optimizer_state_dict(model, optimizer, adam, options=LOADING)
            print(f"resumed {self.out} after step {state['step']}")
        self.start, self.rows = state["step"], state["rows"]
        if rank() == 0:
            self.metrics.truncate(0)  # later steps are run again
            for row in self.rows:
                print(json.dumps(row), file=self.metrics, flush=True)

    def checkpoint(self, step):
        state = dict(step=step, rows=self.rows, coefs=self.coefs)
        for name, (model, optimizer) in self.trained.items():
            weights = states.get_model_state_dict(model, options=SAVING)
            trained = [key for key, p in model.named_parameters() if p.requires_grad]
            weights = {key: weights[key] for key in trained if key in weights}  # no tied head
            state[name] = [weights]
            if optimizer.state:  # get_ would make an empty one, and the run another
                moments = states.get_optimizer_state_dict(model, optimizer, options=SAVING)
                state[name].append(moments)
        write_file(self.out / "checkpoint.pt", state)

    def steps(self, total):
        """Yield the step numbers from 1, or from where a resumed run stopped, to `total`."""
        steps = range(self.start + 1, total + 1)
        self.bar = tqdm(steps, self.out.name, total, initial=self.start, disable=rank() > 0)
        before = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in self.bar:
                self.step, self.began = step, time.perf_counter()  # seconds
                seed_global(self.cfg.seed, step)
                yield step  # in which a signal only sets stop_signal
                stop = max(gather([self.stop_signal]))  # all stop after the same step
                every = self.cfg.save_every
                if stop or (every and step % every == 0):
                    self.checkpoint(step)
                if stop:
                    self.bar.write(f"stopped after step {step}; --resume continues")
                    gather([])  # torchrun ends the others as soon as one has ended
                    raise SystemExit(128 + stop)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        """The first Ctrl-C or SIGTERM lets the step end and saves; a second one stops at once."""
        if self.stop_signal and not dist.is_initialized():  # torchrun's come twice
            raise KeyboardInterrupt
        self.stop_signal = number
        self.bar.set_description("stopping after this step (again: at once)")

    def log(self, show, **metrics):
        """One line of metrics.jsonl; `show` names the few that the progress bar has room for."""
        if rank():
            return
        row = dict(step=self.step, **metrics, seconds=time.perf_counter() - self.began)
        self.rows.append(row)
        print(json.dumps(row), file=self.metrics, flush=True)
        self.bar.set_postfix({name: row[name] for name in show}, refresh=False)
        if time.perf_counter() > self.report_due:
            self.write_report()
            self.report_due = time.perf_counter() + 10  # seconds

    def write_report(self, results=None, samples=()):
        """report.html: the template in data/ with what is known so far put in."""
        known = dict(settings=asdict(self.cfg), metrics=self.rows, results=results, samples=samples)
        data = json.dumps(known).replace("<", "\\u003c")  # no answer may end the script
        template = (EMBEDDED / "report.html").read_text(encoding="utf-8")
        write_file(self.out / "report.html", template.replace('"DATA"', data))

    def finish(self, module, tokenizer, results, samples=()):
        """Save the model, if any, and its tokenizer; eval.json is last: it says `finished`."""
        check_finite(results, "the run has diverged, so no model is saved")
        if samples:
            write_jsonl(self.out / "samples.jsonl", samples)
        if module is not None:
            with reading(self.out):  # a full disk, say
                save_model(module, self.out)
                if rank() == 0:
                    tokenizer.save_pretrained(self.out)
        if rank() == 0:
            self.write_report(results, samples)
            self.metrics.close()
            write_file(self.out / "eval.json", json.dumps(results, indent=2))
            for name in ("checkpoint.pt", "checkpoint.pt.tmp"):  # a kill leaves the other
                (self.out / name).unlink(missing_ok=True)

def write_file(path, content):
    """Text, or else by torch.save. Whoever looks sees the old file or the new one, whole."""
    if rank() == 0:
        with reading(path), open(f"{path}.tmp", "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name on an empty file
        os.replace(file.name, path)

def write_jsonl(path, rows):
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

def make_missing_stages(cfg):
    """Run sft.py and reward.py in this process for the default folders that are not finished."""
    folders = dict(sft=cfg.policy, reward="" if cfg.reward_fn else cfg.reward)
    for name, folder in folders.items():
        if folder != f"out/{name}" or (Path(folder) / "eval.json").exists():
            continue
        if world_size() > 1:
            raise UserError(f"{folder} is missing: make it first, by {name}.py")
        print(f"{folder} is missing: running {name}.py")
        stage = importlib.import_module(name)
        stage_cfg = stage.Config(out=folder, resume=True, seed=cfg.seed, device=cfg.device)
        stage_cfg.model = cfg.policy if name == "reward" else ""  # SFT: a new, tiny one
        stage.main(stage_cfg)

# ----------------------------------------------------------------------------------- command line

def choose_device(name):
    """`auto` is CUDA where there is one, one for each process. UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():  # torchrun's
        dist.init_process_group("cpu:gloo,cuda:nccl" if name == "cuda" else "gloo")
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with reading(f"--device {name}"):
        device = torch.zeros(1, device=name).device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what memory statistics speak of
    return device

class Output:
    """stdout that never ends a run: what cannot be encoded is replaced, a closed pipe is left."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="replace")

    def __getattr__(self, name):  # a user's function may ask for its encoding, say
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # the pipe's number

def command_line(config_class, main, doc):
    """Parse the flags and run `main`; a UserError becomes one line on stderr and exit code 2."""
    style = partial(argparse.RawDescriptionHelpFormatter, max_help_position=36, width=110)
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False, formatter_class=style)
    parser.usage = argparse.SUPPRESS  # or a wrong flag would be two lines
    shared = [setting.name for setting in fields(Settings)]  # they come last
    for setting in sorted(fields(config_class), key=lambda setting: setting.name in shared):
        parser.add_argument(f"--{setting.name}", default=setting.default, **setting.metadata)
    cfg = config_class(**vars(parser.parse_args()))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another's names
    # Of several processes the first one speaks; and there may be no stdout.
    silent = os.environ.get("RANK", "0") != "0" or sys.stdout is None
    try:
        with redirect_stdout(Output(open(os.devnull, "w") if silent else sys.stdout)):
            main(cfg)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except KeyboardInterrupt:  # outside the steps, where a first Ctrl-C saves
        parser.exit(128 + signal.SIGINT, f"{parser.prog}: stopped\n")
    except torch.OutOfMemoryError as problem:
        parser.error(f"{problem} README says what helps: Out of memory?")
    except (UserError, OSError) as problem:  # a full disk, say
        parser.error(problem)
