"""Collects what the tests measure; with FLAXTRON_RECORD=1 a green run writes it to results.json.

Under xdist every worker sends its part to the process that started it, which alone writes.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).with_name("results.json")
_PART: dict[str, dict[str, Any]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """BloomForQuestionAnswering documents position_ids and hands it to a trunk that says it does nothing."""
    known = "ignore:`position_ids` have no functionality:FutureWarning"
    config.addinivalue_line("filterwarnings", known)


@pytest.fixture
def measured() -> Callable[..., None]:
    """`measured("GPTJModel", outputs=1e-6, configs="three heads")`: the largest number, the set of names."""

    def note(name: str, **values: float | str) -> None:
        _merge({name: {key: [v] if isinstance(v, str) else v for key, v in values.items()}})

    return note


def _merge(part: dict[str, dict[str, Any]]) -> None:
    for name, values in part.items():
        mine = _PART.setdefault(name, {})
        for key, value in values.items():
            if isinstance(value, list):
                mine[key] = sorted({*mine.get(key, ()), *value})
            else:
                mine[key] = max(mine.get(key, 0.0), value)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """A worker of xdist is done."""
    _merge(getattr(node, "workeroutput", {}).get("parity", {}))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Hands the part on, or writes the whole."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["parity"] = _PART
    elif os.environ.get("FLAXTRON_RECORD") == "1" and exitstatus == 0 and _PART:
        _write()


def _write() -> None:
    """Classes that were measured are replaced, the others stay; numbers are rounded to two digits."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, values in _PART.items():
        kept[name] = {
            key: len(value) if isinstance(value, list) else float(f"{value:.1e}")
            for key, value in sorted(values.items())
        }
    aside = RESULTS.with_suffix(".aside")
    aside.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(aside, RESULTS)
