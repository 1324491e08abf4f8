"""What at least two stages share, in reading order:

    log-probs and GAE    token_logprobs, masked_mean, whiten, gae
    generation           generate: K/V slots, ragged prompts, no left padding
    models               load_policy, load_reward, response_logprobs, sequence_scores
    training             optimizer_step, rates, seeds
    data                 JSONL rows, chat templates, batches padded on the right
    scores               of a reward model or a rule
    answers              before and after, side by side

and, for those who need it, adapters (LoRA), several processes, and the plumbing: the run folder
(Run: settings, metrics, checkpoints, Ctrl-C), the report, speed and memory, the command line.

Shapes: B sequences, T tokens, R response tokens, V vocabulary, d hidden size. A sequence is prompt
and response, contiguous and padded on the right only: causal attention never looks right, so no
attention mask and no position ids are needed. A `mask` is 1.0 on real response tokens, EOS
included; it comes from lengths, never from `ids != pad`, since pad often is EOS.
"""

import argparse
import errno
import gzip
import html
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zlib
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from functools import partial, wraps
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    set_seed,
)
from transformers.utils import logging as transformers_logging

# On an H100 torch would choose cuDNN's attention, which builds a plan, up to a second, for each new
# batch size and length; flash attention needs none.
torch.backends.cuda.enable_cudnn_sdp(False)

EMBEDDED = Path(__file__).resolve().parent / "data"  # the small HHH world, for lack of other data


# ----------------------------------------------------------------------------------------------
# Log-probs and GAE


def token_logprobs(logits, tokens, temperature=1.0):
    """log softmax(logits / temperature) at `tokens`: (..., V), (...) -> (...), in float32."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    return log_p.gather(-1, tokens[..., None]).squeeze(-1)


def masked_mean(x, mask):
    """Mean of `x` over the entries where `mask` is 1: a scalar, 0 when there is none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def masked_variance(x, mask):
    """Population variance of `x` over the entries where `mask` is 1: a scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask):
    """`x` with mean 0 and (population) variance 1 over the masked entries; 0 elsewhere."""
    return (x - masked_mean(x, mask)) * torch.rsqrt(masked_variance(x, mask) + 1e-8) * mask


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2015, eq. 16) over real response tokens.

    All (B, T). values[:, t] is V(s_t), the state before token t is chosen. The episode ends after
    its last real token, so nothing is bootstrapped past it. Returns (advantages, returns), both 0
    where mask is 0.
    """
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (B,)
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


# ----------------------------------------------------------------------------------------------
# Generation
#
# S slots hold S sequences at different lengths. Each attention module keeps K/V buffers, a row
# writes its new key at its own length, and a finished row's slot takes the next waiting prompt.
# Nothing is padded on the left and nothing is re-ordered. Whatever a decode step reads and writes
# stays in place, so on CUDA the step is a graph, and replaying it one launch.


@dataclass
class Sampling:
    eos: list  # token ids that end a response
    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0


class Slots:
    """The sequences being generated: fixed buffers on the device, one row a slot."""

    def __init__(self, size, max_length, sampling, device):
        self.size, self.max_length, self.sampling = size, max_length, sampling
        self.rows = torch.arange(size, device=device)
        self.eos = torch.tensor(sampling.eos, device=device)
        zeros = partial(torch.zeros, dtype=torch.long, device=device)
        self.token = zeros(size)  # last sampled, not in the cache yet
        self.length = zeros(size)  # tokens in the cache
        self.count = zeros(size)  # tokens sampled
        self.done = torch.ones(size, dtype=torch.bool, device=device)  # answered, or never used
        self.out = zeros(size, sampling.max_new_tokens + 1)  # a row that is done still writes
        self.logprobs = torch.zeros(self.out.shape, device=device)
        self.noise = None  # (S, V), drawn afresh before each step
        self.filling = None  # during a prefill: the slots that its rows go to
        self.mask = None  # during a decode step: (S, 1, 1, kv) cached positions each row may see
        self.graphs = {}  # kv: the decode step over that many cached positions
        self.pool = torch.cuda.graph_pool_handle() if self.rows.is_cuda else None
        self.draw = draw

    def fit(self, size, max_length, sampling):
        """Whether these can serve another call. Far more rows than it needs would make each of its
        steps slower, and the graphs have the settings built in.
        """
        near = size <= self.size <= 1.25 * size
        return near and self.max_length >= max_length and self.sampling == sampling

    def answers(self, slots):
        """What was sampled in each of `slots`: (token ids, log-probs)."""
        columns = (x[slots].tolist() for x in (self.count, self.out, self.logprobs))
        return [(tokens[:n], logprobs[:n]) for n, tokens, logprobs in zip(*columns)]

    def append(self, rows, logits, noise):
        """Draw a token from logits (n, V) for each of `rows` (n,) that is not done yet."""
        tokens, logprobs = self.draw(logits, noise, self.sampling)
        at = self.count[rows]  # of a row that is done, one past its answer
        self.out[rows, at] = tokens
        self.logprobs[rows, at] = logprobs
        self.token[rows] = tokens
        self.count[rows] += ~self.done[rows]
        self.done[rows] |= (tokens[:, None] == self.eos).any(-1)
        self.done[rows] |= self.count[rows] == self.sampling.max_new_tokens


