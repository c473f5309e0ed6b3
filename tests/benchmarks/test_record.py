"""How a benchmark's record is written."""

import json
from pathlib import Path

from benchmarks.record import write


def test_a_record_is_json_with_a_row_to_a_line(tmp_path: Path) -> None:
    record = {
        "gpu": None,
        "versions": {"torch": "2.11"},
        "rows": [{"M": 1, "us": 2.5}, {"M": 8, "us": [3]}],
        "none": [],
    }
    write(path := tmp_path / "new" / "record.json", record)
    assert json.loads(path.read_text()) == record
    assert '  {"M": 8, "us": [3]}\n' in path.read_text()
    assert len(path.read_text().splitlines()) == 2 + len(record) + 3  # the rows' two, and the list's end
