"""The report in a real browser, on screens of several widths."""

import pytest

from avion.commands.make_tables import main
from tests.browser import chromium, needs_browser
from tests.reproduce.runs import accuracies, retrieval, write_run

TELEPHONE, DESK = 360, 1200
# Per table: its header's names, and where the cells under "measured" begin and end, in pixels of the window.
MEASURED = """() => [...document.querySelectorAll('table')].map(table => {
    const names = [...table.querySelectorAll('thead tr:last-child th')].map(th => th.innerText.trim());
    const column = names.indexOf('measured');
    const rows = [...table.querySelectorAll('tr')].map(tr => tr.children[column]).filter(c => c && c.innerText.trim());
    const boxes = rows.filter(c => c.colSpan == 1).map(c => {
        const range = document.createRange(); range.selectNodeContents(c); return range.getBoundingClientRect();
    });
    return column < 0 ? null : {names, left: Math.min(...boxes.map(b => b.left)),
                                right: Math.max(...boxes.map(b => b.right)), count: boxes.length};
}).filter(found => found !== null)"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with all that a table can hold: several seeds, released weights, marks, EgoSchema and the demo."""
    root = tmp_path_factory.mktemp("report")
    for seed, more in enumerate((0.0, 0.3, 0.7)):
        row = retrieval(4, 30.25, 22.35, 26.3 + more, 30.9, 27.5, 29.714 + more)
        write_run(root / f"runs/trained{seed}", "table8_row6", [row], epochs=5, seed=seed)
    row = retrieval(None, 30.2, 22.3, 26.2, 30.9, 27.5, 29.2)
    write_run(root / "runs/released", "table8_row6", [row], evaluated="released")
    write_run(root / "runs/row4", "table8_row4", [retrieval(4, 29, 22, 25.9, 30, 27, 20)], epochs=5)
    write_run(root / "runs/questions", "table10_row6", accuracies({16: 31.0, 128: 32.5}))
    write_run(root / "runs/more", "figure5_row6", accuracies({16: 31.0, 8192: 32.5}))
    write_run(root / "runs/demo", "table8_row6", [retrieval(4, 80, 82, 81.3, 70, 77, 79)], epochs=5, scale="demo")
    assert main([str(root / "runs"), "--output", str(root / "out")]) == 0
    return root / "out/tables.html"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@needs_browser
@pytest.mark.parametrize("width", [TELEPHONE, DESK])
def test_measured_is_in_sight_without_scrolling(browser, page, width):
    window = browser.new_page(viewport={"width": width, "height": 740})
    window.goto(page.as_uri())
    tables = window.evaluate(MEASURED)
    assert len(tables) == 4  # Table 8, Table 10, Fig. 5 and the demo's Table 8
    for table in tables:
        assert table["count"] > 4 and 0 <= table["left"] < table["right"] <= width, table
    assert window.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll, the page does not
    window.close()


@needs_browser
def test_the_name_of_a_row_stays_while_its_table_scrolls(browser, page):
    window = browser.new_page(viewport={"width": TELEPHONE, "height": 740})
    window.goto(page.as_uri())
    box = window.locator(".wide").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    name = window.get_by_role("cell", name="6 TimeMamba, vanilla").first
    before = name.bounding_box()
    box.evaluate("box => { box.scrollLeft = 1000 }")
    assert box.evaluate("box => box.scrollLeft") > 20 and name.bounding_box() == before
    last = box.locator("tr").filter(has_text="3 (seeds 0, 1, 2)").first.locator("td").last
    assert last.inner_text() == "3 (seeds 0, 1, 2)"
    assert last.bounding_box()["x"] + last.bounding_box()["width"] <= TELEPHONE
    window.close()


@needs_browser
def test_runs_are_counted_and_zero_is_never_alone(browser, page):
    window = browser.new_page()
    window.goto(page.as_uri())
    text = window.inner_text("body").replace("\t", " ")
    assert "1 (seed 0)" in text and "3 (seeds 0, 1, 2)" in text
    heads = {cell.strip() for cell in window.locator("thead th").all_inner_texts()}
    assert "runs" in heads and "seeds" not in heads
    window.close()