def slot_attention(module, query, key, value, attention_mask, scaling=None, slots=None, **kwargs):
    """Attention for transformers' AttentionInterface, over K/V buffers filled row by row; without
    `slots`, in training, plain causal attention.

    query (B, H, Q, D), key and value (B, G, Q, D): G groups of H/G heads. Returns (B, Q, H, D).
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("capped scores or attention sinks")  # a short check may not notice them
    if key.shape[2] != query.shape[2]:
        raise ValueError("a K/V cache of transformers; generate through common.generate")
    B, H, Q, D = query.shape
    G = key.shape[1]
    if slots is not None and slots.filling is not None:
        if not hasattr(module, "slot_keys"):
            module.slot_keys = key.new_zeros(slots.size, G, slots.max_length, D)
            module.slot_values = value.new_zeros(slots.size, G, slots.max_length, value.shape[-1])
        module.slot_keys[slots.filling, :, :Q] = key
        module.slot_values[slots.filling, :, :Q] = value
    if slots is None or slots.filling is not None:
        how = dict(is_causal=True, scale=scaling, enable_gqa=G != H)
        return F.scaled_dot_product_attention(query, key, value, **how).transpose(1, 2), None
    module.slot_keys[slots.rows, :, slots.length] = key[:, :, 0]
    module.slot_values[slots.rows, :, slots.length] = value[:, :, 0]
    kv = slots.mask.shape[-1]
    # A group's query heads share its keys: put them on the query-length axis, and K and V need no
    # repetition.
    out = F.scaled_dot_product_attention(
        query.view(B, G, H // G, D),
        module.slot_keys[:, :, :kv],
        module.slot_values[:, :, :kv],
        attn_mask=slots.mask,
        scale=scaling,
    )
    return out.reshape(B, 1, H, -1), None


AttentionInterface.register("slots", slot_attention)


def draw(logits, noise, sampling):
    """One token a row of logits (n, V), and its log-prob under softmax(logits / temperature): two
    (n,). `noise` (n, V) is uniform in [0, 1), and not used where temperature is 0.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, token_logprobs(logits, tokens)
    scaled = logits.float() / sampling.temperature
    kept = scaled
    if sampling.top_k:
        kth = kept.topk(min(sampling.top_k, kept.shape[-1])).values[:, -1:]
        kept = kept.masked_fill(kept < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = kept.softmax(-1).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the first is always inside
        kept = kept.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    # argmax(logits + Gumbel noise) is a draw from softmax(logits); -log(-log(uniform)) is Gumbel.
    tokens = (kept - (-noise.log()).log()).argmax(-1)
    return tokens, token_logprobs(scaled, tokens)


def prefill(model, slots, free, prompts, generator=None):
    """Run n prompts into the slots `free` and draw the first token of each response."""
    device = slots.rows.device
    rows = slots.filling = torch.tensor(free, device=device)
    last = torch.tensor([len(p) - 1 for p in prompts], device=device)
    with as_it_is(model):  # or it would compile for every number of prompts
        hidden = hidden_states(model, pad_right(prompts, device), slots=slots)  # (n, P, d)
        slots.filling = None
        slots.length[rows], slots.count[rows], slots.done[rows] = last + 1, 0, False
        logits = lm_head(model)(hidden[torch.arange(len(free), device=device), last])  # (n, V)
        if slots.noise is None:
            slots.noise = torch.empty(slots.size, logits.shape[-1], device=device)
        slots.append(rows, logits, slots.noise[: len(free)].uniform_(generator=generator))


def decode_logits(model, slots, kv):
    """Feed every slot its last token; it sees at most `kv` cached positions. Returns (S, V)."""
    at = slots.length[:, None]  # (S, 1)
    slots.mask = (torch.arange(kv, device=at.device) <= at)[:, None, None]  # itself included
    hidden = hidden_states(model, slots.token[:, None], position_ids=at, slots=slots)
    return lm_head(model)(hidden[:, 0])


def decode(model, slots, kv):
    """The next token of every slot that is not done yet."""
    logits = decode_logits(model, slots, kv)
    slots.length += ~slots.done
    slots.append(slots.rows, logits, slots.noise)


def uses_graphs(model):
    return model.device.type == "cuda" and model.step_never_waits


def capture(step, pool):
    """`step` as a CUDA graph: a call runs its kernels again, on the same memory, in one launch.

    It must have run before, so that nothing is left to compile or to set up. Graphs that never run
    at the same time may share a memory pool.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay


@torch.no_grad()
def generate(
    model, prompts, max_new_tokens, eos_id, temperature=1.0, top_k=0, top_p=1.0,
    generator=None, slots=256, logprobs=False,
):  # fmt: skip
    """Sample one response to each prompt.

    prompts: lists of token ids, of any lengths. eos_id: an int or several. temperature 0 is greedy.
    `slots` sequences run at once; a finished one makes room for the next prompt. Returns lists of
    token ids in the order of the prompts, EOS kept when it was sampled; with `logprobs` also lists
    of their log-probs under softmax(logits / temperature), as the sampler saw them. A model whose
    attention cannot be hooked goes through `model.generate`, and has None for log-probs. The model
    is left as it was found, but on CUDA it keeps the buffers and graphs for the next call, until
    drop_slots(model): change its weights in place. Raises ValueError for an empty prompt.
    """
    if not all(map(len, prompts)):
        raise ValueError("generate: an empty prompt has no token to continue from")
    eos = [eos_id] if isinstance(eos_id, int) else list(eos_id)
    sampling = Sampling(eos, max_new_tokens, temperature, top_k, top_p)
    max_length = max(map(len, prompts), default=0) + max_new_tokens
    if not slots_work(model, max_length):
        responses = transformers_generate(model, prompts, sampling, generator, slots)
        return (responses, None) if logprobs else responses

    # With graphs the host looks at the device once in `burst` steps, and one graph serves a whole
    # `bucket` of lengths.
    burst, bucket = (16, 128) if uses_graphs(model) else (1, 1)
    together = max(1, 16384 // max_length)  # prompts of one prefill, for its memory's sake
    waiting, answers = list(range(len(prompts))), [None] * len(prompts)
    size = min(slots, len(prompts))
    with slot_model(model, size, max_length, sampling, keep=uses_graphs(model)) as state:
        free, answering = list(range(state.size)), {}  # slots without a prompt; slot: its prompt
        while waiting or answering:
            # A prefill costs as much as a decode step or more: it waits for an eighth of the slots.
            while waiting and len(free) >= max(1, state.size // 8):
                n = min(len(free), len(waiting), together)
                taken = dict(zip(free[:n], waiting[:n]))
                prefill(model, state, list(taken), [prompts[i] for i in taken.values()], generator)
                answering |= taken
                free, waiting = free[n:], waiting[n:]
            kv = -(-(int(state.length.max()) + burst) // bucket) * bucket
            for _ in range(burst):
                decode_step(model, state, min(kv, state.max_length), generator)
            done = [slot for slot in state.done.nonzero().flatten().tolist() if slot in answering]
            for slot, answer in zip(done, state.answers(done)):
                answers[answering.pop(slot)] = answer
            free = sorted(free + done)
    responses = [tokens for tokens, _ in answers]
    return (responses, [own for _, own in answers]) if logprobs else responses


def decode_step(model, slots, kv, generator):
    """`decode`, from its graph where there is one."""
    slots.noise.uniform_(generator=generator)
    if kv in slots.graphs:
        slots.graphs[kv]()
        return
    decode(model, slots, kv)
    if uses_graphs(model):
        slots.graphs[kv] = capture(partial(decode, model, slots, kv), slots.pool)


@contextmanager
def slot_model(model, size, max_length, sampling, keep=False):
    """The model in eval mode with slots, which it may `keep`; otherwise left as it was found."""
    slots = vars(model).pop("kept_slots", None)  # back only when all went well
    if slots is None or not slots.fit(size, max_length, sampling):
        drop_slots(model)
        room = -(-max_length // 128) * 128 if keep else max_length  # for longer prompts to come
        slots = Slots(size, room, sampling, model.device)
        if is_compiled(model):
            slots.draw = torch.compile(draw, dynamic=False)
    slots.done.fill_(True)
    slots.length.zero_()
    try:
        with evaluating(model):
            model.set_attn_implementation("slots")
            yield slots
        if keep:
            model.kept_slots = slots
    finally:
        if not hasattr(model, "kept_slots"):
            drop_slots(model)


def drop_slots(model):
    """Free the K/V buffers and graphs that `generate` keeps with a model on CUDA."""
    vars(model).pop("kept_slots", None)
    for module in model.modules():
        vars(module).pop("slot_keys", None)
        vars(module).pop("slot_values", None)


def slots_work(model, max_length):
    """Whether slots can serve: the model agrees, and nothing in it changes before `max_length`."""
    if not hasattr(model, "slots_agree"):
        with as_it_is(model):
            model.slots_agree = holds(slots_agree, model)
    works = model.slots_agree and plain_length(model) >= max_length
    if not works and not hasattr(model, "slots_told"):
        model.slots_told = True  # once is enough
        print(f"{type(model).__name__}: attention cannot run in slots, using model.generate")
    return works


def plain_length(model):
    """The length up to which a token sees all before it, at angles that do not depend on how long
    the longest sequence is: no sliding window in reach, no rotary scaling that sets in.
    """
    config = model.config.get_text_config()
    length = math.inf
    if getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None):
        length = config.sliding_window
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        length = min(length, original)
    return length


def slots_agree(model, ids):
    """Whether a prefill and a step in two slots give the logits of a plain forward. Notes, too,
    whether the step never waits for the device, so that it can be a CUDA graph.
    """
    has_plain_head(model)  # found while the model's own attention is still in place
    plain = [model(ids[:, :n], use_cache=False).logits[0, -1] for n in (6, 9)]
    with slot_model(model, 2, 10, Sampling([], 2)) as slots:
        prefill(model, slots, [0, 1], [ids[0, :5].tolist(), ids[0, :8].tolist()])
        slots.token[:] = ids[0, [5, 8]]
        step = decode_logits(model, slots, 10)
        model.step_never_waits = never_waits(partial(decode_logits, model, slots, 10))
        if not model.step_never_waits:
            print(f"{type(model).__name__}: a step reads the device back, so no CUDA graph: slow")
    return nearly_equal(step, torch.stack(plain))


def nearly_equal(x, y):
    """Whether two results of the same model differ by no more than rounding, at their scale."""
    bound = 1e-3 if x.dtype == torch.float32 else 0.05
    return bool((x.float() - y.float()).abs().max() <= bound * y.float().abs().max())


def never_waits(step):
    """Whether the host does not read the device in `step`; a CUDA graph would fail at that."""
    if not torch.cuda.is_initialized():
        return True
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        return True
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")


def transformers_generate(model, prompts, sampling, generator, batch_size):
    """The same through `model.generate`, padded on the left, for models slots cannot run."""
    responses, eos_ids = [], set(sampling.eos)
    how = dict(max_new_tokens=sampling.max_new_tokens, eos_token_id=sampling.eos, pad_token_id=0)
    how |= dict(do_sample=sampling.temperature > 0)
    if sampling.temperature > 0:
        how |= dict(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    # Fresh, or the repetition penalty and the like of the model's own settings would apply.
    config, model.generation_config = model.generation_config, GenerationConfig()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # Its cache names each layer by a number, so that compiled layers would not share code.
        with evaluating(model), as_it_is(model), torch.random.fork_rng(devices):
            if hasattr(model, "own_attention"):
                model.set_attn_implementation(model.own_attention)
            if generator is not None:  # model.generate draws from the global generator only
                seed = torch.randint(2**31, (1,), device=generator.device, generator=generator)
                torch.manual_seed(int(seed))
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                ids = pad_right([p[::-1] for p in part], model.device).flip(1)  # padded on the left
                seen = pad_right([[1] * len(p) for p in part], model.device).flip(1)
                out = model.generate(ids, attention_mask=seen, **how)
                for row in out[:, ids.shape[1] :].tolist():
                    end = next((i + 1 for i, token in enumerate(row) if token in eos_ids), len(row))
                    responses.append(row[:end])
    finally:
        model.generation_config = config
    return responses


# ----------------------------------------------------------------------------------------------
# Models


class UserError(Exception):
    """A mistake of the user's, told in one line; the command line turns it into exit code 2."""


def choose_device(name):
    """`auto` is CUDA where there is one; under torchrun each process takes its own. Raises
    UserError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    if name == "cuda" and dist.is_initialized():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({why})") from None
    device = torch.device(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # what memory statistics speak of
    return device


@contextmanager
def loading(path, what):
    """One line for what transformers raises where `path` holds no such thing, or a broken one."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no {what} to load ({why})") from None


