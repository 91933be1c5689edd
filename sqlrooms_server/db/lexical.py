"""The parts of a SQL text that are not code."""

from __future__ import annotations

# For re.VERBOSE | re.DOTALL. Its only group is the mark of a dollar-quoted string. No choice is
# repeated for each character, which would take Python two hundred bytes for each.
LITERAL_OR_COMMENT = r"""
    \b[eE]'[^'\\]*(?:\\.[^'\\]*)*'?    # escape string
    | '[^']*'?                        # string; a doubled quote is two strings side by side
    | "[^"]*"?
    | --[^\n]*
    | /\*(?:.*?\*/|.*)
    # Dollar-quoted string; a dollar behind a letter belongs to a name.
    | (?<![\w$\x80-\U0010ffff])(\$\w*\$)(?:.*?\1|.*)
    """
