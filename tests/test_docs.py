"""The documents hold together: links and anchors lead somewhere, tables are whole, and files they name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "kernels").rglob("*.md"))]
HOMES = (ROOT, ROOT / "megahybrid", ROOT / "kernels" / "megahybrid_kernels", ROOT / "tests" / "kernels")


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            found = page.parent / path if path else page
            assert found.exists() and (not anchor or anchor in anchors(found)), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_have_as_many_columns_in_every_row(page):
    for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize("name", ["architecture.md", "adding-an-op.md", "adding-a-mixer.md"])
def test_files_that_are_named_exist(name):
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / name).read_text(), flags=re.DOTALL)
    named = set(re.findall(r"`(\w+/[\w/]*(?:\.py)?)`", text))
    assert len(named) > 3
    assert [each for each in sorted(named) if not any((home / each).exists() for home in HOMES)] == []