def load_tokenizer(path, needs_eos=True):
    """The tokenizer of a folder or hub name. Raises UserError if there is none or it lacks EOS."""
    with loading(path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so no response could ever end")
    return tokenizer


def load_policy(path, device, dtype=torch.float32):
    """A causal LM: dropout 0, train() mode. Raises UserError when `path` holds something else."""
    model = load_model(AutoModelForCausalLM, path, device, dtype)
    if "ForSequenceClassification" in architecture(model):
        raise UserError(f"{path}: a reward model where a causal language model is needed")
    has_plain_head(model)
    return model


def load_reward(path, device, dtype=torch.float32):
    """A reward or value model: sequence classification with one label; else raises UserError."""
    model = load_model(AutoModelForSequenceClassification, path, device, dtype)
    if "ForSequenceClassification" not in architecture(model) or model.config.num_labels != 1:
        kind = architecture(model)
        raise UserError(f"{path}: {kind} is no reward model: that has one label for a sequence")
    model.scores_tokens = holds(scores_tokens, model)
    if model.scores_tokens:
        model.score.float()  # a reward rounded to bfloat16 has three digits
    return model


def scores_tokens(model, ids):
    """Whether this model's output is `score(hidden)` at the last token: then any token has one."""
    pooled = model(input_ids=ids).logits[0, 0].float()
    last = model.score(model.base_model(input_ids=ids).last_hidden_state)[0, -1, 0].float()
    return (pooled - last).abs() <= 0.02 * pooled.abs()


def load_backbone(path, device, dtype=torch.float32):
    """A causal LM's layers under a new score head, to train as a reward or value model."""
    model = load_model(AutoModelForSequenceClassification, path, device, dtype, num_labels=1)
    if not hasattr(model, "score"):
        raise UserError(f"{path}: {architecture(model)} is no causal language model to build on")
    return model


def architecture(model):
    return (model.config.architectures or [type(model).__name__])[0]


def load_model(auto_class, path, device, dtype, **kwargs):
    """A Hugging Face model, or a LoRA adapter merged into its base. Dropout 0, train() mode."""
    with loading(path, "model"):
        model = read_model(auto_class, path, dtype, **kwargs)
    # Probability 0 rather than eval(): eval() would switch gradient checkpointing off without a
    # word, and with dropout on, the ratio of the first step would not be 1.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    model = model.to(device).train()
    model.config.name_or_path = str(path)
    use_causal_attention(model)
    return model


@contextmanager
def evaluating(model):
    """The model in eval mode; afterwards its mode and its attention are what they were."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


@torch.no_grad()
def holds(test, model):
    """Whether test(model, ids) is true of one short sequence, ids (1, 9) or (1, 10); a model that
    cannot even do what the test asks fails it.
    """
    config = model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)  # some reward models look for it
    ids = [i % config.vocab_size for i in range(2, 12) if i != pad]
    try:
        with evaluating(model):
            return bool(test(model, torch.tensor([ids], device=model.device)))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        return False


def use_causal_attention(model):
    """Let every forward use `slot_attention`, where that changes nothing: transformers' own reads
    the position ids back to the host in each forward, to see whether sequences are packed.
    """
    if plain_length(model) >= context_length(model) and holds(attention_is_causal, model):
        model.own_attention = model.config._attn_implementation  # what transformers' generate needs
        model.set_attn_implementation("slots")


def attention_is_causal(model, ids):
    own = model.base_model(input_ids=ids, use_cache=False)[0]
    model.set_attn_implementation("slots")
    return nearly_equal(model.base_model(input_ids=ids, use_cache=False)[0], own)


def has_plain_head(model):
    """Whether logits are just lm_head(hidden); found out once. Some models scale or cap theirs."""
    if not hasattr(model, "plain_head"):
        model.plain_head = holds(head_is_plain, model)
        if not model.plain_head:
            print(f"{type(model).__name__}: logits are not lm_head(hidden), using its full forward")
    return model.plain_head


def head_is_plain(model, ids):
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    gap = (model.get_output_embeddings()(hidden) - logits).abs().max()
    return gap <= 1e-6 * logits.abs().max()  # a cap bends little


def hidden_states(model, ids, **kwargs):
    """What `lm_head` turns into logits, (B, T) -> (B, T, d); logits if the head is not plain."""
    if has_plain_head(model):
        return model.base_model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state
    return model(input_ids=ids, use_cache=False, **kwargs).logits


def lm_head(model):
    return model.get_output_embeddings() if has_plain_head(model) else torch.nn.Identity()


def frozen_dtype(device):
    """Of models that are not trained: bfloat16 on a GPU, float32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def autocast(device):
    """bfloat16 arithmetic over float32 weights on a GPU; plain float32 on the CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def as_forward(function):
    """Make `function(model, ...)` a forward of its own: around it, a sharded model gathers what it
    needs and lets go of it.
    """

    @wraps(function)
    def run(model, *args, **kwargs):
        if is_sharded(model):
            return model.forward_of(partial(function, model, *args, **kwargs))
        return function(model, *args, **kwargs)

    return run


@as_forward
def response_logprobs(model, batch, temperature=1.0, entropy=False):
    """Log-probs of the response tokens, (B, R) float32, 0 past the end of each response; with
    `entropy` also that, the same shape.

    Only real response tokens reach the LM head, 1,024 at a time and recomputed in the backward
    pass, so that the (B, T, V) float32 logits never exist.
    """
    row, column = batch.real  # (N,) each
    with autocast(batch.ids.device):
        hidden = hidden_states(model, batch.ids)[row, batch.positions[row, column]]  # (N, d)
        tokens = batch.tokens[row, column]
        run = getattr(model, "compiled_head_logprobs", head_logprobs)
        if torch.is_grad_enabled() and len(tokens) > 1024:  # a single chunk has nothing to save
            run = partial(checkpoint, run, use_reentrant=False)
        chunks = zip(hidden.split(1024), tokens.split(1024))
        parts = [run(lm_head(model), h, t, temperature, entropy) for h, t in chunks]
    empty = torch.zeros_like(batch.mask)
    padded = [empty.index_put(batch.real, torch.cat(part)) for part in zip(*parts)]
    return tuple(padded) if entropy else padded[0]


def head_logprobs(head, hidden, tokens, temperature, entropy):
    """(N, d) hidden states and the (N,) next tokens -> log-probs (N,) and, if asked, entropies."""
    logits = head(hidden).float()  # (N, V)
    logprobs = token_logprobs(logits, tokens, temperature)
    if not entropy:
        return (logprobs,)
    log_p = (logits / temperature).log_softmax(-1)
    return logprobs, -(log_p.exp() * log_p).sum(-1)


@as_forward
def token_scores(model, ids):
    """The score head read at every token, less the stored mean: (B, T) -> (B, T) float32."""
    with autocast(ids.device):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return model.score(hidden.float()).squeeze(-1) - getattr(model.config, "reward_mean", 0.0)


def response_values(model, batch):
    """V(s_t) for the state before each response token, (B, R): a reward model read at every one."""
    return token_scores(model, batch.ids).gather(1, batch.positions)


def sequence_scores(model, batch):
    """The reward model's score of each sequence (B,): read at its last real token, EOS or not."""
    if model.scores_tokens:
        return token_scores(model, batch.ids).gather(1, batch.lengths[:, None] - 1).squeeze(1)
    seen = torch.arange(batch.ids.shape[1], device=batch.ids.device) < batch.lengths[:, None]
    return pooled_scores(model, input_ids=batch.ids, attention_mask=seen.long())


def pooled_scores(model, **inputs):
    """Scores (B,) float32 where the model pools in its own way, less the stored mean."""
    with autocast(model.device):
        logits = model(**inputs).logits
    return logits.squeeze(-1).float() - getattr(model.config, "reward_mean", 0.0)


def context_length(model):
    """Tokens that the model was made for; no limit where its config names none."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def token_budget(cfg, device):
    """Padded tokens a forward may hold. A CPU gains nothing by more, and loses by the padding."""
    return cfg.micro_tokens or (8192 if device.type == "cuda" else 512)


def compile_layers(model, mode):
    """Compile the layers one by one, as they share code; `auto`: on CUDA, over 50M parameters."""
    big = model.device.type == "cuda" and sum(p.numel() for p in model.parameters()) > 50e6
    if mode == "on" or (mode == "auto" and big):
        # All models of a family share the recompile limit of their layer code. Past it layers would
        # run eagerly, several times slower, with one line of warning: rather stop.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for layer in blocks(model):
            layer.compile(dynamic=True)
        # Fewer passes over the logits, which are larger than all else.
        model.compiled_head_logprobs = torch.compile(head_logprobs, dynamic=True)


def blocks(model):
    """The transformer layers: the longest list of modules."""
    lists = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    return max(lists, key=len, default=[])


def is_compiled(model):
    return hasattr(model, "compiled_head_logprobs")


def as_it_is(model):
    """A context in which compiled layers run uncompiled."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def copy_weights(source, target):
    """In place, so that whatever holds on to the target's tensors sees the new ones."""
    if source is not target:
        for old, new in zip(target.parameters(), source.parameters()):
            old.data.copy_(whole(new.data))


# ----------------------------------------------------------------------------------------------
# Training


def make_trainable(model, cfg, lr):
    """With adapters, checkpointing, sharded and compiled layers as the flags say; returns its
    optimiser.
    """
    add_lora(model, cfg)
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    shard(model, cfg)
    compile_layers(model, cfg.compile)
    return make_adamw(model, lr)


def make_adamw(model, lr):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def total_steps(cfg, n):
    """Optimiser steps of --epochs over `n` examples, or fewer by --steps."""
    steps = math.ceil(cfg.epochs * n / cfg.batch_size)
    return min(steps, cfg.steps or steps)


def optimizer_step(model, optimizer, stats, ids, cfg):
    """Clip the gradient on the whole minibatch, step, and drop it.

    Returns `stats`, scalars on the device, and the gradient's norm as floats: the one time in a
    step that the host reads the device. Gradients and stats are summed over the processes. When one
    is not finite, raises UserError before the weights are touched; the token `ids` of the batch, an
    iterable of lists or tensors that is not looked at before, are in nonfinite.json.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    grads = [grad for grad in grads if not isinstance(grad, DTensor)]  # FSDP has summed its own
    all_sum(*grads, *stats.values())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    stats = stats | dict(grad_norm=whole(norm))
    stats = dict(zip(stats, torch.stack([x.detach() for x in stats.values()]).tolist()))
    bad = [name for name, value in stats.items() if not math.isfinite(value)]
    if bad:
        path = Path(cfg.out) / "nonfinite.json"
        ids = gather([tuple(map(int, row)) for row in ids])
        ids = list(dict.fromkeys(ids))  # each process may have named the whole batch
        write_json(path, dict(stats={k: str(v) for k, v in stats.items()}, ids=ids))
        raise UserError(
            f"{', '.join(bad)} not finite; the weights were not touched, and the batch is in {path}"
            ": try a lower rate or a longer --warmup, and look for rewards out of all proportion"
        )
    optimizer.step()
    optimizer.zero_grad()
    return stats


def set_lr(optimizer, lr, step, steps, warmup, schedule):
    """Linear warm-up over `warmup` steps, then constant or linear decay to 0 after `steps`; step
    counts from 1. Returns the rate.
    """
    lr = lr * min(1.0, step / max(1, warmup))
    if schedule == "linear" and step > warmup:
        lr = lr * (steps - step + 1) / (steps - warmup + 1)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def make_generator(device, *key, shared=True):
    """A generator seeded by (seed, step, ...), so that a resumed run draws the same numbers. Not
    `shared`, each process draws its own.
    """
    if not shared and rank():
        key = (*key, rank())
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def epoch_batch(n, size, step, seed):
    """The rows of batch `step` (from 1) in an endless series of shuffled epochs of n rows."""
    rows = []
    cursor = (step - 1) * size
    while len(rows) < size:
        epoch, at = divmod(cursor + len(rows), n)
        order = torch.randperm(n, generator=make_generator("cpu", seed, "epoch", epoch)).tolist()
        rows += order[at : at + size - len(rows)]
    return rows


# ----------------------------------------------------------------------------------------------
# Data


def read_jsonl(path):
    """The objects of a .jsonl or .jsonl.gz file, each with its `where`, "file:line". Raises
    UserError at the first bad line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    rows = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}:{number}: expected one JSON object a line")
                    rows.append(row | {"where": f"{path}:{number}"})
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error.msg}, column {error.colno})") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise UserError(f"{path}: no lines in it")
    return rows


def is_embedded(path):
    return Path(path).resolve().parent == EMBEDDED


