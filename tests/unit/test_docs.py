"""What the documents promise about files and configs is so."""

import re
from pathlib import Path

import msgspec
import pytest

from pmblk.representations import KINDS, parse_options

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md")])


def test_the_configuration_page_is_the_full_config() -> None:
    assert (ROOT / "configs/full.toml").read_text() in (ROOT / "docs/configuration.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith("http"):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_a_section_lead_to_one(document: Path) -> None:
    for name, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", document.read_text()):
        linked = document.parent / name if name else document
        assert anchor in anchors(linked), f"{name}#{anchor}"


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them. What is in a block of code is none."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}


def test_decisions_are_numbered_one_after_the_other() -> None:
    decisions = sorted(ROOT.glob("docs/decisions/*.md"))
    for number, decision in enumerate(decisions, start=1):
        assert decision.name.startswith(f"{number:04}-")
        assert decision.read_text().startswith(f"# {number}. ")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    for name in re.findall(
        r"`((?:pmblkd?|configs|systemd|tests|bench)/[\w./-]+)`", document.read_text()
    ):
        candidates = [ROOT / name, ROOT / "backends" / name, ROOT / "daemon" / name]
        assert any(candidate.exists() for candidate in candidates), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_document_has_a_place_that_waits_for_a_figure(document: Path) -> None:
    assert re.findall(r"^[A-Z]{4,}$|\bMACHINE\b|\bTODO\b", document.read_text(), re.M) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_of_a_representation_is_in_the_reference_with_its_default(kind: str) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for name, default in msgspec.to_builtins(parse_options(kind)).items():
        shown = f'"{default}"' if isinstance(default, str) else str(default)
        assert f"`{name}` | `{shown}` |" in text, name
