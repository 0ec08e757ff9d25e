"""Links in the documents lead to files that exist, and to the lines that they name."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", *sorted(f"docs/{file.name}" for file in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_what_they_name(document):
    text = (ROOT / document).read_text()
    for words, target in re.findall(r"\[([^]]+)\]\((?!http)([^)]+)\)", text):
        path, _, place = target.partition("#")
        file = (ROOT / document).parent / path
        assert file.exists(), f"{document}: {target} does not exist"
        if number := re.fullmatch(r"L(\d+)", place):
            line = file.read_text().splitlines()[int(number[1]) - 1]
            assert words.strip("`").lower() in line, f"{document}: {target} is {line!r}"