def read_split(path, eval_path, embedded_eval):
    """Training and held-out rows: eval_path, the embedded file, or the last 5%, at most 200."""
    rows = read_jsonl(path)
    if eval_path or is_embedded(path):
        return rows, read_jsonl(eval_path or EMBEDDED / embedded_eval)
    if len(rows) == 1:
        raise UserError(f"{path}: one line cannot be training and held-out data; name --eval_data")
    held_out = min(200, max(1, len(rows) // 20))
    print(f"no --eval_data: the last {held_out} of {len(rows)} lines of {path} are held out")
    return rows[:-held_out], rows[-held_out:]


def field(row, key):
    """row[key], which must be text or chat messages and not empty. Raises UserError naming the
    line and the key.
    """
    if key not in row:
        keys = ", ".join(k for k in row if k != "where")
        raise UserError(f'{row["where"]}: no "{key}" (the keys are: {keys})')
    value = row[key]
    messages = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    if not isinstance(value, str) and not messages:
        raise UserError(f'{row["where"]}: "{key}" must be a string or a list of chat messages')
    if not (value if messages else value.strip()):
        raise UserError(f'{row["where"]}: "{key}" is empty')
    return value


def split_pair(row):
    """Prompt, chosen and rejected; HH-RLHF's own form holds whole dialogues and no prompt."""
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if "prompt" in row:
        return field(row, "prompt"), chosen, rejected
    same = [a == b for a, b in zip(chosen, rejected)] + [False]  # characters, or messages
    prompt = chosen[: same.index(False)]
    if isinstance(prompt, str):
        before, turn, _ = prompt.rpartition("\n\nAssistant:")
        prompt = before + turn  # nothing where there is no such turn
    chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt or not chosen or not rejected:
        raise UserError(
            f'{row["where"]}: no "prompt", and "chosen" and "rejected" share no dialogue up to a '
            "last Assistant turn"
        )
    return prompt, chosen, rejected


def prompt_of(row):
    """The prompt of a line of any of our forms, as text or chat messages."""
    if "prompt" not in row and "messages" in row:
        messages = field(row, "messages")
        while messages and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return field(row | {"messages": messages}, "messages")
    if "prompt" not in row and "chosen" in row:
        return split_pair(row)[0]
    return field(row, "prompt")


def as_text(prompt):
    """A prompt that may be chat messages."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def render(tokenizer, messages, where, generation=False):
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: chat messages, but the tokenizer has no chat template")
    how = dict(tokenize=False, add_generation_prompt=generation)
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # a template is code of the model's author and raises what it likes
        raise UserError(f"{where}: the chat template refuses these messages ({error})") from None


def added(before, after, where):
    """What the rendering `after` has beyond the rendering `before`."""
    if not after.startswith(before):
        raise UserError(f"{where}: the chat template rewrites earlier turns, so none stands apart")
    return after[len(before) :]


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def assistant_turn(tokenizer, before, message, where):
    """One assistant turn as (text before it, ids of the turn up to its end token, ids after the end
    token).

    The turn is what the chat template adds to the rendering of `before` plus the generation prompt.
    Its last special token ends it; a template that writes none gets EOS. Raises UserError where the
    template rewrites what came before.
    """
    start = render(tokenizer, before, where, generation=True)
    ids = plain_ids(tokenizer, added(start, render(tokenizer, before + [message], where), where))
    special = set(tokenizer.all_special_ids)
    ends = [i for i, token in enumerate(ids) if token in special]
    if not ends:
        return start, ids + [tokenizer.eos_token_id], []
    return start, ids[: ends[-1] + 1], ids[ends[-1] + 1 :]


def encode_prompt(tokenizer, prompt, where="prompt"):
    """Token ids: text with its special tokens (no EOS), messages through the chat template."""
    if not isinstance(prompt, str):
        return plain_ids(tokenizer, render(tokenizer, prompt, where, generation=True))
    ids = tokenizer(prompt)["input_ids"]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids:
        raise UserError(f"{where}: the prompt has no tokens")
    return ids


def prompt_room(model, cfg):
    """The longest prompt, in tokens, that leaves the model room for an answer. Raises UserError."""
    new, context = cfg.max_new_tokens, context_length(model)
    if new >= context:
        raise UserError(f"--max_new_tokens {new}: the model's context is {context} tokens")
    return min(cfg.max_prompt_tokens, context - new)


def load_prompts(rows, tokenizer, max_tokens):
    """Rows of any data file -> their prompts, tokenised; their `kind` and `task` stay with them."""
    prompts = [row | dict(prompt=prompt_of(row)) for row in rows]
    for row in prompts:
        row["ids"] = encode_prompt(tokenizer, row["prompt"], row["where"])
    return keep_short(prompts, max_tokens, lambda row: len(row["ids"]), "prompts")


def encode_response(tokenizer, prompt, response, where="response"):
    """Token ids with the end token; tokenised apart from the prompt, as generation sees them."""
    if not isinstance(response, str):
        if len(response) != 1 or response[0]["role"] != "assistant":
            raise UserError(f"{where}: a response in messages must be one assistant message")
        response = response[0]["content"]
    if isinstance(prompt, str):
        return plain_ids(tokenizer, response) + [tokenizer.eos_token_id]
    return assistant_turn(tokenizer, prompt, dict(role="assistant", content=response), where)[1]


def encode_dialogue(tokenizer, messages, where="messages"):
    """A dialogue as (ids, mask): the mask is 1 on every assistant turn, its end token included, and
    0 on everything else.

    For the template "<u>hi</u><a>yes</a>" (end token </a>) the ids of hi/yes give mask 0 0 0 0 1 1.
    """
    ids, mask, done = [], [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, turn, rest = assistant_turn(tokenizer, messages[:i], message, where)
        context = plain_ids(tokenizer, added(done, start, where))
        ids += context + turn + rest
        mask += [0] * len(context) + [1] * len(turn) + [0] * len(rest)
        done = render(tokenizer, messages[: i + 1], where)
    if not any(mask):
        raise UserError(f"{where}: no assistant message to learn from")
    return ids, mask


def join(prompt, response):
    """Prompt and response ids as one example: (ids, mask), the mask 1 on the response."""
    return prompt + response, [0] * len(prompt) + [1] * len(response)


def encode(tokenizer, prompt, responses, where="example"):
    """Examples (ids, mask) of the responses to one prompt."""
    ids = encode_prompt(tokenizer, prompt, where)
    return [join(ids, encode_response(tokenizer, prompt, text, where)) for text in responses]


def demonstration(tokenizer, row):
    """A line of SFT data as (ids, mask): messages, prompt and completion, or a pair's chosen."""
    if "messages" in row:
        return encode_dialogue(tokenizer, field(row, "messages"), row["where"])
    if "completion" in row:
        prompt, completion = field(row, "prompt"), field(row, "completion")
    else:
        prompt, completion, _ = split_pair(row)
    return encode(tokenizer, prompt, [completion], row["where"])[0]


def load_demonstrations(rows, tokenizer, max_tokens):
    examples = [demonstration(tokenizer, row) for row in rows]
    return keep_short(examples, max_tokens, lambda example: len(example[0]), "demonstrations")


def stop_ids(model, tokenizer):
    """What ends a response: the generation config's EOS ids, the tokenizer's, the template's."""
    ids = model.generation_config.eos_token_id
    ids = {tokenizer.eos_token_id} | set([ids] if isinstance(ids, int) else ids or [])
    if tokenizer.chat_template is not None:
        hello = [dict(role="user", content="a")], dict(role="assistant", content="b")
        with suppress(UserError):  # only messages need the template, and they will say so
            ids.add(assistant_turn(tokenizer, *hello, where="chat template")[1][-1])
    return sorted(ids)


def keep_short(examples, max_tokens, length, what):
    """The examples of at most `max_tokens`; says how many were dropped. UserError if all were."""
    short = [example for example in examples if length(example) <= max_tokens]
    if not short:
        raise UserError(f"all {len(examples)} {what} are longer than {max_tokens} tokens")
    if left_out := len(examples) - len(short):
        print(f"{left_out} of {len(examples)} {what} left out: longer than {max_tokens} tokens")
    return short


@dataclass
class Batch:
    """Sequences padded on the right, and where their response tokens are."""

    ids: torch.Tensor  # (B, T) prompt + response
    lengths: torch.Tensor  # (B,) real tokens
    tokens: torch.Tensor  # (B, R) response tokens
    positions: torch.Tensor  # (B, R) where in 0..T-1 each was predicted: one left of it
    mask: torch.Tensor  # (B, R) 1.0 on real response tokens
    real: tuple  # (N,) rows and (N,) columns of the N real response tokens in the (B, R) tensors
    rows: torch.Tensor  # (B,) which examples of the rollout or data set these are

    def cut(self, x):
        """This batch's part of a tensor over the whole rollout: (N, R_longest) -> (B, R)."""
        return x[self.rows, : self.mask.shape[1]]

    def paste(self, x, part):
        """Write (B, R) into a tensor over the whole rollout, 0 past the end of each response."""
        x[self.rows, : self.mask.shape[1]] = part * self.mask


def collate(examples, rows, device):
    """The examples `rows`, each (ids, mask), as a Batch.

    One example with prompt 5 6 and response 7 2, mask 0 0 1 1, gives ids [[5, 6, 7, 2]], tokens
    [[7, 2]] and positions [[1, 2]]: the hidden state at 1 (token 6) predicts the 7.
    """
    ids = [examples[row][0] for row in rows]
    trained = [[i for i, m in enumerate(examples[row][1]) if m] for row in rows]
    return Batch(
        ids=pad_right(ids, device),
        lengths=on_device([len(x) for x in ids], device),
        tokens=pad_right([[x[i] for i in at] for x, at in zip(ids, trained)], device),
        positions=pad_right([[i - 1 for i in at] for at in trained], device),
        mask=pad_right([[1.0] * len(at) for at in trained], device),
        real=(
            on_device([row for row, at in enumerate(trained) for _ in at], device),
            on_device([column for at in trained for column in range(len(at))], device),
        ),
        rows=on_device(list(rows), device),
    )


def pad_right(rows, device):
    """Lists of different lengths -> (B, longest) tensor with zeros on the right."""
    width = max(len(row) for row in rows)
    return on_device([row + [0] * (width - len(row)) for row in rows], device)


def on_device(numbers, device):
    """A tensor of lists, without waiting for what the device is doing."""
    return torch.tensor(numbers).to(device, non_blocking=True)


def micro_batches(lengths, max_tokens, rows=None):
    """Cut `rows` (default: all) into lists of rows of similar length, each at most `max_tokens`
    tokens when padded.

    micro_batches([3, 9, 4], 8) -> [[0, 2], [1]]: a single sequence may exceed the budget. Each
    process gets as many lists as the others, for a sharded model runs on all of them at once; so
    all must call it, with equally many rows.
    """
    parts = [[]]
    for row in sorted(range(len(lengths)) if rows is None else rows, key=lambda row: lengths[row]):
        if parts[-1] and (len(parts[-1]) + 1) * lengths[row] > max_tokens:
            parts.append([])
        parts[-1].append(row)
    parts = [part for part in parts if part]
    for _ in range(max_of_all(len(parts)) - len(parts)):
        largest = max(parts, key=len)
        parts.remove(largest)
        parts += [largest[::2], largest[1::2]]
    return parts


def batches(examples, max_tokens, device, rows=None):
    """The examples `rows` as one Batch for each of `micro_batches`."""
    rows = range(len(examples)) if rows is None else rows
    lengths = {row: len(examples[row][0]) for row in rows}
    parts = micro_batches(lengths, max_tokens, rows)
    return (collate(examples, part, device) for part in parts)


# ----------------------------------------------------------------------------------------------
# Scores


def load_function(spec):
    """`file.py:name` -> the function. Raises UserError. Nothing else is executed from a path."""
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"{spec}: expected file.py:function, and the file to exist")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules.setdefault(module_spec.name, module)  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{path}: fails when loaded ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, name, None)):
        raise UserError(f"{path}: no function {name}")
    return getattr(module, name)


