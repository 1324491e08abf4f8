"""Data of every form, as text and as chat messages: what is read, refused, learned, left out."""

import gzip
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ANSWERS, CONFIGS, QUESTIONS, STAGES, chat, eval_of, make_llama, make_tokenizer
from conftest import ppo_config, rows_of, run, save, write
from tokenizers import AddedToken, processors
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

import common
import ppo
import rejection_sample
import reward
from common import EMBEDDED, UserError

user, assistant = partial(chat, "user"), partial(chat, "assistant")
DIALOGUE = user("a") + assistant("b") + user("c") + assistant("d")
OTHER = DIALOGUE[:3] + assistant("x")
HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"

def read_row(row):
    return common.read_row(json.dumps(row).encode()) | dict(where="f:7")

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
    ("x.jsonl", b'{"a": 1}\n\n[1, 2]\n', "x.jsonl:3: "), ("x.jsonl", b"null\n", "x.jsonl:1: "),
    ("x.jsonl", b'{"a": "\xff\xfe"}\n', "x.jsonl:1: "),
    ("x.jsonl", b'{"a": 1}\n{"a": ["\\ud800"]}\n', "x.jsonl:2: "),
    ("x.jsonl", b'{"a": ' + b"9" * 9999 + b"}\n", "x.jsonl:1: "),
    ("x.jsonl", b"\n\n", "x.jsonl: no lines"), ("x.jsonl.gz", b"not gzip", "x.jsonl.gz: "),
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
    both = [[x["prompt"] for x in rows] for rows in common.read_split(path, "", "eval_sft.jsonl")]
    assert both == [[str(i) for i in range(57)], ["57", "58", "59"]]
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
    (dict(prompt="p"), ("p", [])), (dict(prompt="", completion=""), ("", [""])),
    (dict(prompt="p", response="a", score=1), ("p", ["a"])),
    (dict(rejected="b", chosen="a", prompt="p"), ("p", ["a", "b"])),
    (dict(prompt=user("a"), completion=assistant("b")), (user("a"), [assistant("b")])),
    (dict(prompt="p", responses=["a", "b", "c"], ranks=[1, 2, 3]), ("p", ["a", "b", "c"])),
    (dict(messages=DIALOGUE), (DIALOGUE[:3], [])), (dict(messages=assistant("d")), ([], [])),
    (dict(messages=DIALOGUE[:3], chosen="x", rejected="y"), (DIALOGUE[:3], ["x", "y"])),
    (dict(prompt="a", chosen="b", rejected="c", completion="d", response="e"), ("a", ["b", "c"])),
    # HH-RLHF's pairs of whole dialogues: what they share; UltraFeedback's, beside the prompt
    (dict(chosen=f"{HUMAN} It", rejected=f"{HUMAN} It is"), (HUMAN, [" It", " It is"])),
    (dict(chosen=f"{HUMAN} It", rejected=HUMAN), (HUMAN, [" It", ""])),
    (dict(chosen=DIALOGUE, rejected=OTHER), (DIALOGUE[:3], [DIALOGUE[3:], OTHER[3:]])),
    (dict(chosen=OTHER, rejected=OTHER), (DIALOGUE[:3], [OTHER[3:], OTHER[3:]])),
    *[(dict(prompt=prompt, chosen=DIALOGUE, rejected=OTHER),
       (DIALOGUE[:3], [DIALOGUE[3:], OTHER[3:]])) for prompt in ("c", user("c"))],
])  # fmt: skip
def test_prompt_and_responses_of_every_form(row, expected):
    assert common.prompt_and_responses(read_row(row)) == expected

