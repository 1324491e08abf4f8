"""README says what is so: line counts, names, flags, links, commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, STAGES

import common

README = (ROOT / "README.md").read_text(encoding="utf-8")

NAMES = [f"{name}.py" for name in (*STAGES, "common")]

def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.S | re.M)

def test_line_counts_links_and_names():
    lines = {name: format((ROOT / name).read_bytes().count(b"\n"), ",") for name in NAMES}
    assert dict(re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.M)) == lines
    assert README.count("\n") <= 220
    anchors = re.sub(r"[^\w\n -]", "", README.lower()).replace(" ", "-").split("\n")
    for page in (ROOT / "README.md", ROOT / "tests/results/README.md"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            assert link.replace("#", "-") in anchors or (page.parent / link).exists(), link
        for path in re.findall(r"`(?:python )?((?:tests|data)/\w+\.\w+)", text):
            assert (ROOT / path).exists(), path
    for module, name in re.findall(r"`(\w+)\.py: (\w+)[`,]", README):
        assert hasattr(STAGES.get(module, common), name), f"{module}.{name}"

def test_commands_parse_and_flags_exist(monkeypatch):
    seen = []
    for line in "\n".join(blocks(r"sh[^\n]*")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word[:-3] in STAGES and words[i - 1] == "python":
                monkeypatch.setattr(sys, "argv", words[i:])
                common.command_line(STAGES[word[:-3]].Config, seen.append, "")
    assert {type(cfg) for cfg in seen} == {stage.Config for stage in STAGES.values()}
    known = {flag for stage in STAGES.values() for flag in vars(stage.Config())}
    assert set(re.findall(r"--(\w+)", README)) <= known | {"only", "nproc_per_node"}

def test_the_reward_function_likes_kind_words(tmp_path, sft_folder):
    pytest.importorskip("vaderSentiment")
    (tmp_path / "sentiment.py").write_text(blocks("python sentiment")[0])
    tokenizer = common.load_tokenizer(sft_folder)
    score = common.function_score(f"{tmp_path / 'sentiment.py'}:score", tokenizer)
    texts = [" is a wonderful, happy film", " is awful"]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    kind, unkind = score([dict(prompt="this")] * 2, ids).tolist()
    assert kind > 0.8 > 0 > -0.4 > unkind >= -1

@pytest.mark.slow  # some ten minutes
def test_commands_for_the_embedded_world_run_as_they_stand(tmp_path):
    shutil.copytree(ROOT, tmp_path, ignore=lambda *_: ["out", "tests", ".git"], dirs_exist_ok=True)
    (tmp_path / "sentiment.py").write_text(blocks("python sentiment")[0])
    commands = f"PATH={os.path.dirname(sys.executable)}:$PATH\n" + "".join(blocks("sh embedded"))
    commands += "python ppo.py --reward_fn sentiment.py:score --steps 2 --out out/judged"
    subprocess.run(["bash", "-exc", commands], cwd=tmp_path, check=True)
    for out in ("sft", "reward", "ppo", "rejection_sample", "sft_on_best", "rso", "dpo", "judged"):
        assert (tmp_path / "out" / out / "eval.json").exists(), out
