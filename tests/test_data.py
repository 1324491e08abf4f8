"""Data of every form, as text and as chat messages: what is read, refused, and trained on."""

import gzip
import shutil
from functools import cache, partial
from types import SimpleNamespace

import pytest
from conftest import chat, make_llama, make_tokenizer, write
from tokenizers import processors

import common
import ppo
from common import EMBEDDED, UserError

user, assistant = partial(chat, "user"), partial(chat, "assistant")
DIALOGUE = user("a") + assistant("b") + user("c") + assistant("d")
HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"

def test_read_jsonl_reads_plain_and_gzip_and_remembers_the_line(tmp_path):
    text = '\ufeff{"prompt": "a"}\n\n{"prompt": "你好"}\r\n'
    (tmp_path / "x.jsonl").write_bytes(text.encode())
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for path in (tmp_path / "x.jsonl", tmp_path / "x.jsonl.gz"):
        first, second = common.read_jsonl(path)
        assert first == dict(prompt="a", where=f"{path}:1")
        assert second == dict(prompt="你好", where=f"{path}:3")

@pytest.mark.parametrize("name, content, says", [
    ("x.jsonl", b'{"a": 1}\n{"a": \n', "x.jsonl:2: "),
    ("x.jsonl", b'{"a": 1}\n\n[1, 2]\n', "x.jsonl:3: "),
    ("x.jsonl", b'{"a": 1}\nnull\n', "x.jsonl:2: "),
    ("x.jsonl", b'{"a": "\xff\xfe"}\n', "x.jsonl:1: "),
    ("x.jsonl", b"\n\n", "x.jsonl: no lines"),
    ("x.jsonl.gz", b"not gzip", "x.jsonl.gz: "),
    ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999)[:-9], "x.jsonl.gz: "),
    ("other.jsonl", b"", "x.jsonl: "),
])  # fmt: skip
def test_a_bad_file_or_line_is_named_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        common.read_jsonl(tmp_path / name.replace("other", "x"))
    assert str(error.value).startswith(f"{tmp_path}/{says}") and "\n" not in str(error.value)

def test_read_split_holds_out_the_last_twentieth(tmp_path, capsys):
    path, other = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
    write(path, [dict(prompt=str(i)) for i in range(60)])
    write(other, [dict(prompt="y")])
    train, held_out = common.read_split(path, "", "eval_sft.jsonl")
    assert [row["prompt"] for row in train] == [str(i) for i in range(57)]
    assert [row["prompt"] for row in held_out] == ["57", "58", "59"]
    assert "last 3 of 60" in capsys.readouterr().out
    assert [len(rows) for rows in common.read_split(path, other, "eval_sft.jsonl")] == [60, 1]
    with pytest.raises(UserError, match="--eval_data"):
        common.read_split(other, "", "eval_sft.jsonl")

def test_the_embedded_world_is_known_by_its_own_files(tmp_path, monkeypatch):
    train, held_out = common.read_split(EMBEDDED / "sft.jsonl", "", "eval_sft.jsonl")
    assert held_out == common.read_jsonl(EMBEDDED / "eval_sft.jsonl") and len(train) > 200
    monkeypatch.chdir(EMBEDDED)
    assert common.is_embedded("prompts.jsonl") and common.is_embedded("../data/pairs.jsonl")
    assert not common.is_embedded("mine.jsonl") and not common.is_embedded("hhh.py")
    assert not common.is_embedded(shutil.copy(EMBEDDED / "sft.jsonl", tmp_path))

