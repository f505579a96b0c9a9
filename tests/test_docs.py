"""The pages for people: nothing that they should name is forgotten, and no link leads nowhere."""

import re
from pathlib import Path

import pytest

from hsmsign.routes.sign import OLD_PATHS
from signers.registry import SIGNERS
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def anchors(page: Path) -> set[str]:
    """What may stand behind `#`, as GitHub and GitLab make it of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_has_every_signer_and_its_page() -> None:
    text = (ROOT / "README.md").read_text()
    rows = set(re.findall(r"^\| ([a-z-]+) \| `POST (/sign/[a-z/-]+)` \|", text, re.MULTILINE))
    assert rows == {(signer.name, signer.path) for signer in SIGNERS}
    linked = {ROOT / link for link in re.findall(r"\((docs/signers/[a-z]+\.md)\)", text)}
    assert linked == set(ROOT.glob("docs/signers/*.md"))


def test_every_endpoint_to_sign_is_on_the_page_of_the_api_and_on_one_of_a_signer() -> None:
    api = (ROOT / "docs/api.md").read_text()
    pages = "".join(page.read_text() for page in ROOT.glob("docs/signers/*.md"))
    for path in (*(signer.path for signer in SIGNERS), *OLD_PATHS.values()):
        told = re.compile(rf"`(POST )?{path}`")
        assert told.search(api), path
        assert told.search(pages), path
