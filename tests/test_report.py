"""What a person sees of a run: report.html, the loggers, --quiet, --help."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CONFIGS,
    ROOT,
    STAGES,
    flags_of,
    ppo_config,
    rejection_sample_config,
    rows_of,
    sft_config,
    write,
)

import common
import ppo
import rejection_sample
import sft


class Page(HTMLParser):
    """The tags, texts and table rows of a page; fails where a tag is not closed in its turn."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.texts, self.rows = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(text)

    def curves(self):
        return [a["points"].split() for tag, a in self.tags if tag == "polyline"]


@pytest.fixture
def long_run(tmp_path):
    """A folder as a run leaves it, of 700 steps, with an answer that looks like HTML."""
    (tmp_path / "run.json").write_text(json.dumps(dict(lr=0.1, data="a<b>.jsonl")))
    rows = [dict(step=i, loss=1 / i, lr=0.1, kl=-1.0 * i, late=i) for i in range(1, 701)]
    for row in rows[:600]:
        del row["late"]
    write(tmp_path / "metrics.jsonl", rows)
    prompt = [dict(role="user", content="hello & goodbye")]
    write(tmp_path / "samples.jsonl", [
        dict(prompt=prompt, before="<script>alert(1)</script>", after="x" * 5000,
             score_before=-1.0, score_after=2.5),
        dict(prompt="plain", before="b", after="a", score_before=0.0, score_after=0.0),
    ])  # fmt: skip
    results = dict(
        n=2, score_before=-0.5, score_after=1.25, gold_before=0.5, gold_after=1.0, kl=0.3
    )
    return tmp_path, results


def test_the_report_shows_metrics_results_answers_and_settings(long_run):
    out, results = long_run
    common.write_report(out, results)
    page = Page(out / "report.html")
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "img" not in names and "link" not in names
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "") and len(text) < 40_000
    assert len(page.curves()) == 3  # loss, kl, late; lr never moves
    assert any("lr 0.1" in text for text in page.texts)
    assert [len(points) for points in page.curves()][:2] == [234, 234]  # every third of 700
    loss = [tuple(map(float, point.split(","))) for point in page.curves()[0]]
    assert loss[0] == (0.0, 5.0) and loss[-1][0] == 300.0 and 64 < loss[-1][1] <= 65  # falls
    assert ["score", "-0.50", "1.25"] in page.rows and ["gold", "50.0%", "100.0%"] in page.rows
    assert ["kl", "0.3"] in page.rows and ["data", "a<b>.jsonl"] in page.rows
    assert [
        "user: hello & goodbye",
        "<script>alert(1)</script>\n(-1.00)",
        "x" * 600 + "\n(2.50)",
    ] in (page.rows)
    assert not any("http-equiv" in attributes for _, attributes in page.tags)


def test_the_report_of_a_run_that_goes_on_loads_itself_again(long_run):
    out, _ = long_run
    common.write_report(out)  # there may be samples, of a run that was killed at its very end
    page = Page(out / "report.html")
    assert ("meta", {"http-equiv": "refresh", "content": "10"}) in page.tags
    assert len(page.curves()) == 3 and not any("score" in row for row in page.rows)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_ends_with_a_report(tmp_path, data, sft_folder, name, monkeypatch):
    cfg = CONFIGS[name](data, sft_folder, tmp_path / "out", steps=3)
    seen = []
    whole = common.write_report

    def look(out, results=None):
        whole(out, results)
        seen.append(len(Page(out / "report.html").curves()))

    monkeypatch.setattr(common, "write_report", look)
    STAGES[name].main(cfg)
    # After the first step, when nothing has moved yet, and at the end.
    assert seen[0] == 0 and len(seen) == 2
    page = Page(tmp_path / "out/report.html")
    rows = rows_of(tmp_path / "out")
    moving = [key for key in rows[-1] if len({row[key] for row in rows}) > 1 and key != "step"]
    assert len(page.curves()) == len(moving) and {"seconds"} < set(moving)
    assert any("finished, 3 steps" in text for text in page.texts)
    if name in ("ppo", "rejection_sample"):
        sample = rows_of(tmp_path / "out", "samples")[0]
        assert any(row[0] == sample["prompt"] for row in page.rows)


def test_a_report_without_metrics(tmp_path, data, sft_folder):
    cfg = rejection_sample_config(data, sft_folder, tmp_path / "out", loss="none")
    rejection_sample.main(cfg)
    page = Page(tmp_path / "out/report.html")
    assert not page.curves() and ["prompt", "before", "best_of_n"] in page.rows


