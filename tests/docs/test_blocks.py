"""The harness of the documentation finds blocks, believes no mark without a reason, and finds what is wrong unrun."""

import pytest

from tests.docs import checks, shortened
from tests.docs.blocks import Block, pages, read_blocks

PAGE = """
```python
x = 1
```

<!-- not run: needs a TPU pod -->
```bash
python -m train --gin_file=quickstart.gin
```

```text
python -m anything
```

- in a list:

  ```json
  {"a": 1}
  ```
"""


def test_blocks_are_found_with_their_marks():
    found = [(block.language, block.line, block.not_run) for block in read_blocks("page.md", PAGE)]
    assert found == [("python", 3, None), ("bash", 8, "needs a TPU pod"), ("json", 18, None)]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```rust\nfn main() {}\n```\n", "page.md:1: 'rust' is none of"),
        ("```\npython -m train\n```\n", "commands without a language"),
        ("<!-- not run -->\n```bash\nls\n```\n", "page.md:1: write it as"),
        ("<!-- not run: because -->\n\nA paragraph.\n", "has to stand directly before"),
    ],
)
def test_what_says_too_little_is_refused(text, error):
    with pytest.raises(ValueError, match=error):
        read_blocks("page.md", text)


@pytest.mark.parametrize(
    ("language", "text", "wrong"),
    [
        ("bash", "python -m train --gin_file=quickstart.gin --gin_param='train.num_steps=2'", ""),
        ("bash", "for i in 1 2; do", "syntax error"),
        ("bash", "python -m train --gin_flie=quickstart.gin", "python -m train has no --gin_flie"),
        ("bash", "python -m train --gin_file=nowhere.gin", "there is no nowhere.gin"),
        ("bash", "python -m train --gin_param='train.steps=2'", "gin knows no train.steps"),
        ("bash", "python -m inference classify --checkpoint x --file y --top_q 2", "has no --top_q"),
        ("bash", "python -m inference.nothing --checkpoint x", "does not answer --help"),
        ("gin", "GPTJ.n_layers = 2\n", "gin knows no GPTJ.n_layers"),
        ("python", "import modelzoo\nmodelzoo.from_hg('x')\n", "modelzoo has no from_hg"),
    ],
)
def test_what_is_wrong_is_found_without_running(language, text, wrong):
    found = checks.check(Block("page.md", 1, language, text, "a reason"))
    assert any(wrong in line for line in found) if wrong else found == []


def test_commands_are_made_short():
    args = shortened.python(["-m", "train", "--gin_file=configs/quickstart.gin"])
    assert "--gin_param=train.num_steps=2" in args
    assert "--gin_param=data.path='my/texts'" in args
    assert shortened.python(["-m", "train.data", "stdlib", "--output", "x"])[2:] == [
        "my/texts",
        "--output",
        "x",
    ]
    assert shortened.python(["docs/finetuning_data.py", "x"]) == ["docs/finetuning_data.py", "x"]


def test_pip_knows_the_extras(capsys):
    assert shortened.pip(["install", "flaxtron[tpu,data]"]) == 0
    assert shortened.pip(["install", "./flaxtron[nothing]"]) == 1
    assert "no such extra nothing" in capsys.readouterr().err


def test_every_page_can_be_read():
    assert len(pages()) > 20
    assert sum(len(read_blocks(page)) for page in pages()) > 60
