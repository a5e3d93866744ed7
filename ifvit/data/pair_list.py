"""A list of pairs to compare: a CSV file whose columns a and b hold paths."""

import csv
import io
import os
from typing import NamedTuple

from ifvit.errors import UserError
from ifvit.files import read_text
from ifvit.paths import from_home


class Row(NamedTuple):
    """A pair as it stands in the file; '' for a path that is missing."""

    line: int
    a: str
    b: str


def read(path: str) -> list[Row]:
    """The pairs of a file, whose first line names the columns, in any order and beside others.

    A program for tables may have written semicolons or tabs for commas.

    UserError where the file is missing, no text, without these columns, or without a pair.
    """
    text = read_text(path, "The list of pairs")
    head = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=next((sign for sign in ",;\t" if sign in head), ","))
    try:
        names = [name.strip() for name in next(rows, [])]
        if "a" not in names or "b" not in names:
            raise UserError(f"{path} is no list of pairs, its first line does not name a,b; give a CSV file that does.")
        columns = names.index("a"), names.index("b")
        found = [
            Row(rows.line_num, *(row[c].strip() if c < len(row) else "" for c in columns)) for row in rows if any(row)
        ]
    except csv.Error as e:
        raise UserError(f"{path} is no list of pairs, line {rows.line_num} cannot be read ({e}); mend it.") from None
    if not found:
        raise UserError(f"{path} holds no pair; give a line for each, with the paths of its two prints.")
    return found


def beside(path: str, name: str) -> str:
    """A print's path in the list at `path`: from the list's own folder, unless it is absolute or begins at a home."""
    return os.path.join(os.path.dirname(path), from_home(name))