# --tensorboard, --wandb


def test_tensorboard_gets_every_metric_of_every_step_once(tmp_path, data, tiny_folder):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = sft_config(data, tiny_folder, tmp_path / "out", tensorboard=True)
    sft.main(cfg)
    events = EventAccumulator(cfg.out)
    events.Reload()
    rows = rows_of(cfg.out)
    assert set(events.Tags()["scalars"]) == set(rows[0])
    logged = [(e.step, e.value) for e in events.Scalars("loss")]
    assert logged == [(r["step"], pytest.approx(r["loss"], rel=1e-5)) for r in rows]


def test_wandb_gets_the_settings_and_every_step(tmp_path, data, tiny_folder, monkeypatch):
    pytest.importorskip("wandb")
    import wandb

    calls = []
    run = SimpleNamespace(
        log=lambda row, step: calls.append((step, row["loss"])),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setattr(wandb, "init", lambda **settings: calls.append(settings) or run)
    cfg = sft_config(data, tiny_folder, tmp_path / "out", wandb=True)
    sft.main(cfg)
    settings, *logged = calls
    assert settings["config"]["lr"] == cfg.lr and settings["name"] == cfg.out
    assert logged == [(r["step"], r["loss"]) for r in rows_of(cfg.out)] + ["finish"]


@pytest.mark.parametrize("name", common.LOGGERS)
def test_a_logger_that_is_not_installed_is_one_line(tmp_path, data, tiny_folder, name, monkeypatch):
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    cfg = sft_config(data, tiny_folder, tmp_path / "out", **{name: True})
    with pytest.raises(common.UserError, match=f"--{name}: .*pip install {name}"):
        sft.main(cfg)
    assert not (tmp_path / "out").exists()


# the command line


def test_quiet_prints_nothing_and_errors_still_show(
    tmp_path, data, sft_folder, monkeypatch, capsys
):
    def run(**flags):
        cfg = ppo_config(data, sft_folder, tmp_path / "out", quiet=True, trace=1, **flags)
        monkeypatch.setattr(sys, "argv", ["ppo.py", *flags_of(cfg)])
        common.command_line(ppo.Config, ppo.main, ppo.__doc__)

    run()
    assert (tmp_path / "out/eval.json").exists()
    captured = capsys.readouterr()
    assert captured.out == "" and "ppo" not in captured.err
    with pytest.raises(SystemExit):
        run()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("ppo.py: --out")


@pytest.mark.parametrize("name", STAGES)
def test_help_has_a_line_a_flag_in_the_order_of_the_config(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    stage = STAGES[name]
    with pytest.raises(SystemExit) as end:
        common.command_line(stage.Config, stage.main, stage.__doc__)
    text = capsys.readouterr().out
    assert end.value.code == 0 and stage.__doc__.strip().splitlines()[0] in text
    lines = [line for line in text.splitlines() if line.startswith("  --")]
    assert [re.match(r"  --(\w+)", line)[1] for line in lines] == list(vars(stage.Config()))
    assert all(len(line) <= 110 for line in lines)
    wordless = [line for line in lines if len(line.split("  ")[-1]) < 5]
    assert not wordless  # each has its meaning beside it
    (lr,) = [line for line in lines if line.startswith("  --lr ")]
    assert f"(default: {stage.Config().lr})" in lr


def test_hyphens_do_as_well_as_underscores():
    command = [sys.executable, str(ROOT / "sft.py"), "--batch-size", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "--batch_size 0" in done.stderr


@pytest.mark.parametrize("kinds", [["a", 1], [["x"], "b"], [None, "a"], ["before", "after"]])
def test_any_kind_of_kind_is_summed_up(kinds):
    """A run ended in a traceback here once, with its model not saved yet."""
    own = dict(scores=torch.tensor([1.0, 2.0]), gold=torch.tensor([1.0, 0.0]), eos_rate=1.0)
    prompts = [dict(prompt="p", kind=kind) for kind in kinds]
    results = common.summarise(prompts, before=own, after=own)
    table = common.side_by_side(results, ["before", "after"])
    assert table["gold"] == ["50.0%", "50.0%"] and table["score"] == ["1.50", "1.50"]
    assert table[f"gold_{kinds[0]}"] == ["100.0%", "100.0%"]
    assert table[f"gold_{kinds[1]}"] == ["0.0%", "0.0%"]