def load_scorer(cfg, tokenizer, device, dtype):
    """By --reward_fn or --reward: (score, reward model, its tokenizer); a rule has but a score."""
    if cfg.reward_fn:
        return function_scorer(cfg.reward_fn, tokenizer), None, None
    reward = shard(load_reward(cfg.reward, device, dtype).requires_grad_(False), cfg)
    reward_tokenizer = load_tokenizer(cfg.reward, needs_eos=False)
    budget = token_budget(cfg, device)
    return model_scorer(reward, reward_tokenizer, tokenizer, budget), reward, reward_tokenizer


def load_gold(spec, data, tokenizer):
    """The judge `spec`, or the embedded world's own where `data` is its; otherwise None."""
    if not spec and is_embedded(data):
        spec = f"{EMBEDDED / 'hhh.py'}:gold_score"
    return function_scorer(spec, tokenizer) if spec else None


def score_all(score, prompts, prompt_ids, responses):
    """The scores (B,), each process having done its share."""
    own = [share(rows) for rows in (prompts, prompt_ids, responses)]
    return torch.tensor(gather(score(*own).tolist(), len(responses)))


def function_scorer(spec, tokenizer):
    """score(prompts, prompt_ids, responses) -> (B,) by a rule, function(prompts, responses)."""
    function = load_function(spec)

    def score(prompts, prompt_ids, responses):
        texts = [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
        try:
            scores = torch.tensor([float(s) for s in function(list(prompts), texts)])
        except Exception as error:
            raise UserError(f"{spec} raised {type(error).__name__}: {error}") from error
        if len(scores) != len(texts) or not scores.isfinite().all():
            found = scores.tolist()[:8]
            raise UserError(f"{spec}: expected {len(texts)} finite scores, got {found}")
        return scores

    return score


def model_scorer(reward, reward_tokenizer, tokenizer, max_tokens):
    """score(prompts, prompt_ids, responses) -> (B,) by a reward model.

    With the policy's tokenizer it reads the ids; with another one the text, rendered by its own
    chat template. An encoder reads the last message of the prompt and the response as a text
    pair, cut to its context.
    """
    same = reward_tokenizer.get_vocab() == tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)

    @torch.no_grad()
    def score(prompts, prompt_ids, responses):
        if same:
            examples = [join(p, r) for p, r in zip(prompt_ids, responses)]
        else:
            texts = [tokenizer.decode(r, skip_special_tokens=True) for r in responses]
            if not reward.scores_tokens:
                return encoder_scores(reward, reward_tokenizer, prompts, texts)
            examples = [encode(reward_tokenizer, p, [text])[0] for p, text in zip(prompts, texts)]
            for i, response in enumerate(responses):
                if response[-1] not in special:  # a cut answer must not read as an ended one
                    examples[i] = [part[:-1] for part in examples[i]]
        scores = torch.zeros(len(examples), device=reward.device)
        for batch in batches(examples, max_tokens, reward.device):
            scores[batch.rows] = sequence_scores(reward, batch)
        if not scores.isfinite().all():
            raise UserError("the reward model gives scores that are not finite numbers")
        return scores.cpu()

    return score


@torch.no_grad()
def encoder_scores(reward, tokenizer, prompts, texts, batch_size=32):
    """Scores (B,) of an encoder reward model, which reads (question, answer) in its own way."""
    questions = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    longest = min(context_length(reward), tokenizer.model_max_length)
    scores = []
    for i in range(0, len(texts), batch_size):
        inputs = tokenizer(
            questions[i : i + batch_size], texts[i : i + batch_size], return_tensors="pt",
            padding=True, truncation=True, max_length=longest,
        ).to(reward.device)  # fmt: skip
        scores.append(pooled_scores(reward, **inputs).cpu())
    return torch.cat(scores)


# ----------------------------------------------------------------------------------------------
# Answers, before and after


@torch.no_grad()
def evaluate(policy, sampler, ref, prompts, tokenizer, eos, score, gold, cfg):
    """Answer `prompts` with a fixed seed; `sampler` is the policy, or its copy in bfloat16.

    Returns the texts, their scores before any penalty, gold scores, the share that ended by
    themselves, and the mean KL to the reference, nats a response.
    """
    ids, texts = [p["ids"] for p in prompts], [p["prompt"] for p in prompts]
    generator = make_generator(policy.device, cfg.seed, "evaluate", shared=False)
    responses = generate(
        sampler, share(ids), cfg.max_new_tokens, eos, cfg.temperature, generator=generator,
        slots=cfg.slots,
    )  # fmt: skip
    examples = [join(p, r) for p, r in zip(share(ids), responses)]
    kl = torch.zeros(len(examples), device=policy.device)
    for batch in batches(examples, token_budget(cfg, policy.device), policy.device):
        logprobs = response_logprobs(policy, batch, cfg.temperature)  # (b, R)
        ref_logprobs = response_logprobs(ref, batch, cfg.temperature)
        kl[batch.rows] = (logprobs - ref_logprobs).sum(1)
    responses, kl = gather(responses, len(prompts)), gather(kl.tolist(), len(prompts))
    return dict(
        texts=[tokenizer.decode(r, skip_special_tokens=True) for r in responses],
        scores=score_all(score, texts, ids, responses) if score else None,
        gold=gold(texts, ids, responses) if gold else None,
        eos_rate=sum(r[-1] in eos for r in responses) / len(responses),
        kl=sum(kl) / len(kl),
    )


def summarise(prompts, **answers):
    """Means of score and EOS rate, and shares of good answers by kind and task, for eval.json.

    Each of `answers`, such as before=..., after=..., is what `evaluate` returns.
    """
    results = dict(n=len(prompts))
    for name, own in answers.items():
        results[f"eos_rate_{name}"] = own["eos_rate"]
        if own["scores"] is not None:
            results[f"score_{name}"] = own["scores"].mean().item()
            results[f"score_std_{name}"] = own["scores"].std(correction=0).item()
        if own["gold"] is None:
            continue
        good = (own["gold"] >= 0.5).tolist()
        results[f"gold_{name}"] = sum(good) / len(good)
        for key in ("kind", "task"):
            groups = [str(prompt.get(key, "")) for prompt in prompts]
            for group in sorted(set(groups) - {""}):
                of_group = [g for own_group, g in zip(groups, good) if own_group == group]
                results[f"gold_{name}_{group}"] = sum(of_group) / len(of_group)
    return results


def side_by_side(results, names):
    """`results` as {quantity: its values, as text, for each of the answers `names`}."""
    rows = {}
    heads = tuple(
        f"{name}_{names[0]}" for name in ("eos_rate", "score", "score_std", "gold") if names
    )
    for key in [key for key in results if key.startswith(heads)]:
        style = ".1%" if key.startswith(("gold", "eos")) else ".2f"
        values = [results[key.replace(f"_{names[0]}", f"_{name}", 1)] for name in names]
        rows[key.replace(f"_{names[0]}", "", 1)] = [format(value, style) for value in values]
    return rows