@pytest.mark.parametrize("row, says", [
    (dict(other="a"), "prompt"), (dict(prompt="a"), "no completion and no assistant message"),
    *[(dict(prompt=x), '"prompt"') for x in (3, [dict(content="a")], user("a")[0], ["a"])],
    *[(dict(messages=user("a") + [x]), "messages") for x in (0, dict(role="user"), *user(["a"]))],
    (dict(messages=user("a") + assistant([dict(type="image")])), "messages"),
    *[(dict(prompt=user("a") + assistant(x), completion="b"), '"prompt"') for x in (5, 0, {})],
    (dict(chosen="yes", rejected="no"), "prompt"), (dict(chosen="a"), "rejected"),
    (dict(messages="text"), ""), *[(dict(responses=x), '"resp') for x in (["b", 3], "b3", {})],
    (dict(chosen=f"{HUMAN} b", rejected=HUMAN.replace("Hi", "Ho") + " b"), "prompt"),
    (dict(chosen=DIALOGUE[:2], rejected=DIALOGUE[2:]), "different prompts"),
    (dict(conversations=[{"from": "human", "value": "a"}]), '"conv.*"messages", of role'),
])  # fmt: skip
def test_a_line_of_no_form_is_named_in_one_line(row, says):
    with pytest.raises(UserError, match=f"f:7: [^\n]*{says}[^\n]*$"), common.reading("f:7"):
        common.load_demonstrations([read_row(row)], chat_tokenizer(), (), 99)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: what was thought (before a bar) is dropped from all but the last turn.
THINKING = CHATML.replace("m.content", "m.content if loop.last else m.content.split('|')[-1]")
TRIMMING = CHATML.replace("m.content", "m.content | trim")
FORGETTING = CHATML.replace("m.content", "m.content.split('|')[-1]")
ENDLESS = CHATML.replace("<|im_end|>", "")
WHOLE = "{{ tools | tojson }}\n" + CHATML.replace("m.content", "m | tojson")
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"

@cache
def chat_tokenizer(template=CHATML):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(dict(extra_special_tokens=["<|im_start|>", "<|im_end|>"]))
    tokenizer.chat_template = template
    return tokenizer

def ends_of(tokenizer, known=2):
    return common.stop_ids(make_llama(8, eos_token_id=known), tokenizer)

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
    for nothing in ("", *[common.plain(assistant(x)) for x in ("", None, [])]):
        assert common.encode(tokenizer, "the sea", nothing) == common.join([1, *prompt], [2])
    assert common.encode(tokenizer, "", " a boat") == common.join([1], [*response, 2])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    assert tokenizer("the sea")["input_ids"] == [1, *prompt, 2]
    assert common.encode(tokenizer, "the sea", " a boat") == example
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert common.encode(tokenizer, "the sea", " a boat") == common.join(prompt, [*response, 2])
    first = common.encode(tokenizer, "", " a boat")  # no model predicts a first token
    assert first == dict(ids=[*response, 2], mask=[0] + [1] * len(response))

def test_each_assistant_turn_is_an_example_with_the_history_as_the_template_renders_it():
    tokenizer = chat_tokenizer(THINKING)
    turns = assistant("Hello") + user("a") + assistant("hm|b") + user("c") + assistant("so|d")
    turns += assistant("e")  # not continued: each of the messages is whole
    rows = [dict(messages=turns, where="f:1"), dict(messages=DIALOGUE[:2], where="f:2")]
    found = common.load_demonstrations(rows, tokenizer, ends_of(tokenizer), 99)
    begin = "<|im_start|>assistant\n"
    hello, ask = f"{begin}Hello<|im_end|>\n", ("<|im_start|>user\n{}<|im_end|>\n" + begin).format
    assert [parts(tokenizer, example) for example in found] == [
        (begin, "Hello<|im_end|>"),
        (hello + ask("a"), "hm|b<|im_end|>"),
        (hello + ask("a") + "b<|im_end|>\n" + ask("c"), "so|d<|im_end|>"),
        (hello + ask("a") + "b<|im_end|>\n" + ask("c") + "d<|im_end|>\n" + begin, "e<|im_end|>"),
        (ask("a"), "b<|im_end|>"),
    ]

