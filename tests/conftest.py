"""Tiny models and tokenizers for all tests, made on the spot: nothing is downloaded."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sft  # noqa: E402

torch.set_num_threads(1)

SENTENCES = [
    "What is the capital of France? The capital is Paris.",
    "Please tell me a story about the sea. Once there was a boat on the sea.",
    "How do I boil an egg? Put it into hot water and wait.",
    "你好。今天天气怎么样？",
]


def make_tokenizer(vocab_size=320):
    return sft.new_tokenizer(SENTENCES * 4, vocab_size)


def make_llama(vocab_size, seed=0, **settings):
    sizes = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(sizes | settings)))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A function: tiny_tokenizer(vocab_size=320) -> a new BPE with <pad> 0, <bos> 1, <eos> 2."""
    return make_tokenizer


@pytest.fixture(scope="session")
def tiny_llama():
    """A function: tiny_llama(vocab_size, seed=0, **config) -> a new 2-layer Llama."""
    return make_llama


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder with a saved tiny Llama and its tokenizer; read it only."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
