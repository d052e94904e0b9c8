"""The pages of docs/: their code runs from top to bottom, their links lead somewhere, and they name what exists."""

import contextlib
import io
import pathlib
import re
import shlex

import pytest

import optax_decay
from train.cli import parse
from train.commands import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
# ```python runs; ```py shows another library's code, and a block without a language is for a shell.
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
BLOCKS = {page: FENCE.findall(page.read_text("utf-8")) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    names = {}
    printed = ""
    for language, block in BLOCKS[page]:
        if language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, f"{page.name}: {block[:30]!r}", "exec"), names)
            printed = out.getvalue()
        if language == "text":
            assert block.strip() == printed.strip(), f"{page.name} shows another output"
        assert language in ("python", "py", "text", "bash", ""), f"{page.name}: {language}"


def test_pages_have_code_that_can_fail():
    assert sum(language == "python" for blocks in BLOCKS.values() for language, _ in blocks) > 15
    assert any(language == "text" for blocks in BLOCKS.values() for language, _ in blocks)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_links_between_files_lead_somewhere(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            assert re.match(r"https://arxiv\.org/abs/\d{4}\.\d{5}$", link), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.M)
            known = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}
            assert anchor in known, f"{page.name}: {link}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_every_name_of_the_library_exists(page):
    for name in re.findall(r"optax_decay\.(\w+(?:\.\w+)?)", page.read_text("utf-8")):
        value = optax_decay
        for part in name.split("."):
            assert hasattr(value, part), f"{page.name}: optax_decay.{name}"
            value = getattr(value, part)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_can_be_given(page):
    shells = [block for language, block in BLOCKS[page] if language in ("bash", "")]
    for line in "".join(shells).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        # Words in capitals, variables and processes that meet are something that only the reader has.
        if words[:3] != ["python", "-m", "train"] or re.search(r"\b[A-Z]{3,}\b|\$|--coord", line):
            continue
        if len(words) == 3 or words[3] not in COMMANDS:
            parse(words[3:])


def test_every_arxiv_number_is_one_of_a_docstring():
    """AdamW's own paper apart, to which optax leads."""
    library = "".join(path.read_text("utf-8") for path in (ROOT / "optax_decay").rglob("*.py"))
    known = set(re.findall(r"\d{4}\.\d{5}", library)) | {"1711.05101"}
    for page in [*PAGES, ROOT / "README.md"]:
        assert set(re.findall(r"\b\d{4}\.\d{5}\b", page.read_text("utf-8"))) <= known, page.name


def test_every_decay_and_optimizer_has_its_paper():
    papers = (ROOT / "docs/papers.md").read_text("utf-8")
    text = (ROOT / "optax_decay/__init__.py").read_text("utf-8")
    parts = re.split(r"^# (.+)\.$", text, flags=re.M)
    found = dict(zip(parts[1::2], parts[2::2]))
    # Helpers: parts of an optimizer, links without a paper of their own, and forms of one that is listed.
    without = {"width_scaled_learning_rate", "width_scaling", "block_adadecay", "center_rows"}
    without |= {"huber_proximal_decay", "relative_update_floor"}
    for heading, body in found.items():
        if heading.startswith(("Decays", "Links", "Optimizers")):
            for name in re.findall(r"import \w+ as (\w+)", body):
                if not name.startswith("scale_by_") and name not in without:
                    assert f"`{name}`" in papers, name
