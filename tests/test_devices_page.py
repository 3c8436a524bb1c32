"""docs/devices.md is what benchmarks/devices.py writes from its results."""

from benchmarks import devices


def test_the_page_agrees_with_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "PAGE", tmp_path / "page.md")
    page = (devices.ROOT / "docs" / "devices.md").read_text()
    results = devices.read_results()
    devices.write_page(results)
    assert (tmp_path / "page.md").read_text() == page
    names = {row.name for rows in devices.TABLES.values() for row in rows}
    assert results.keys() <= names, "results of rows that are no longer in a table"
