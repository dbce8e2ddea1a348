"""The document of scales has the tables that the program prints, and no others."""

from __future__ import annotations

from pathlib import Path

import scaling

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_the_document_has_the_printed_tables():
    document = DOCUMENT.read_text()
    printed = list(scaling.tables())
    assert [table.splitlines()[0] for table in printed if table not in document] == []
    lines = {line for table in printed for line in table.splitlines()}
    own = document.partition("## Where figures come from")[2].partition("\n## ")[0]
    others = [line for line in document.splitlines() if line.startswith("|") and line not in lines]
    assert [line for line in others if line not in own] == []
