"""`--names`: how the names of prints are to be read, where no known set's names are, or not as they are known."""

import re

from ifvit.data.names import nfc
from ifvit.errors import UserError

FIELDS = ("finger", "impression", "database", "subject")
_HELP = (
    "Write it like '{finger}/{impression}' or '{database}/{subject}_{finger}_{impression}', * for what does not matter."
)


class Pattern:
    """A pattern of paths below the root, without the extension, such as `{database}/{finger}_{impression}`.

    A field takes as little as fits, and never a `/`; a field that comes again is the same again; `*` is anything
    within a folder's or a file's name, `**/` any folders or none. What `*` takes becomes part of the impression, so
    that a session's folder makes no copies.

    Raises: UserError for an unknown field, a brace without its other one, or no finger.
    """

    def __init__(self, text: str):
        self.text = text
        expression, seen, free = "", set(), 0
        for token in re.findall(r"\{[^{}/]*\}|\*\*/|\*|[^{}*]+|[{}]", nfc(text)):
            field = token[1:-1].strip() if token[0] == "{" and token[-1] == "}" and len(token) > 1 else None
            if token in ("{", "}"):
                raise UserError(f"--names '{text}' has a {token} without its other brace. {_HELP}")
            if token in ("**/", "*") or field in ("*", ""):
                expression += rf"(?P<free{free}>(?:[^/]+/)*)" if token == "**/" else rf"(?P<free{free}>[^/]*?)"
                free += 1
            elif field is None:
                expression += re.escape(token)
            elif field not in FIELDS:
                raise UserError(
                    f"--names '{text}' has a field {{{field}}} that is not known; known are "
                    f"{', '.join('{' + f + '}' for f in FIELDS)} and *. {_HELP}"
                )
            else:
                expression += rf"(?P={field})" if field in seen else rf"(?P<{field}>[^/]+?)"
                seen.add(field)
        if "finger" not in seen:
            raise UserError(f"--names '{text}' has no {{finger}}. {_HELP}")
        if re.search(r"[}*]\{|\}\*", text):
            raise UserError(
                f"--names '{text}' has two fields with nothing between them, so where one ends is not told. {_HELP}"
            )
        self._expression = re.compile(expression)

    def fit(self, path: str) -> tuple[str, str, str, str] | None:
        """(database or '', finger, impression, subject or '') of a path below the root, without extension; None if it
        does not fit."""
        m = self._expression.fullmatch(path)
        if not m:
            return None
        said = m.groupdict()
        finger = "_".join(said[k] for k in ("subject", "finger") if said.get(k))
        free = [v.strip("/").replace("/", "_") for k, v in said.items() if k.startswith("free") and v.strip("/")]
        impression = said.get("impression")
        if impression is None and not free:
            free = [path.replace("/", "_")]
        return (
            said.get("database") or "",
            finger,
            "_".join([*free, *([impression] if impression else [])]),
            said.get("subject") or "",
        )