@pytest.mark.parametrize("row, expected", [
    (dict(prompt="p"), ("p", [])),
    (dict(prompt="p", completion="a"), ("p", ["a"])),
    (dict(prompt="p", response="a", score=1), ("p", ["a"])),
    (dict(rejected="b", chosen="a", prompt="p"), ("p", ["a", "b"])),
    (dict(prompt=user("a"), completion=assistant("b")), (user("a"), [assistant("b")])),
    (dict(prompt="p", responses=["a", "b", "c"], ranks=[1, 2, 3]), ("p", ["a", "b", "c"])),
    (dict(messages=DIALOGUE), (DIALOGUE[:3], [])),
    (dict(messages=DIALOGUE[:3]), (DIALOGUE[:3], [])),
    # HH-RLHF's pairs of whole dialogues: up to the last turn of the assistant that they share
    (dict(chosen=f"{HUMAN} It", rejected=f"{HUMAN} It is"), (HUMAN, [" It", " It is"])),
    (dict(chosen=DIALOGUE, rejected=DIALOGUE[:3] + assistant("x")),
     (DIALOGUE[:3], [assistant("d"), assistant("x")])),
])  # fmt: skip
def test_prompt_and_responses_of_every_form(row, expected):
    assert common.prompt_and_responses(dict(row, where="f:7")) == expected

@pytest.mark.parametrize("row, says", [
    (dict(other="a"), "other"),
    (dict(prompt=3), '"prompt"'),
    (dict(prompt=[dict(content="a")]), '"prompt"'),
    (dict(prompt="  "), '"prompt" is empty'),
    (dict(prompt=[]), '"prompt" is empty'),
    (dict(prompt="a", completion=""), '"completion" is empty'),
    (dict(prompt="a", responses=["b", 3]), r'"responses\[1\]"'),
    (dict(messages=assistant("d")), "messages"),
    (dict(messages="text"), "messages"),
    (dict(messages=user("a") + [None]), "messages"),
    (dict(chosen="yes", rejected="no"), "chosen"),
    (dict(chosen=f"{HUMAN} b", rejected=HUMAN.replace("Hi", "Ho") + " b"), "chosen"),
    (dict(chosen=f"{HUMAN} b", rejected=HUMAN), "rejected"),
    (dict(chosen=DIALOGUE[:2], rejected=DIALOGUE[2:]), "chosen"),
    (dict(chosen=DIALOGUE[:2], rejected="text"), "chosen"),
    (dict(chosen=3, rejected=None), "chosen"),
])  # fmt: skip
def test_a_line_of_no_form_is_named_in_one_line(row, says):
    with pytest.raises(UserError, match=f"^f:7: .*{says}"):
        common.prompt_and_responses(dict(row, where="f:7"))

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: what was thought (before a bar) is dropped from all but the last turn.
THINKING = CHATML.replace("m.content", "m.content if loop.last else m.content.split('|')[-1]")
ENDLESS = CHATML.replace("<|im_end|>", "")
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"

@cache
def chat_tokenizer(template=CHATML):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(dict(extra_special_tokens=["<|im_start|>", "<|im_end|>"]))
    tokenizer.chat_template = template
    return tokenizer

def parts(tokenizer, example):
    """The text of the prompt and that of the response, which has to be one run to the end."""
    ids, mask = example["ids"], example["mask"]
    n = mask.index(1)
    assert mask == [0] * n + [1] * (len(ids) - n)
    return tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:])

def test_text_is_encoded_in_two_parts_with_bos_and_eos():
    tokenizer = make_tokenizer()
    prompt, response = tokenizer(["the sea", " a boat"], add_special_tokens=False)["input_ids"]
    example = common.encode(tokenizer, "the sea", " a boat")
    assert example == common.join([1, *prompt], [*response, 2])
    assert common.encode(tokenizer, "the sea", assistant(" a boat")) == example
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("the sea")["input_ids"] == [1, *prompt, 2]
    assert common.encode(tokenizer, "the sea", " a boat") == example

def test_messages_are_the_templates_rendering_in_two_parts():
    tokenizer, prompt = chat_tokenizer(), chat("system", "be nice") + DIALOGUE[:3]
    rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(common.encode_prompt(tokenizer, prompt)) == rendered
    for response in ("Paris. 你好", assistant("Paris. 你好")):
        example = common.encode(tokenizer, prompt, response)
        assert parts(tokenizer, example) == (rendered, "Paris. 你好<|im_end|>")
    endless = chat_tokenizer(ENDLESS)  # no token ends the turn: EOS
    assert parts(endless, common.encode(endless, user("a"), "b"))[1] == "b\n<eos>"