def print_table(results, prompts, **answers):
    """The `answers` side by side: their numbers in `results`, then some of their texts."""
    print(f"\n{len(prompts)} held-out prompts{'':9}" + "".join(f"{name:>12}" for name in answers))
    for name, values in side_by_side(results, list(answers)).items():
        print(f"{name:28}" + "".join(f"{value:>12}" for value in values))
    kls = ["" if own["kl"] is None else f"{own['kl']:.2f}" for own in answers.values()]
    print(f"{'KL to the reference, nats':28}" + "".join(f"{kl:>12}" for kl in kls))
    for i in range(0, len(prompts), max(1, len(prompts) // 6)):
        print(f"\n  {as_text(prompts[i]['prompt'])[-300:]}")
        for name, own in answers.items():
            print(f"    {name:10} {own['texts'][i][:300]}")


def write_samples(path, prompts, **answers):
    """samples.jsonl: each prompt with the `answers` to it and their scores."""
    columns = dict(prompt=[prompt["prompt"] for prompt in prompts])
    columns |= {name: own["texts"] for name, own in answers.items()}
    for name, own in answers.items():
        if own["scores"] is not None:
            columns[f"score_{name}"] = own["scores"].tolist()
    write_jsonl(path, [dict(zip(columns, values)) for values in zip(*columns.values())])


# ----------------------------------------------------------------------------------------------
# LoRA
#
# Hu et al. (2021): the weights stay as they are, and each linear layer of the blocks learns an
# update of low rank. So two models can share one backbone, each with an adapter of its own.


class LoRALinear(torch.nn.Linear):
    """x -> (W + scale B A) x, with W frozen, A (r, in) and B (out, r) in float32."""

    def __init__(self, linear, rank, scale):
        torch.nn.Module.__init__(self)
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.out_features, self.in_features = linear.weight.shape
        zeros = partial(torch.zeros, device=linear.weight.device)
        self.lora_A = torch.nn.Parameter(zeros(rank, self.in_features))
        self.lora_B = torch.nn.Parameter(zeros(self.out_features, rank))

    def forward(self, x):
        y = super().forward(x)
        # In the dtype of the activations: what samples has no autocast, and must agree.
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return y + (self.scale * update).to(y.dtype)

    def merged(self):
        return (self.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)


def trained_dtype(cfg, device):
    """float32, or where only adapters are trained the dtype of frozen models."""
    return frozen_dtype(device) if cfg.lora_rank else torch.float32


def add_lora(model, cfg):
    """With --lora_rank: freeze the model, but for a score head, and give every linear layer of its
    blocks an adapter, in place.

    A is from N(0, 1/r) and B is zero, so that the model is exactly what it was. Raises UserError
    where there is no such layer.
    """
    if not cfg.lora_rank:
        return
    model.requires_grad_(False)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    generator = make_generator("cpu", cfg.seed, "lora")
    found = [
        (layer, name, linear)
        for layer in blocks(model)
        for name, linear in layer.named_modules()
        if isinstance(linear, torch.nn.Linear)
    ]
    if not found:
        raise UserError(f"--lora_rank: {type(model).__name__} has no linear layers in its blocks")
    for layer, name, linear in found:
        lora = LoRALinear(linear, cfg.lora_rank, cfg.lora_alpha / cfg.lora_rank)
        shape = lora.lora_A.shape
        lora.lora_A.data.copy_(torch.randn(shape, generator=generator) / cfg.lora_rank)
        layer.set_submodule(name, lora)
    model.lora = dict(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha)


def share_weights(source, target):
    """Let `target` hold the very tensors of `source`; a score head stays its own."""
    weights = {k: v for k, v in source.state_dict().items() if not k.startswith("score.")}
    target.load_state_dict(weights, strict=False, assign=True)
    target.tie_weights()


def save_model(model, folder, merge=False):
    """A folder that transformers loads; of a model with LoRA the adapter alone, in PEFT's format,
    unless it is to `merge`. Each process must call it, the first one writes.
    """
    weights = gathered(dict(model.named_parameters())) if is_sharded(model) else None
    if rank():
        return
    layers = {k: m for k, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        model.save_pretrained(folder, state_dict=weights)
        return
    if merge:
        weights = {k: v for k, v in model.state_dict().items() if ".lora_" not in k}
        weights |= {f"{name}.weight": layer.merged() for name, layer in layers.items()}
        model.save_pretrained(folder, state_dict=weights)
        return
    score = hasattr(model, "score")
    base = model.config.name_or_path
    settings = dict(
        peft_type="LORA", task_type="SEQ_CLS" if score else "CAUSAL_LM", inference_mode=True,
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).exists() else base,
        target_modules=sorted({name.rpartition(".")[2] for name in layers}), lora_dropout=0.0,
        bias="none", modules_to_save=["score"] if score else None, **model.lora,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"base_model.model.{name}" + (".weight" if ".lora_" in name else ""): weight.contiguous()
        for name, weight in model.state_dict().items()
        if ".lora_" in name or name.startswith("score.")
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata=dict(format="pt"))
    write_json(folder / "adapter_config.json", settings)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)  # it holds a reward model's stored mean


def load_weights(model, folder):
    """What `save_model` wrote of this very model, in place."""
    if not hasattr(model, "lora"):
        saved = dict(type(model).from_pretrained(folder, dtype=model.dtype).named_parameters())
        for name, parameter in model.named_parameters():
            parameter.data.copy_(like(saved[name], parameter))
        return
    model.load_state_dict(adapter_weights(folder), strict=False)


def load_optimizer(optimizer, state):
    """What `gathered` made of its state_dict: each process takes its parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, own in state["state"].items():
        for name, tensor in own.items():
            if tensor.shape == parameters[index].shape:  # all but the count of the steps
                own[name] = like(tensor, parameters[index])
    optimizer.load_state_dict(state)


def adapter_weights(folder):
    """name -> tensor of an adapter, named as in LoRALinear."""
    weights = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = name.removeprefix("base_model.model.")
        weights[name.removesuffix(".weight") if ".lora_" in name else name] = tensor
    return weights


ODD_ADAPTERS = """use_rslora use_dora rank_pattern alpha_pattern fan_in_fan_out lora_bias
    layer_replication""".split()  # settings of PEFT's that change what an adapter does


@torch.no_grad()
def read_model(auto_class, path, dtype, **kwargs):
    """from_pretrained; for an adapter's folder, its base model with the adapter merged into it."""
    folder = Path(path)
    if not (folder / "adapter_config.json").exists():
        return auto_class.from_pretrained(path, dtype=dtype, **kwargs)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    weights, of_reward = adapter_weights(folder), settings["task_type"] == "SEQ_CLS"
    odd = [name for name in ODD_ADAPTERS if settings.get(name)]
    odd += [k for k in weights if "lora_" in k and not k.endswith((".lora_A", ".lora_B"))]
    if odd or settings.get("peft_type") != "LORA":
        raise UserError(f"{path}: not a plain LoRA adapter ({odd[:3]}): merge it with peft first")
    if of_reward and auto_class is AutoModelForCausalLM:
        raise UserError(f"{path}: a reward model where a causal language model is needed")
    if "config" not in kwargs:
        kwargs |= dict(num_labels=1) if of_reward else {}
        if (folder / "config.json").exists():
            kwargs = dict(config=AutoConfig.from_pretrained(folder, **kwargs))
    model = read_model(auto_class, settings["base_model_name_or_path"], torch.float32, **kwargs)
    if of_reward:
        model.config.architectures = [type(model).__name__]
    scale = settings["lora_alpha"] / settings["r"]
    for name, B in weights.items():
        if name.endswith(".lora_B"):
            layer = model.get_submodule(name.removesuffix(".lora_B"))
            layer.weight += scale * B @ weights[name.replace(".lora_B", ".lora_A")]
    model.load_state_dict({k: v for k, v in weights.items() if ".lora_" not in k}, strict=False)
    for parameter in model.parameters():  # .to(dtype) would round the rotary frequencies, too
        parameter.data = parameter.data.to(dtype)
    return model


# ----------------------------------------------------------------------------------------------
# Several processes
#
# Started by torchrun, they each take a share of every batch. What is small (answers, scores, (B, R)
# tensors) is gathered by all, so that the scripts read as for one process; gradients are summed
# once an optimiser step. Each process holds all models. With --shard it holds a part of every
# weight, by FSDP2, and only the model that samples is whole.


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(rows):
    """This process's part of a list, as long as that of the others: of a, b, c the first of two
    gets a, c and the second b, a. `gather` puts the parts together again.
    """
    n = len(rows)
    own = range(rank(), n + -n % world_size(), world_size())
    return [rows[i % n] for i in own]


def gather(rows, n=None):
    """The lists of all processes as one, in the order that `share` took them from `n` rows."""
    if not dist.is_initialized():
        return rows
    parts = [None] * world_size()
    dist.all_gather_object(parts, rows)
    if None in parts:  # one has none: log-probs, where transformers generated
        return None
    return [row for rows in zip(*parts, strict=True) for row in rows][:n]


def max_of_all(number):
    return max(gather([number]))


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def all_sum(*tensors):
    """Sum each tensor over the processes, in place."""
    if dist.is_initialized():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def shard(model, cfg):
    """With --shard: let each process keep a part of every weight, in place; returns the model.

    The weights of a block are gathered, in bfloat16 on a GPU, when it runs, and its gradients are
    summed and spread as its backward ends. The parts stay in the model's dtype.
    """
    if not cfg.shard:
        return model
    mixed = MixedPrecisionPolicy()
    if model.device.type == "cuda":
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(model.device.type, (world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    if hasattr(model, "score"):
        fully_shard(model.score, mesh=mesh)  # a reward rounded to bfloat16 has three digits
    fully_shard(model, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # losses are shares of a whole: add, do not average
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.forward_of = lambda call: call()  # no arguments: they would be cast to bfloat16
    register_fsdp_forward_method(model, "forward_of")
    return model


def is_sharded(model):
    return hasattr(model, "forward_of")


def whole(tensor):
    """A sharded tensor put together, which all processes must ask for; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state):
    """A state_dict with `whole` tensors, which the first process gets on the CPU; not the others.

    An optimiser's holds further dicts and lists.
    """
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, DTensor):
        tensor = whole(state.detach())
        return None if rank() else tensor.cpu()
    return state


def like(tensor, other):
    """A whole tensor, sharded as `other` is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


# ----------------------------------------------------------------------------------------------
# The run folder


def write_text(path, text):
    """Write atomically: whoever looks sees the old file or the new one, whole. Of several
    processes, the first one writes.
    """
    if rank():
        return
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path, rows):
    """Add lines to a file; they are on disk when this returns."""
    if rank():
        return
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


LOGGERS = ("tensorboard", "wandb")  # flags, and packages that the user may have


class Run:
    """A stage's folder: settings, metrics, checkpoints; at the end the model and eval.json.

    run.begin(model=model, ...)       what a checkpoint holds; a resumed run gets it back here
    for step in run.steps(total):     progress, checkpoints, a clean stop on Ctrl-C and SIGTERM
        run.log(("loss",), loss=...)  one line of metrics.jsonl a step
    run.finish(model, tokenizer, results)
    """

    def __init__(self, cfg):
        """Raises UserError when the folder is taken and no flag says what to do; writes nothing."""
        self.cfg, self.out = cfg, Path(cfg.out)
        self.start, self.stop_signal, self.report_due = 0, 0, 0.0
        self.asked = math.inf  # when the first signal came
        self.settings = settings = asdict(cfg)
        unimportant = "resume overwrite save_every keep shard device quiet".split()
        for name in (*unimportant, *LOGGERS):
            settings.pop(name)
        for name in LOGGERS:
            if getattr(cfg, name) and importlib.util.find_spec(name) is None:
                raise UserError(f"--{name}: not installed here (pip install {name})")
        together = cfg.batch_size // getattr(cfg, "minibatches", 1)
        if together % world_size():
            many = f"{together} sequences a step for {world_size()} processes"
            raise UserError(f"--batch_size: {many}, expected a multiple")
        if cfg.shard and (cfg.lora_rank or not dist.is_initialized()):
            raise UserError("--shard: for several processes, by torchrun, and without --lora_rank")
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out}: a file is in the way")
        taken = any(path.suffix != ".tmp" for path in self.out.glob("*"))
        if taken and not (self.out / "run.json").exists():
            raise UserError(f"--out {self.out} is not empty and holds no run: choose another --out")
        if taken and not cfg.overwrite:
            if not cfg.resume:
                raise UserError(
                    f"--out {self.out} holds a run: continue it with --resume, replace it with "
                    "--overwrite, or choose another --out"
                )
            before = json.loads((self.out / "run.json").read_text(encoding="utf-8"))
            changed = [k for k in settings if k != "out" and before.get(k) != settings[k]]
            if changed:
                was = ", ".join(f"--{k} was {before.get(k)!r}" for k in changed)
                raise UserError(f"--resume {self.out}: the settings differ ({was})")
            if (self.out / "eval.json").exists():
                self.remove_checkpoints()  # a kill in the run's last moment may have left them
                raise UserError(f"--resume {self.out}: this run is finished")
        reads = [Path(v) for k, v in settings.items() if isinstance(v, str) and v and k != "out"]
        for folder in reads:  # an adapter reads its base, too
            with suppress(OSError, ValueError, KeyError):
                adapter = (folder / "adapter_config.json").read_text(encoding="utf-8")
                base = Path(json.loads(adapter)["base_model_name_or_path"])
                reads += [base] if base not in reads else []
        own = self.out.resolve()
        inside = [v for v in reads if v.exists() and own in (v.resolve(), *v.resolve().parents)]
        if cfg.overwrite and inside:
            raise UserError(f"--overwrite {self.out}: it holds what this run reads, {inside[0]}")

    def begin(self, **objects):
        """Write the settings, and put `objects` (models, optimisers, plain dicts) where a resumed
        run left off, in place.

        They are what a checkpoint holds. Nothing is written before this call: input must be checked
        by then.
        """
        self.tracked = objects
        wait_for_all()  # until each has looked at the folder
        if self.cfg.overwrite and (self.out / "run.json").exists() and rank() == 0:
            shutil.rmtree(self.out)
        wait_for_all()
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(self.out / "run.json", self.settings)
        wait_for_all()
        if self.checkpoints():
            self.load_checkpoint()
        else:
            self.metrics = open(self.out / "metrics.jsonl", "wb") if rank() == 0 else None
        self.tensorboard = self.wandb = None
        if self.cfg.tensorboard and rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(self.out, purge_step=self.start + 1)
        if self.cfg.wandb and rank() == 0:
            import wandb

            name = self.out / "wandb.txt"  # a resumed run goes on in the same one
            if not name.exists():
                write_text(name, uuid.uuid4().hex)
            try:
                self.wandb = wandb.init(
                    project="rlhf", name=str(self.out), id=name.read_text(), resume="allow",
                    config=self.settings, dir=self.out,
                    settings=wandb.Settings(silent=self.cfg.quiet),
                )  # fmt: skip
            except wandb.errors.Error as error:
                raise UserError(f"--wandb: {error}") from None

    def load_checkpoint(self):
        """Put the tracked objects where the newest checkpoint has them."""
        folder = self.checkpoints()[-1]
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        for name, thing in self.tracked.items():
            if hasattr(thing, "save_pretrained"):
                load_weights(thing, folder / name)
            elif isinstance(thing, dict):
                thing.update(state[name])
            else:
                load_optimizer(thing, tensors[name])
        self.start, self.metrics = state["step"], None
        if rank() == 0:
            self.metrics = open(self.out / "metrics.jsonl", "r+b")
            self.metrics.truncate(state["metrics_bytes"])  # later steps are run again
            self.metrics.seek(0, os.SEEK_END)
        print(f"resumed {self.out} after step {self.start}")

    def checkpoints(self):
        """The whole ones, oldest first."""
        found = self.out.glob("checkpoint-*[0-9]")
        return sorted(found, key=lambda folder: int(folder.name.split("-")[1]))

    def checkpoint(self, step):
        """Write it under a temporary name, rename it, and only then remove those beyond --keep."""
        folder, temporary = self.out / f"checkpoint-{step}", self.out / "checkpoint.tmp"
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        state, tensors = dict(step=step), {}
        for name, thing in self.tracked.items():
            if hasattr(thing, "save_pretrained"):
                save_model(thing, temporary / name)
            elif isinstance(thing, dict):
                state[name] = thing
            else:
                tensors[name] = gathered(thing.state_dict())
        if rank():
            return
        state["metrics_bytes"] = self.metrics.tell()
        torch.save(tensors, temporary / "state.pt")
        write_json(temporary / "state.json", state)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        for old in self.checkpoints()[: -self.cfg.keep]:
            shutil.rmtree(old)

    def steps(self, total, done=None, name=None):
        """Yield the step numbers from 1 (or from where a resumed run stopped) to `total`.

        With `done`, how many steps are already, the loop keeps its own record of them and leaves no
        checkpoints.
        """
        start = self.start if done is None else done
        self.name = name or self.out.name
        first = {s: signal.signal(s, self.on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(
            total=total, initial=start, desc=self.name, dynamic_ncols=True,
            disable=self.cfg.quiet or rank() > 0 or None,  # None: where there is no terminal
        )  # fmt: skip
        try:
            for step in range(start + 1, total + 1):
                self.step, self.began = step, time.perf_counter()
                # For code that draws from the global generators: a --reward_fn, say.
                own = make_generator("cpu", self.cfg.seed, step, shared=False)
                set_seed(own.initial_seed() % 2**32)
                yield step
                self.bar.update()
                self.stop_signal = max_of_all(self.stop_signal)  # all stop after the same step
                due = self.cfg.save_every and step % self.cfg.save_every == 0 and step < total
                if (due or self.stop_signal) and done is None:
                    self.checkpoint(step)
                if self.stop_signal:
                    self.print(f"stopped after step {step}; --resume continues")
                    wait_for_all()  # torchrun ends the others as soon as one has ended
                    raise SystemExit(128 + self.stop_signal)
        finally:
            self.bar.close()
            for number, handler in first.items():
                signal.signal(number, handler)

    def on_signal(self, number, frame):
        """The first Ctrl-C or SIGTERM lets the step end and saves; the second one stops at once,
        but not within a second: torchrun may pass on what the processes were sent, too.
        """
        now = time.monotonic()
        if now > self.asked + 1:
            raise SystemExit(128 + number)
        if self.asked == math.inf:
            self.asked = now
            self.print("stopping after this step (again: at once)")
        self.stop_signal = number

    def log(self, show, **metrics):
        """One line of metrics.jsonl; `show` names the few that the progress bar has room for."""
        if rank():
            return
        seconds = time.perf_counter() - self.began
        row = dict(step=self.step, **metrics, seconds=seconds, peak_memory_gib=peak_memory_gib())
        row = {k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in row.items()}
        self.metrics.write((json.dumps(row) + "\n").encode())
        self.metrics.flush()
        self.show(**{name: row[name] for name in show})
        if self.tensorboard:
            for name, number in row.items():
                self.tensorboard.add_scalar(name, number, self.step)
        if self.wandb:
            self.wandb.log(row, step=self.step)
        if (start := time.perf_counter()) > self.report_due:
            write_report(self.out)
            took = time.perf_counter() - start
            self.report_due = start + max(5, 50 * took)  # at most a fiftieth of the run's time

    def show(self, **numbers):
        """On the progress bar; where there is no terminal, as a line now and then."""
        text = {name: f"{number:.3g}" for name, number in numbers.items()}
        self.bar.set_postfix(text, refresh=False)
        if self.bar.disable and (self.step % 10 == 0 or self.step in (1, self.bar.total)):
            text = "  ".join(f"{name} {number}" for name, number in text.items())
            self.print(f"{self.name} {self.step}/{self.bar.total}  {text}")

    def print(self, text):
        """A line that does not tear the progress bar."""
        tqdm.write(text)

    def finish(self, model, tokenizer, results):
        """Save the model, if any, and its tokenizer; eval.json is last: it says `finished`."""
        temporary = self.out / "model.tmp"
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if model is not None:
            save_model(model, temporary, self.cfg.merge)
        if rank():
            return
        if model is not None:
            tokenizer.save_pretrained(temporary)
            for path in temporary.iterdir():
                os.replace(path, self.out / path.name)
            temporary.rmdir()
        self.metrics.close()
        write_report(self.out, results)
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        write_json(self.out / "eval.json", results)
        self.remove_checkpoints()

    def remove_checkpoints(self):
        for folder in [*self.checkpoints(), self.out / "checkpoint.tmp"]:
            shutil.rmtree(folder, ignore_errors=True)


def make_missing_stages(cfg):
    """Run sft.py and reward.py for the default folders that are not finished."""
    stages = [("sft.py", cfg.policy, "out/sft", [])]
    if not cfg.reward_fn:
        stages.append(("reward.py", cfg.reward, "out/reward", ["--model", cfg.policy]))
    for script, folder, default, flags in stages:
        if folder != default or (Path(folder) / "eval.json").exists():
            continue
        if dist.is_initialized():
            raise UserError(f"{folder} is missing: make it first, by {script}")
        print(f"{folder} is missing: running {script}", flush=True)
        command = [sys.executable, str(Path(__file__).parent / script), "--out", folder]
        command += ["--seed", str(cfg.seed), "--device", cfg.device]
        command += flags + (["--quiet"] if cfg.quiet else [])
        command += ["--resume"] if (Path(folder) / "run.json").exists() else []
        # Ctrl-C reaches the stage too, SIGTERM is passed on: it saves and stops; then so do we.
        stage = subprocess.Popen(command)
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        on_terminate = signal.signal(signal.SIGTERM, lambda *_: stage.terminate())
        code = stage.wait()
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_terminate)
        if code:
            raise SystemExit(128 - code if code < 0 else code)  # a signal before its steps began


# ----------------------------------------------------------------------------------------------
# The report

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: light-dark(#1c2430, #dfe5ec); --line: #8884;
  --soft: light-dark(#667182, #93a0b0); --hue: light-dark(#0b62c4, #6db3ff) }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink); max-width: 1100px;
  margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.05rem; margin: 2.2rem 0 .6rem }}
.curves {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 1rem }}
figure {{ margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .5rem .7rem }}
figcaption {{ display: flex; justify-content: space-between; font-size: .85rem }}
svg {{ width: 100%; height: 70px; display: block; margin: .3rem 0; overflow: visible }}
polyline {{ fill: none; stroke: var(--hue); stroke-width: 1.6; vector-effect: non-scaling-stroke }}
small, .soft {{ color: var(--soft) }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; white-space: pre-line }}
.numbers {{ width: auto }} .numbers td + td {{ font-variant-numeric: tabular-nums }}
.samples td {{ width: 33% }}
@media (max-width: 640px) {{ .samples tr {{ display: block; border-top: 1px solid var(--line) }}
  .samples td {{ display: block; width: auto; border: 0; padding: .2rem 0 }}
  .samples tr:first-child {{ display: none }}
  .samples td + td::before {{ content: attr(data-name) "  "; color: var(--soft) }} }}
</style><h1>{title}</h1><p class="soft">{state}</p>{body}</html>
"""


def write_report(out, results=None):
    """report.html of the run in `out`; until there are `results` it loads itself now and then."""
    rows, samples = (
        [json.loads(line) for line in open(path, encoding="utf-8")] if path.exists() else []
        for path in (out / "metrics.jsonl", out / "samples.jsonl")
    )
    body, curves, constant = "", "", []
    names = [name for name in (samples or [{}])[0] if name != "prompt" and "score_" not in name]
    if results:
        table = [["Results, held-out data", *(names or [""])]]
        table += [[name, *values] for name, values in side_by_side(results, names).items()]
        for name, value in results.items():
            if isinstance(value, (int, float)) and not any(f"_{own}" in name for own in names):
                table.append([name, f"{value:.4g}"])
        body += html_table("numbers", table)
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        steps, values = zip(*((row["step"], row[name]) for row in rows if name in row))
        if len(set(values)) > 1:
            curves += curve(name, steps, values)
        else:
            constant.append(f"{name} {values[0]:.3g}")
    body += f"<h2>Metrics by step</h2><div class=curves>{curves}</div>"
    body += f"<p class=soft>Constant: {html.escape(', '.join(constant))}</p>" if constant else ""
    if results and samples:
        table = [["prompt", *names]]
        for sample in samples[:200]:
            cells = [as_text(sample["prompt"])[-600:]]
            for name in names:
                score = sample.get(f"score_{name}")
                cells.append(sample[name][:600] + ("" if score is None else f"\n({score:.2f})"))
            table.append(cells)
        body += f"<h2>Answers to {len(samples)} held-out prompts</h2>"
        body += html_table("samples", table)
    settings = json.loads((out / "run.json").read_text(encoding="utf-8"))
    body += "<h2>Settings</h2>" + html_table("numbers", [["flag", "value"], *settings.items()])
    step = rows[-1]["step"] if rows else 0
    state = f"{'finished' if results else 'running'}, {step} steps; {time.strftime('%F %R')}"
    refresh = "" if results else '<meta http-equiv="refresh" content="10">'
    title = html.escape(str(out))
    page = PAGE.format(title=title, state=state, refresh=refresh, body=body)
    write_text(out / "report.html", page)


def curve(name, steps, values):
    """A metric as a small SVG, with its last value and its range."""
    every = math.ceil(len(steps) / 300)
    steps, last, values = steps[::every], values[-1], values[::every]
    low, high = min(values), max(values)
    x = [300 * (step - steps[0]) / max(1, steps[-1] - steps[0]) for step in steps]
    y = [65 - 60 * (value - low) / ((high - low) or 1) for value in values]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y))
    return (
        f"<figure><figcaption>{html.escape(name)}<b>{last:,.4g}</b></figcaption>"
        f'<svg viewBox="0 0 300 70" preserveAspectRatio="none"><polyline points="{line}"/></svg>'
        f"<small>{low:,.3g} to {high:,.3g}</small></figure>"
    )


def html_table(kind, rows):
    """The first row is the heading."""
    text = "<tr>" + "".join(f"<th>{html.escape(str(cell))}</th>" for cell in rows[0]) + "</tr>"
    for row in rows[1:]:
        named = zip(rows[0], row)
        cells = (f'<td data-name="{n}">{html.escape(str(cell))}</td>' for n, cell in named)
        text += f"<tr>{''.join(cells)}</tr>"
    return f"<table class={kind}>{text}</table>"


# ----------------------------------------------------------------------------------------------
# Speed and memory


PEAK_TFLOPS = dict(A100=312, H100=989, H200=989)  # bfloat16, dense, by the maker's data sheet


def training_flops(models, tokens, head_tokens):
    """Floating-point operations of a forward and a backward of `models`: 6 for each token and
    weight of the layers, 6 for each response token and weight of an LM head; 4 where the weight is
    frozen under LoRA. Attention's products of tokens with tokens are left out.
    """
    flops = 0
    for model in models:
        layers = sum(p.numel() for layer in blocks(model) for p in layer.parameters())
        head = model.get_output_embeddings()
        head = 0 if head is None else head.weight.numel()
        each = 4 if hasattr(model, "lora") else 6
        flops += each * (tokens * layers + head_tokens * head)
    return flops


def utilisation(flops, seconds, device):
    """Model FLOP/s utilisation (MFU) against the peak it assumes; nothing where that is unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    flops /= world_size()
    peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in name), None)
    return dict(update_mfu=flops / seconds / peak / 1e12, peak_tflops=peak) if peak else {}