@pytest.mark.parametrize("template, begun, asked, before, after", [
    (ENDLESS, "", "", "", "sea\n<eos>"),  # no token ends the turn
    # A prompt that ends with the assistant's own message is continued.
    (CHATML, "", "", "", "sea<|im_end|>"), (CHATML, "The ", "The ", "The ", "sea<|im_end|>"),
    (TRIMMING, "The ", "The ", "The ", "sea<|im_end|>"),
    (THINKING, "hm|The ", "hm|The ", "hm|The ", "sea<|im_end|>"),
    (FORGETTING, "hm|The ", "The ", "The ", "sea<|im_end|>"),  # rewritten
])  # fmt: skip
def test_messages_are_the_templates_rendering_in_two_parts(template, begun, asked, before, after):
    tokenizer, prompt = chat_tokenizer(template), chat("system", "你好") + user("a")
    begin = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    prompt += assistant(begun) if begun else []
    assert tokenizer.decode(common.encode_prompt(tokenizer, prompt)) == begin + asked
    for response in ("sea", assistant("sea")):
        example = common.encode(tokenizer, prompt, response, ends=ends_of(tokenizer))
        assert parts(tokenizer, example) == (begin + before, after)

@pytest.mark.parametrize("template, prompt, response, says", [
    (None, user("a"), "b", "chat_template is not set"), (BARE, user(""), "", "no token to learn"),
    ("{{ raise_exception('no way') }}", user("a"), "b", "chat template: .*no way"),
    (CHATML, user("a"), DIALOGUE[1:], "be one, of"), (CHATML, user("a"), [], "be one, of the ass"),
    *[(CHATML, x, [dict(role="assistant", tool_calls=[1])], "tool call") for x in ("", user("a"))],
    (CHATML, user("a") + [dict(role="assistant", content="b", tool_calls=[{}])], "", "a tool call"),
    (CHATML, "a", "\ud800", ""), (CHATML, user("\ud800"), "b", ""),
])  # fmt: skip
def test_what_cannot_be_encoded_is_named_in_one_line(template, prompt, response, says):
    with pytest.raises(UserError, match=f"^f:3: [^\n]*{says}[^\n]*$"), common.reading("f:3"):
        common.encode(chat_tokenizer(template), prompt, response)

TOOLS = [dict(type="function", function=dict(name="add", description="", parameters={}))]

def test_all_that_a_message_holds_and_the_tools_go_to_the_template():
    tokenizer, row = chat_tokenizer(WHOLE), dict(tools=TOOLS)
    asked = [dict(role="user", content="1+2?", name="Ann"), dict(role="tool", content="3", of=[1])]
    turn = dict(role="assistant", content="", tool_calls=[dict(id=1)], reasoning_content="hm", x={})
    ends = ends_of(tokenizer)
    before, after = parts(tokenizer, common.encode(tokenizer, asked, [turn], row, ends))
    assert read_row(dict(tools=json.dumps(TOOLS)))["tools"] == TOOLS  # so TRL reads them, too
    assert before == tokenizer.decode(common.encode_prompt(tokenizer, asked, row))
    assert before.startswith(json.dumps(TOOLS)) and before.endswith("<|im_start|>assistant\n")
    read = map(json.loads, re.findall(r"^(\{.*?\})<\|im_end\|>", before + after, re.M))
    for own, message in zip(read, [*asked, turn], strict=True):
        assert {key: own[key] for key in message} == message

# The templates of well-known models, as TRL ships them

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.submodule_search_locations[0], "chat_templates") if TRL else Path("nowhere")
SEEING = r"idefics3|llava_next|smolvlm|.*_training"  # which read lists alone, or are TRL's own
TEMPLATES = [p for p in sorted(FOLDER.glob("*.jinja")) if not re.fullmatch(SEEING, p.stem)]

def as_parts(role, text):
    return [dict(role=role, content=[dict(type="text", text=text)])]

