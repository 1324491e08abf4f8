"""LoRA by PEFT: adapters on shared backbones, plain merged models in the folders."""

import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import CONFIGS, STAGES, make_tokenizer, rows_of, save, weights_of
from test_distributed import codes, start

import common

peft = pytest.importorskip("peft", reason="pip install peft")

RANK = dict(lora_rank=4, lora_alpha=8.0)
EXAMPLES = [common.join([5, 9, 7], [30, 11, 2]), common.join([8], [40, 2])]
BATCH = common.collate(EXAMPLES)
# What is trained of each kind: A and B of the 7 or 4 linear layers in 2 blocks, and a score head.
TRAINED = dict(llama=2 * 7 * 2, gpt2=2 * 4 * 2, value=2 * 7 * 2 + 1)

@pytest.fixture(scope="session")
def folders(tmp_path_factory, tiny_folder, reward_folder):
    gpt2 = tmp_path_factory.mktemp("gpt2")
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2)
    config = transformers.GPT2Config(vocab_size=320, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(gpt2)
    return dict(llama=tiny_folder, gpt2=gpt2, value=reward_folder)

def load(kind, folder):
    load_module = common.load_scorer if kind == "value" else common.load_policy
    return load_module(folder, torch.device("cpu"))

@torch.no_grad()
def said(module):
    """Log-probs of a policy, scores of a value model: (B, T)."""
    return module(BATCH) if isinstance(module, common.Scorer) else module(BATCH)[0]

def said_off(module):
    with common.without_adapter(module):
        return said(module)

def gap(a, b):
    return (a - b).abs().max()

@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", TRAINED)
def test_off_is_the_base_bit_for_bit_on_is_what_was_learned(tmp_path, data, folders, kind, world):
    """At the start, after training, when a checkpoint is read again, and in the saved folder."""
    cfg = CONFIGS["sft"](data, folders[kind], tmp_path / "run", **RANK)
    def make(cfg):
        module = load(kind, folders[kind])
        common.add_lora(module, cfg)
        optimizer = common.make_optimizer(module, cfg, 1e-2)
        run = common.Run(cfg)
        run.begin(module=(module, optimizer))
        return module, optimizer, run
    def look():
        common.choose_device("cpu")
        base = said(load(kind, folders[kind]))
        module, optimizer, run = make(cfg)
        assert torch.equal(said(module), base) and torch.equal(said_off(module), base)
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        assert len(trained) == TRAINED[kind]
        for _ in range(3):
            found = module(BATCH)
            (found if kind == "value" else found[0]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        learned = said(module)
        assert gap(learned, base) > 0.01 and torch.equal(said_off(module), base)
        run.checkpoint(3)
        if common.rank() == 0:
            run.metrics.close()  # or the folder would be locked
        module, *_ = make(replace(cfg, resume=True))
        assert torch.equal(said(module), learned) and torch.equal(said_off(module), base)
        assert set(torch.load(tmp_path / "run/checkpoint.pt")["module"][0]) == trained
        common.save_model(module, tmp_path / "saved")
        common.gather([])
        assert gap(said(load(kind, tmp_path / "saved")), learned) < 1e-4

    assert codes(start(world, look)) == [0] * world

def test_a_bfloat16_base_does_not_swallow_small_updates(tmp_path, tiny_folder):
    """W + (alpha / r) B A is saved in float32."""
    policy = load("llama", tiny_folder)
    common.cast(policy.lm, torch.bfloat16)
    common.add_lora(policy, CONFIGS["sft"](tmp_path, "", "", **RANK))
    layer = policy.lm.model.layers[0].mlp.up_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    update = 8.0 / 4 * torch.nn.init.normal_(B, std=1e-3).double() @ A.double()
    expected = layer.weight.double() + update
    common.save_model(policy, tmp_path)
    assert gap(weights_of(tmp_path)["model.layers.0.mlp.up_proj.weight"], expected) < 1e-6

def made_by_peft(task, base, folder):
    """A model with an adapter, whose folder has no config.json."""
    name = dict(CAUSAL_LM="CausalLM", SEQ_CLS="SequenceClassification")[task]
    lm = getattr(transformers, f"AutoModelFor{name}").from_pretrained(base, num_labels=1)
    how = dict(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(lm, peft.LoraConfig(task_type=task, **how)).eval()
    save(folder, model, make_tokenizer())
    return model

def test_an_adapter_made_by_peft_is_merged_or_refused(tmp_path, data, tiny_folder):
    policy, scorer = tmp_path / "policy", tmp_path / "scorer"
    theirs = made_by_peft("CAUSAL_LM", tiny_folder, policy)
    assert gap(said(load("llama", policy)), said(common.Policy(theirs.get_base_model()))) < 1e-4
    assert gap(said(load("llama", policy)), said(load("llama", tiny_folder))) > 0.1
    # A reward model may begin with it, and a value model.
    STAGES["reward"].main(CONFIGS["reward"](data, policy, tmp_path / "reward"))
    STAGES["ppo"].main(CONFIGS["ppo"](data, policy, tmp_path / "ppo", **RANK))
    assert rows_of(tmp_path / "ppo")[0]["kl"] == 0
    theirs = made_by_peft("SEQ_CLS", tiny_folder, scorer)
    for score, example in zip(load("value", scorer).last(BATCH), EXAMPLES):
        assert gap(score, theirs(input_ids=torch.tensor([example["ids"]])).logits) < 1e-4
    for kind, folder, task in (("value", policy, "CAUSAL_LM"), ("llama", scorer, "SEQ_CLS")):
        with pytest.raises(common.UserError, match=f"{folder}: an adapter .{task}. of"):
            load(kind, folder)

def test_peft_is_asked_for_in_one_line(tmp_path, data, tiny_folder, monkeypatch):
    made_by_peft("CAUSAL_LM", tiny_folder, tmp_path / "a")
    monkeypatch.setitem(sys.modules, "peft", None)
    for folder, flags in ((tmp_path / "a", {}), (tiny_folder, RANK)):
        with pytest.raises(common.UserError, match=r"(adapter|--lora_rank): .*pip install peft"):
            STAGES["sft"].main(CONFIGS["sft"](data, folder, tmp_path / "out", **flags))

def test_each_stage_goes_on_from_the_one_before(tmp_path, data, tiny_folder, monkeypatch):
    """All with adapters. In ppo.py two backbones serve four models: the reference is the policy
    without its adapter, the reward model the value model without its own."""
    modules, heard = [], []
    add_lora, finish = common.add_lora, common.Run.finish
    def listen(self, *args):
        heard[:] = [(said(module), said_off(module)) for module in modules]
        finish(self, *args)

    monkeypatch.setattr(common, "add_lora", lambda *a: add_lora(*a) or modules.append(a[0]))
    monkeypatch.setattr(common.Run, "finish", listen)
    def learn(name, start, **flags):
        """A stage's weights, and what its models said at its end, on and off."""
        modules.clear()
        STAGES[name].main(CONFIGS[name](data, start, tmp_path / name, **RANK, **flags))
        return weights_of(tmp_path / name), *heard

    sft_weights, (policy_on, policy_off) = learn("sft", tiny_folder)
    _, (scorer_on, _) = learn("reward", tmp_path / "sft")
    policy, scorer = load("llama", tmp_path / "sft"), load("value", tmp_path / "reward")
    assert gap(said(policy), policy_on) < 1e-5 < 0.01 < gap(policy_on, policy_off)
    assert gap(said(scorer), scorer_on) < 1e-5
    flags = dict(reward_fn="", reward=str(tmp_path / "reward"), lr=0.01, value_lr=0.01)
    two, (on, off), (value_on, value_off) = learn("ppo", tmp_path / "sft", **flags)
    assert torch.equal(off, said(policy)) and torch.equal(value_off, said(scorer))
    assert gap(on, off) > 0.01 and gap(value_on, value_off) > 0.01
    before, after = modules[1].lm.score.parameters()
    assert gap(before, after) > 0
    rows = rows_of(tmp_path / "ppo")
    assert rows[0]["kl"] == 0 != rows[-1]["kl"]
    assert max(row["sampler_gap_max"] for row in rows) < 1e-4  # it samples with the adapter
    # A plain model, which says in plain transformers what it said here.
    assert set(two) == set(sft_weights) and not list(tmp_path.glob("*/adapter*"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ppo")
    assert gap(said(common.Policy(plain)), on) < 1e-5
    # With a reference of its own it learns the same.
    three, *_ = learn("ppo", tmp_path / "sft", **flags, ref=str(tmp_path / "sft"), overwrite=True)
    assert all(torch.equal(two[key], three[key]) for key in two)