def clock(device):
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def activation_bytes(model, checkpointing):
    """About what a forward keeps for its backward, bytes a token, under bfloat16 autocast with
    compiled layers: counted with Llama and Qwen2. Layers that are not compiled keep half as much
    again.
    """
    config = model.config.get_text_config()
    names = ("intermediate_size", "ffn_dim", "n_inner")
    inner = [getattr(config, name) for name in names if getattr(config, name, None)]
    inner = inner[0] if inner else 4 * config.hidden_size
    a_layer = 4 * config.hidden_size if checkpointing else 18 * config.hidden_size + 6 * inner
    return config.num_hidden_layers * a_layer


def print_memory_plan(device, cfg, trained, frozen=(), sampler=None, cached_tokens=0):
    """What the run will hold at its peak, in GiB, beside what the card has.

    Weights, gradients (of one model at a time), Adam's moments, autocast's bfloat16 copies of the
    weights and the sampler's K/V are counted; the activations of a micro-batch are a rule of thumb.
    """
    weights = [own_part(p) for m in [*trained, *frozen] for p in m.parameters()]
    weights = {p.data_ptr(): p.nbytes for p in weights}
    learned = [sum(own_part(p).nbytes for p in m.parameters() if p.requires_grad) for m in trained]
    parts = dict(weights=sum(weights.values()))  # shared ones count once
    parts["gradients"] = max(learned)
    parts["Adam"] = 2 * sum(learned)
    if device.type == "cuda":
        parts["bfloat16 copies"] = parts["gradients"] // 2
    if sampler is not None:
        config = sampler.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None)
        head_size = head_size or config.hidden_size // config.num_attention_heads
        a_token = 2 * config.num_hidden_layers * heads * head_size * sampler.dtype.itemsize
        parts["K/V"] = cached_tokens * a_token
    each = max(activation_bytes(m, cfg.gradient_checkpointing) for m in trained)
    parts["activations about"] = token_budget(cfg, device) * each
    text = ", ".join(f"{name} {amount / 2**30:.2f}" for name, amount in parts.items())
    text = f"memory, GiB: {text}; in all {sum(parts.values()) / 2**30:.2f}"
    if device.type == "cuda":
        text += f" of {torch.cuda.get_device_properties(device).total_memory / 2**30:.1f}"
    print(text)
    print_memory_plan.last = text  # for the day it did not fit


