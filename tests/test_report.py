"""What a person sees of a run: report.html and --help."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import CONFIGS, ROOT, STAGES, after, chat, eval_of, ppo_config, rows_of, run

import common

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = """</script><script>document.title = "in"</script><img src=x> <!-- "DATA" ' \\"""
# In a frame of a phone's width the page tells how it looks: where its third curve ends, say.
PROBE = b"""<script>parent.postMessage(JSON.stringify([document.title, document.body.innerText,
  document.documentElement.scrollWidth - innerWidth, document.querySelectorAll("path[d^=M]").length,
  document.querySelectorAll("svg")[2].getBoundingClientRect().bottom]), "*")</script>"""
FRAME = """<iframe src="page.html" style="height: 900px; width: 320px"></iframe>
<script>onmessage = event => { document.body.textContent = event.data; }</script>"""

def data_of(out):
    """What the template was filled with; in all else the page is the template."""
    page = (out / "report.html").read_text(encoding="utf-8")
    tags = "html meta meta meta title /title style /style body script /script /body /html".split()
    assert re.findall(r"<(/?\w+)", page) == tags  # well-formed, and none comes from the data
    head, tail = (ROOT / "data/report.html").read_text(encoding="utf-8").split('"DATA"')
    assert page.startswith(head) and page.endswith(tail)
    return json.loads(page[len(head) : -len(tail)])

@pytest.fixture
def a_run(tmp_path, data, tiny_folder):
    """A Run of 300 steps that is not finished yet, and its results; an answer looks like HTML."""
    run = common.Run(ppo_config(data, tiny_folder, tmp_path / "run", steps=300))
    run.begin()
    for step in run.steps(300):
        run.log((), loss=1 / step, score=0.1 * step, kl=-step, gold=0.5)
    prompts = [dict(prompt="plain", kind="good"), dict(prompt=chat("user", "a & b"), kind=HOSTILE)]
    before = dict(texts=["x" * 500, HOSTILE], gold=[1, 0], ended=[True, True], scores=[0.5, -1.0])
    rows, results = common.compare(prompts, before=before, after=before | dict(scores=[0.75, 2.5]))
    return run, results | dict(kl=0.3), rows

def test_no_answer_breaks_out_of_the_page(a_run):
    run, results, rows = a_run
    run.finish(None, None, results, rows)
    seen = data_of(run.out)
    assert seen["samples"] == rows_of(run.out, "samples") and seen["samples"][1]["after"] == HOSTILE
    assert seen["results"] == results and results[f"gold_after_{HOSTILE}"] == 0

@pytest.mark.parametrize("name", STAGES)
def test_the_page_grows_with_the_run(tmp_path, data, sft_folder, name, monkeypatch):
    pages = []
    after(monkeypatch, common.Run, "write_report", lambda run, *_: pages.append(data_of(run.out)))
    cfg = run(CONFIGS[name](data, sft_folder, tmp_path / "out", steps=3))
    first, *_, last = pages
    assert first["results"] is None and first["metrics"] == rows_of(cfg.out)[:1]
    assert last["results"] == eval_of(cfg.out) and last["metrics"] == rows_of(cfg.out)
    assert last["settings"]["lr"] == cfg.lr and last["settings"]["out"] == cfg.out
    if name in ("ppo", "rejection_sample"):
        assert last["samples"] == rows_of(cfg.out, "samples")

@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_a_browser_shows_the_page_on_a_phone(a_run, tmp_path):
    run, results, rows = a_run
    def shown():
        (tmp_path / "page.html").write_bytes((run.out / "report.html").read_bytes() + PROBE)
        (tmp_path / "frame.html").write_text(FRAME)
        flags = "--headless --no-sandbox --disable-gpu --virtual-time-budget=5000 --dump-dom"
        command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path}", tmp_path / "frame.html"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
        told = html.unescape(re.search("<body>(.*)</body>", dom, re.S)[1])
        title, text, overflow, curves, bottom = json.loads(told)
        assert title == str(run.out) and curves == 5 and overflow <= 0 and bottom < 900
        assert "Settings" in text and "--steps" not in text  # folded
        return re.sub(r"\s+", " ", text)

    run.write_report()
    assert re.search("running, step 300 of 300 gold .* 50% score .* 30 .*kl .* -300 ", shown())
    run.finish(None, None, results, rows)
    text = shown()
    assert "score held out: mean of the answers -0.25 before 1.63 after kl" in text
    assert "gold held out: good answers 50% before 50% after" in text and "good 100% 100%" in text
    changed_most = f"user: a & b before -1 {HOSTILE} after 2.5 {HOSTILE}"
    assert 0 < text.index(changed_most) < text.index("plain before 0.5 xxx")

@pytest.mark.parametrize("name", STAGES)
def test_help_has_the_stages_own_flags_first_and_each_default_once(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    stage = STAGES[name]
    with pytest.raises(SystemExit) as end:
        common.command_line(stage.Config, stage.main, stage.__doc__)
    text = capsys.readouterr().out
    assert end.value.code == 0 and stage.__doc__.strip() in text
    settings, shared = vars(stage.Config()), list(vars(common.Settings()))
    blocks = [block.split() for block in re.split("^  --", text, flags=re.M)[1:]]
    assert [block[0] for block in blocks] == [s for s in settings if s not in shared] + shared
    for flag, *words in blocks:
        assert len(words) > 2 and words[-1] == f"[{settings[flag]}]" and str(words).count("'[") == 1
