"""The page of a run holds all that it should and needs no other file."""

import json
import re
from html.parser import HTMLParser

from train.run_page import draw, write_page

LINES = [
    {"step": step, "time": 1.7e9 + step, "loss": 3.0 / step, "grad_norm": 1.0, "grad_norm/embed": 0.5}
    for step in range(1, 5)
] + [{"step": 4, "time": 1.7e9 + 5, "eval_loss": None}]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_everything_is_in_one_file(tmp_path):
    run = tmp_path / "a<b"
    place = run / "checkpoints" / "4"
    for folder in (place / "params", place / "run"):
        folder.mkdir(parents=True)
    told = {"whole": "12ab" * 16, "batches": {"chain": "34cd" * 16}}
    (place / "run" / "run.json").write_text(json.dumps({"certificate": told}))
    (place / "commit_success.txt").write_text("")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    seconds = {"steps": 3.0, "startup": 1.0}
    (run / "goodput.json").write_text(json.dumps([{"began": 0, "first": 0, "last": 4, "seconds": seconds}]))

    page = write_page(run, {"train.seed": "0", "data.path": "'<texts>'"}).read_text()
    tags = Tags()
    tags.feed(page)
    assert [tag for tag, _ in tags.found].count("svg") == 1
    assert "a&lt;b" in page
    assert "'&lt;texts&gt;'" in page.replace("&#x27;", "'")
    assert "4 steps" in page
    assert "1 start: 75.0% in steps, 25.0% startup" in page
    assert "12ab12ab12ab12ab</td><td>34cd34cd34cd34cd" in page
    assert "<td>jax</td>" in page
    outside = [attrs for _, attrs in tags.found if attrs.get("src") or attrs.get("href", "#")[:1] != "#"]
    assert not outside, outside
    assert not re.search(r"url\((?!#)", page)


def test_curves_are_named():
    text = draw(LINES)
    assert text.startswith("<svg")
    for name in ("gradient norm", "embed", "learning rate", "tokens per second"):
        assert name in text
    assert draw([]).startswith("<svg")


def test_a_run_without_steps_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no steps yet" in write_page(tmp_path, {}).read_text()