def peak_memory_gib():
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


# ----------------------------------------------------------------------------------------------
# The command line


def require(cfg, over_0="", from_0="", **bounds):
    """Check flags, and those that every stage has: require(cfg, "steps", "trace", gamma=(0, 1))
    wants `steps` over 0, `trace` at least 0, `gamma` over 0 and at most 1. Raises UserError.
    """
    over_0 += " batch_size lr max_grad_norm keep lora_alpha"
    from_0 += " warmup micro_tokens save_every lora_rank"
    bounds = {name: (0, math.inf) for name in over_0.split()} | bounds
    for name, (low, high) in bounds.items():
        if not low < (value := getattr(cfg, name)) <= high:
            limit = f" and at most {high}" if high < math.inf else ""
            raise UserError(f"--{name} {value}: expected over {low}{limit}")
    for name in from_0.split():
        if not (value := getattr(cfg, name)) >= 0:
            raise UserError(f"--{name} {value}: expected at least 0")


OUT_OF_MEMORY = (
    "What helps, the cheapest first: a lower --micro_tokens, --gradient_checkpointing, fewer "
    "--slots, a shorter --max_new_tokens, --lora_rank, --shard over several cards, a smaller model"
)
NO_SPACE = "the last whole checkpoint is as it was: make room, then --resume"


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The script's docstring as it stands; then a flag a line, by one name, with its default."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=36, width=110)

    def _format_action_invocation(self, action):
        kind = action.metavar or (action.type or str).__name__.upper()
        kind = "|".join(action.choices) if action.choices else kind
        return action.option_strings[0] + ("" if action.nargs in (0, "?") else f" {kind}")

    def _get_help_string(self, action):
        return action.help if action.default == "" else super()._get_help_string(action)


def command_line(config_class, main, doc):
    """Parse the flags and run `main`; a UserError becomes one line on stderr and exit code 2."""
    script = Path(sys.argv[0]).name
    parser = HfArgumentParser(
        config_class, description=doc, usage=f"{script} [--flag value ...]", allow_abbrev=False,
        formatter_class=Help,
    )  # fmt: skip

    def fail(line):
        print(f"{script}: {line}", file=sys.stderr)
        sys.exit(2)

    parser.error = lambda message: fail(f"{message} (see {script} --help)")
    cfg = config_class(**vars(parser.parse_args()))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        quiet = cfg.quiet or os.environ.get("RANK", "0") != "0"
        with redirect_stdout(open(os.devnull, "w")) if quiet else nullcontext():
            main(cfg)
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:  # outside the steps, where a first Ctrl-C saves
        print(f"{script}: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except UserError as problem:
        fail(problem)
    except torch.OutOfMemoryError as problem:
        plan = getattr(print_memory_plan, "last", "no model was loaded yet")
        fail(f"{str(problem).splitlines()[0]} The plan was: {plan}. {OUT_OF_MEMORY}")
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"no space left for {problem.filename or cfg.out}; {NO_SPACE}")