def test_each_assistant_turn_is_an_example_with_the_history_as_the_template_renders_it():
    tokenizer = chat_tokenizer(THINKING)
    turns = assistant("Hello") + user("a") + assistant("hm|b") + user("c") + assistant("so|d")
    rows = [dict(messages=turns, where="f:1"), dict(messages=DIALOGUE[:2], where="f:2")]
    found = [parts(tokenizer, e) for e in common.load_demonstrations(rows, tokenizer, 99)]
    ask = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    hello = "<|im_start|>assistant\nHello<|im_end|>\n"  # nothing comes before it: not learned
    assert found == [
        (hello + ask("a"), "hm|b<|im_end|>"),
        (hello + ask("a") + "b<|im_end|>\n" + ask("c"), "so|d<|im_end|>"),
        (ask("a"), "b<|im_end|>"),
    ]

def test_demonstrations_of_every_other_form():
    tokenizer, row = make_tokenizer(), dict(prompt="the sea", where="f:1")
    rows = [row | dict(completion="a boat"), row | dict(chosen="a boat", rejected="b")]
    expected = [common.encode(tokenizer, "the sea", "a boat")] * 2
    assert common.load_demonstrations(rows, tokenizer, 99) == expected
    with pytest.raises(UserError, match="f:1: no completion and no assistant message"):
        common.load_demonstrations([row], tokenizer, 99)

@pytest.mark.parametrize("template, prompt, response, says", [
    (None, user("a"), "b", "no chat template"),
    ("{{ raise_exception('no way') }}", user("a"), "b", "chat template: .*no way"),
    ("{{ messages | length }}{{ messages[-1].content }}", user("a"), "b", "rewrites what came"),
    (CHATML, user("a"), DIALOGUE[1:], "one assistant message"),
    (CHATML, [], "b", ""),
    (BARE, user(""), "b", "no tokens"),
    (CHATML, "a", assistant(None), ""),
    (CHATML, "a", "\ud800", ""),
    (CHATML, user("\ud800"), "b", ""),
])  # fmt: skip
def test_what_cannot_be_encoded_is_named_in_one_line(template, prompt, response, says):
    with pytest.raises(UserError, match=f"^f:3: .*{says}") as error:
        common.encode(chat_tokenizer(template), prompt, response, "f:3")
    assert "\n" not in str(error.value)

def test_prompts_keep_their_kind_and_leave_room_for_an_answer(capsys):
    tokenizer, policy = make_tokenizer(), SimpleNamespace(lm=make_llama(320))  # context: 256 tokens
    texts = ["How?", "the sea " * 20]
    rows = [dict(prompt=text, kind="helpful", completion="x", where="f:1") for text in texts]
    ids = tokenizer(texts)["input_ids"]
    n = len(ids[1])

    def load(**flags):
        prompts = common.load_prompts(rows, tokenizer, ppo.Config(**flags), policy)
        assert prompts[0]["kind"] == "helpful" and prompts[0]["prompt"] == "How?"
        return [prompt["ids"] for prompt in prompts]

    assert load(max_prompt_tokens=n) == load(max_new_tokens=256 - n) == ids
    assert capsys.readouterr().out == ""
    for flags in (dict(max_prompt_tokens=n - 1), dict(max_new_tokens=257 - n)):
        assert load(**flags) == ids[:1]
        assert "1 of 2 prompts left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 2 prompts are longer than 1"):
        load(max_prompt_tokens=1)
    with pytest.raises(UserError, match="--max_new_tokens 256"):
        load(max_new_tokens=256)

def test_stop_ids_are_the_models_the_tokenizers_and_the_templates():
    lm = make_llama(400)
    end = chat_tokenizer().convert_tokens_to_ids("<|im_end|>")
    for eos, stops in (([7, 9], [2, 7, 9]), (5, [2, 5]), (None, [2])):
        lm.generation_config.eos_token_id = eos
        assert common.stop_ids(lm, chat_tokenizer(None)) == stops
        assert common.stop_ids(lm, chat_tokenizer()) == sorted([*stops, end])
