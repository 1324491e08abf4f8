"""README says what is so: line counts, names, flags, commands."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, STAGES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.S | re.M)


def test_the_line_counts_are_true():
    told = dict(re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.M))
    assert set(told) == {path.name for path in ROOT.glob("*.py")}
    for name, count in told.items():
        lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
        assert int(count.replace(",", "")) == lines, name


def test_names_that_readme_points_to_exist():
    found = re.findall(r"`(\w+)\.py: ([\w`, ]+)`", README)
    assert len(found) > 6
    for module, names in found:
        if module not in ("ppo", "common", "reward", "rejection_sample", "sft"):
            continue
        for name in re.findall(r"\w+", names):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for path in re.findall(r"\((tests/[\w./]+)\)|`((?:tests|data)/[\w./]+)`", README):
        assert (ROOT / "".join(path)).exists(), path
    for name in re.findall(r"`(test_\w+?)`", README):
        texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")]
        assert any(f"def {name}" in text for text in texts), name


def test_flags_in_commands_exist():
    """Every flag after one of our scripts, in code blocks and in the text."""
    seen = 0
    for text in blocks(r"sh[^\n]*"):
        for command in text.replace("\\\n", " ").splitlines():
            script = re.search(r"(\w+)\.py", command)
            if script and script[1] in STAGES:
                flags = set(re.findall(r" --(\w+)", command.split(script[0])[1].split(" #")[0]))
                assert flags <= set(vars(STAGES[script[1]].Config())), command
                seen += len(flags)
    assert seen > 30
    known = {flag for stage in STAGES.values() for flag in vars(stage.Config())}
    known |= {"policy", "reward", "shapes", "batches", "prompt", "new", "peer", "only", "seeds"}
    for flag in re.findall(r"`--(\w+)[ `]", README):
        assert flag in known or flag in README.split("Outgrown")[-1], flag


def test_embedded_commands_are_there():
    assert sum(block.count("python") for block in blocks("sh embedded")) >= 6


@pytest.mark.slow  # some ten minutes
def test_commands_for_the_embedded_world_run_as_they_stand(tmp_path):
    """In README's order, in a copy of the project, by bash."""
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt", ROOT / "data"]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, tmp_path / path.name)
    environment = dict(os.environ, PATH=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    for text in blocks("sh embedded"):
        done = subprocess.run(
            ["bash", "-e", "-c", text], cwd=tmp_path, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, text + done.stderr[-2000:]
    for out in ("sft", "reward", "ppo", "rejection_sample", "sft_on_best", "rso", "dpo"):
        assert (tmp_path / f"out/{out}/eval.json").exists(), out
        assert (tmp_path / f"out/{out}/report.html").exists(), out