def markup_tokenizer(path):
    """With the template's markup as tokens that are special, but have no role."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = path.read_text(encoding="utf-8")
    text = tokenizer.apply_chat_template(user("a") + assistant("b"), tokenize=False)
    marks = {*re.findall(r"<(?!/?think)[^<>\s]+>", text)} - {*tokenizer.get_vocab()}
    tokenizer.add_tokens([AddedToken(x, special=True, normalized=False) for x in sorted(marks)])
    return tokenizer

@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_template_learns_an_answer_and_its_end_after_what_it_renders_before(path):
    """Content may be null or a list of texts, too."""
    tokenizer, dialogues = markup_tokenizer(path), []
    for turn in (chat, as_parts):
        asked, told = turn("user", "One?") + turn("assistant", "A.B"), turn("user", "Two?")
        dialogues.append(read_row(dict(messages=asked + told + turn("assistant", "C.D"))))
    # Phi-3 has it in the generation config: after it the template writes a newline and EOS.
    phi3 = path.stem.startswith("phi3")
    ends = ends_of(tokenizer, tokenizer.convert_tokens_to_ids("<|end|>") if phi3 else None)
    found = common.load_demonstrations(dialogues[:1], tokenizer, ends, 9999)
    for n, answer, example in zip((1, 3), ("A.B", "C.D"), found, strict=True):
        turns = dialogues[0]["messages"]
        whole = tokenizer.apply_chat_template(turns[: n + 1], tokenize=False)
        asked = tokenizer.apply_chat_template(turns[:n], tokenize=False, add_generation_prompt=True)
        history, rest = whole.split(answer)
        end = re.match(r"(<[^<>\s]+>)*", rest)[0] or "<eos>"
        before = asked if whole.startswith(asked) else history
        assert parts(tokenizer, example) == (before, (history + answer)[len(before) :] + end)
    assert common.load_demonstrations(dialogues[1:], tokenizer, ends, 9999) == found

def calls(name):
    return [dict(type="function", function=dict(name=name, arguments=dict(a=1, b=2)))]

@pytest.mark.skipif(not TRL, reason="pip install trl")
@pytest.mark.parametrize("content", ["", None])
def test_pairs_of_tool_calls_under_qwen3s_template(content):
    tokenizer, names = markup_tokenizer(FOLDER / "qwen3.jinja"), ("add", "sub")
    answers = [[dict(role="assistant", content=content, tool_calls=calls(x))] for x in names]
    pair = dict(prompt=user("1+2?"), chosen=answers[0], rejected=answers[1], tools=TOOLS)
    pair, ends = read_row(pair), ends_of(tokenizer)
    judged = reward.read_judgement(tokenizer, ends, 999, pair).examples
    assert rejection_sample.load_pairs([pair], tokenizer, ends, 9999) == [judged]
    assert common.load_demonstrations([pair], tokenizer, ends, 9999) == judged[:1]
    for name, example in zip(names, judged):
        before, after = parts(tokenizer, example)
        call = '{"name": "%s", "arguments": {"a": 1, "b": 2}}' % name
        assert after == f"<think>\n\n</think>\n\n<tool_call>\n{call}\n</tool_call><|im_end|>"
        assert json.dumps(TOOLS[0]) in before and "1+2?<|im_end|>\n<|im_start|>assist" in before

# Where a turn ends, in all four stages

TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHI = TURNS.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
# Who knows that <|end|> ends a turn, and what the template writes.
KNOWN = {"the tokenizer": TURNS, "the generation config": PHI, "a special token": TURNS}

def end_tokenizer(template=TURNS):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    tokenizer.chat_template = template
    return tokenizer, len(tokenizer) - 1

@pytest.mark.parametrize("who", KNOWN)
def test_a_turn_ends_where_generation_ends(tmp_path, data, who, asked, monkeypatch):
    """That token is the last one learned, the reward model is read there, and sampling stops."""
    (tokenizer, end), path = end_tokenizer(KNOWN[who]), tmp_path / "x.jsonl"
    tokenizer.eos_token = "<|end|>" if who == "the tokenizer" else "<eos>"
    lm = make_llama(len(tokenizer))
    stops = [end] if who == "the tokenizer" else [2, end]
    lm.generation_config.eos_token_id = stops if who == "the generation config" else None
    save(tmp_path / "base", lm, tokenizer)
    assert common.stop_ids(lm, tokenizer) == stops
    pairs = [dict(prompt=user(q), chosen=a, rejected="egg") for q, a in zip(QUESTIONS, ANSWERS)]
    write(path, pairs)
    def stage(name, start, **flags):
        flags |= dict(data=str(path), eval_data=str(path))
        return rows_of(run(CONFIGS[name](data, tmp_path / start, tmp_path / name, **flags)).out)

    ids = tokenizer(ANSWERS, add_special_tokens=False)["input_ids"]
    learned = stage("sft", "base", steps=25, epochs=99.0)
    assert {row["tokens"] for row in learned} == {sum(map(len, ids)) + len(ids)}
    read, last = [], common.Scorer.last
    monkeypatch.setattr(common.Scorer, "last", lambda *args: read.append(args[1]) or last(*args))
    stage("reward", "sft")
    for ids, mask in ((i, m) for batch in read for i, m in zip(batch["ids"], batch["mask"])):
        assert ids[int(mask.nonzero().max())] == end and (ids[mask.bool()] == end).sum() == 1
    flags = dict(reward_fn="", reward=str(tmp_path / "reward"), max_new_tokens=40)
    stage("ppo", "sft", **flags)
    stage("rejection_sample", "sft", n=4, loss="none", **flags)
    said = sum([responses for _, _, responses, _ in asked], [])
    assert end in [x[-1] for x in said] and not any(end in x[:-1] for x in said)
    ended = [x[-1] in stops for x in asked[0][2]]
    assert eval_of(tmp_path / "ppo")["eos_rate_before"] == sum(ended) / len(ended)
    for row in rows_of(tmp_path / "rejection_sample", "candidates"):
        assert row["ended"] == [x[-1] in stops for x in row["responses"]]

LINES, REFUSE = BARE.replace("}}", "}}\n"), "{{ raise_exception('refused') }}"
SEA, BOAT = user("the sea"), ("<bos>the sea", "a boat<eos>")

@pytest.mark.parametrize("kind, prompt, answer, end, read", [
    ("", "the sea", "a boat", [2], BOAT), ("", SEA, "a boat", [2], BOAT),
    ("", SEA, "a boat", [320], BOAT),  # the policy's own end of a turn
    ("", SEA, "a boat", [], (BOAT[0], "a boat")),  # cut
    ("no EOS", "the sea", "", [2], (BOAT[0], "")),
    ("no EOS", SEA, "a\nboat", [2], ("the sea\n", "a\nboat\n")),
    ("encoder", SEA, "a boat", [2], ("the sea", "a boat")),
    ("fewer rows", "the sea", "a boat", [325, 2], BOAT),  # the policy's tokenizer lacks 325, too
    (REFUSE, SEA, "a boat", [2], ()),
])  # fmt: skip
def test_what_another_reward_model_reads(tmp_path, data, kind, prompt, answer, end, read):
    (tokenizer, _), own = end_tokenizer(), make_tokenizer(290)
    config = make_llama(290, num_labels=1, reward_mean=0.5).config
    if kind == "no EOS":
        own.eos_token, own.chat_template, config.eos_token_id = None, LINES, None
    elif kind == "encoder":
        names = dict(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
        own = PreTrainedTokenizerFast(tokenizer_object=own.backend_tokenizer, **names)
        sizes = dict(vocab_size=290, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        config = BertConfig(**sizes, num_labels=1, reward_mean=0.5, initializer_range=0.5)
    elif kind == "fewer rows":
        own, config.vocab_size = tokenizer, 321
    elif kind:
        own.chat_template = kind
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    save(tmp_path, plain, own)
    cfg = ppo_config(data, "", "", reward_fn="", reward=str(tmp_path))
    score, model = common.load_score(cfg, SimpleNamespace(lm=make_llama(329)), tokenizer)
    said = tokenizer(answer, add_special_tokens=False)["input_ids"] + end
    question = [dict(prompt=prompt, ids=[5], where="f:3")], [said]
    if kind == REFUSE:
        with pytest.raises(UserError, match=f"^f:3: {tmp_path}: the chat template: .* refused$"):
            score(*question)
        return
    keys = dict(input_ids=sum(own([*read], add_special_tokens=False)["input_ids"], []))
    if kind == "encoder":  # a text pair, told apart by its token types
        keys = own(*read)
        assert set(keys["token_type_ids"]) == {0, 1}
    expected = plain(**{key: torch.tensor([x]) for key, x in keys.items()}).logits.item() - 0.5
    assert model is None and score(*question).item() == pytest.approx(expected, abs=1e-5)

def test_prompts_keep_their_keys_and_leave_room_for_an_answer(capsys):
    tokenizer, policy = make_tokenizer(), SimpleNamespace(lm=make_llama(320))  # context: 256 tokens
    rows = [dict(prompt=text, completion="x", where="f:1") for text in ("How?", "the sea " * 20)]
    ids = tokenizer([row["prompt"] for row in rows])["input_ids"]
    n, expected = len(ids[1]), [dict(row, ids=own) for row, own in zip(rows, ids)]
    why = f"such as f:1: {n} tokens, not 1 to {n - 1}; see --max_new_tokens\n"
    for less, told in ((0, ""), (1, f"1 of 2 prompts left out, {why}")):
        for flags in (dict(max_prompt_tokens=n - less), dict(max_new_tokens=256 - n + less)):
            prompts = common.load_prompts(rows, tokenizer, ppo.Config(**flags), policy)
            assert prompts == expected[: 2 - less] and capsys.readouterr().out == told
    for flags in (dict(max_prompt_tokens=1), dict(max_new_tokens=256)):
        with pytest.raises(UserError, match="2 of 2 .*not 1 to [01]; see --max_new_tok"):
            common.load_prompts(rows, tokenizer, ppo.Config(**flags), policy)

STRICT = "{% if messages[0].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}" + CHATML

def line(prompt, chosen="a boat", rejected="egg"):
    if isinstance(prompt, list):
        chosen, rejected = assistant(chosen), assistant(rejected)
    return dict(prompt=prompt, completion=chosen, chosen=chosen, rejected=rejected)

@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("odd, stages", [
    (line("the sea", ""), []), (line(user("the sea"), ""), []), (line("", ""), []),
    (line("the sea", "egg"), ["reward", "rejection_sample"]),
    (line(user("the sea"), "egg"), ["reward", "rejection_sample"]),
    (line([]), [*STAGES]), (line(assistant("Hi") + user("the sea")), [*STAGES]),
])  # fmt: skip
def test_an_odd_line_is_learned_or_in_some_stages_left_out(
    tmp_path, data, capsys, name, odd, stages
):
    """With a count, and the run goes on; if all are odd it is one line. The template refuses a
    dialogue that the assistant begins."""
    path, every = tmp_path / "x.jsonl", tmp_path / "every.jsonl"
    folder = save(tmp_path / "model", chat_tokenizer(STRICT), make_llama(322))
    good = line("the sea" if isinstance(odd["prompt"], str) else user("the sea"))
    write(path, [odd, good, good, good])
    write(every, [odd, odd])
    key = "pairs" if name == "rejection_sample" else "data"
    flags = {"steps": 1, "eval_data": str(path), "micro_tokens": 999, key: str(path)}
    cfg = run(CONFIGS[name](data, folder, tmp_path / "out", **flags))
    said = [text for text in capsys.readouterr().out.splitlines() if "left out" in text]
    assert bool(said) == (name in stages)
    assert all(re.match(f"1 of 4 [a-z -]+ left out, such as {path}:1: ", text) for text in said)
    if said:
        with pytest.raises(UserError, match=f"^2 of 2 [a-z -]+ left out, such as {every}:1: .*"):
            run(replace(cfg, **{key: str(every)}, out=str(tmp_path / "every")))
