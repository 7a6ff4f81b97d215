"""The shipped plans: each compiled, each fitting, and the docs' table as the figures are."""

import pytest

from benchmarks.plans import CASES, PAGES, held, main, recorded, shipped_rows
from parallel.chips import parse_topology

SHIPPED = [name for name, case in CASES.items() if case.shipped]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_plan_was_compiled_and_fits(name):
    assert held(name) <= parse_topology(CASES[name].topology).chip.hbm_bytes
    page = (PAGES / f"{name}.txt").read_text()
    said = ("\nfits: ", "by the compiler's account", "Compiled (libtpu", "predicted, not measured")
    assert [words for words in said if words not in page] == []


def test_every_record_is_of_a_case():
    assert set(recorded()) <= set(CASES)
    assert len(recorded()) >= 20


def test_the_docs_table_is_of_these_figures(capsys):
    main(["--rows"])
    rows, text = shipped_rows(), (PAGES.parent / "planning.md").read_text()
    assert capsys.readouterr().out.splitlines() == rows
    assert len(rows) == len(SHIPPED)
    assert [row for row in rows if row not in text] == []


def test_no_such_plan():
    with pytest.raises(ValueError, match="no plan 'bloom-1t'"):
        main(["bloom-1t"])
