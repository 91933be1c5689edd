"""``sqlrooms-server token``: makes tokens, and says what a token is good for."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import getpass
import json
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from sqlrooms_server.access import Access
from sqlrooms_server.access.key_files import digest_of, read_key_file
from sqlrooms_server.access.roles import Identity, is_user_name
from sqlrooms_server.access.token_file import HASH_PREFIX, TokenFile, read_token_file
from sqlrooms_server.db.policy import Policy
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings

# So that programs which look for secrets in repositories recognise them.
TOKEN_PREFIX = "sqlrooms_"
# More than anybody can guess, so that one round of SHA-256 protects them well enough.
_TOKEN_BYTES = 32

_DAYS = re.compile(r"(\d{1,5})d")


def main(arguments: Sequence[str]) -> int:
    """Run the command; 0 when all is well, 1 when a token is not right, 2 for other mistakes."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except StartupError as error:
        print(f"sqlrooms-server: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sqlrooms-server token",
        description="Makes tokens for the file that --tokens names, and checks them.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    new = commands.add_parser(
        "new",
        allow_abbrev=False,
        help="make a token",
        description="Prints a new token, once: only its hash is kept. Without --tokens, what "
        "belongs into the file is printed, too.",
    )
    new.add_argument("name", metavar="NAME", help="whose token it is")
    new.add_argument("--role", default="admin", help="role in the file, or admin (the default)")
    new.add_argument(
        "--expires", metavar="WHEN", type=_expiry, help="a date, 2030-01-31, or a time, 90d"
    )
    new.add_argument("--tokens", metavar="FILE", type=Path, help="file to add it to")
    new.set_defaults(run=_new)
    check = commands.add_parser(
        "check",
        allow_abbrev=False,
        help="check the file, and a token",
        description="Reads a token from standard input, and prints whose it is and what it may "
        "do. Without a token, only the file is checked and listed.",
    )
    check.add_argument("--tokens", metavar="FILE", type=Path, required=True, help="file of tokens")
    check.set_defaults(run=_check)
    return parser


def _expiry(text: str) -> datetime.date:
    match = _DAYS.fullmatch(text)
    if match:
        now = datetime.datetime.now(datetime.timezone.utc)
        return (now + datetime.timedelta(days=int(match[1]))).date()
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        problem = "must be a date such as 2030-01-31, or a number of days such as 90d"
        raise argparse.ArgumentTypeError(problem) from None


def _new(options: argparse.Namespace) -> int:
    for what, name in (("NAME", options.name), ("--role", options.role)):
        if not is_user_name(name):
            raise StartupError(f"{what} must be a name of 1 to 255 characters, none for control.")
    token = TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES)
    entry = _entry(options.name, options.role, options.expires, token)
    path: Path | None = options.tokens
    if path is None:
        print(f"{token}\n\n{entry}", end="")
        return 0
    _add(path, entry)
    print(token)
    print(
        f"Added [tokens.{_quoted(options.name)}] to {path}. A server that runs reads it again "
        "on SIGHUP.",
        file=sys.stderr,
    )
    return 0


def _entry(name: str, role: str, expires: datetime.date | None, token: str) -> str:
    digest = digest_of(token).hex()
    lines = [
        f"[tokens.{_quoted(name)}]",
        f"role = {_quoted(role)}",
        f'hash = "{HASH_PREFIX}{digest}"',
    ]
    if expires is not None:
        lines.append(f"expires = {expires.isoformat()}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """``text`` as a string of JSON, which is one of TOML, too, without surrogates."""
    return json.dumps(text, ensure_ascii=False)


def _add(path: Path, entry: str) -> None:
    """Add ``entry`` to the file ``path``, which is as it was when that is not right."""
    place = path.resolve()
    try:
        with _alone_in(place.parent):
            before = read_key_file(path, "token file").rstrip() if path.exists() else b""
            _replace(path, place, b"\n\n".join(filter(None, (before, entry.encode()))))
    except OSError as error:
        raise StartupError(f"Cannot write the token file {path}: {error.strerror}.") from error


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Let other commands wait, or one would overwrite what another one adds."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, place: Path, data: bytes) -> None:
    """Make ``data`` the contents of ``place``, which ``path`` leads to, if they are right."""
    # Created readable for its owner only. Relative paths in it count from its directory.
    descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            read_token_file(Path(name))
        except StartupError as error:
            raise StartupError(str(error).replace(name, str(path))) from error
        if place.exists():
            known, made = place.stat(), os.stat(name)
            if (known.st_uid, known.st_gid) != (made.st_uid, made.st_gid):
                # The server must be able to read it again, whoever calls this.
                os.chown(name, known.st_uid, known.st_gid)
            os.chmod(name, known.st_mode & 0o777)
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise


def _check(options: argparse.Namespace) -> int:
    file = read_token_file(options.tokens)
    token = _asked_token()
    if not token:
        print(_summary(file))
        return 0
    identity = Access(Settings(tokens=str(options.tokens))).identify(token)
    if identity is None:
        print("This token is not right, or has expired.", file=sys.stderr)
        return 1
    print(_about(identity))
    return 0


def _asked_token() -> str:
    if sys.stdin.isatty():
        return getpass.getpass("Token (empty to list the file): ")
    return sys.stdin.readline().strip()


def _summary(file: TokenFile) -> str:
    lines = [f"role   {name}" for name in sorted(file.roles)]
    lines += [
        f"token  {entry.user}: role {entry.role.name}{_until(entry.expires_at)}"
        for entry in file.tokens
    ]
    if file.signed is not None:
        lines.append(f"jwt    {file.signed.algorithm}")
    if file.proxy is not None:
        lines.append(f"proxy  users in the header {file.proxy.user_header}")
    return "\n".join(lines)


def _about(identity: Identity) -> str:
    role = identity.role
    lines = [
        f"user            {identity.user}{_until(identity.expires_at)}",
        f"role            {role.name}",
        f"sql             {_rules(role.sql)}",
        f"queries         {'all, within that' if role.queries is None else role.queries}",
        f"read_channels   {role.read_channels}",
        f"write_channels  {role.write_channels}",
        f"read_rooms      {role.read_rooms}",
        f"write_rooms     {role.write_rooms}",
    ]
    numbers = ("max_result_rows", "query_timeout", "request_rate")
    lines += [f"{name:15} {getattr(role, name)}" for name in numbers if getattr(role, name)]
    return "\n".join(lines)


def _rules(policy: Policy) -> str:
    rules = [
        "reads" if policy.read_only else "reads and changes",
        "files and network" if policy.files else "nothing outside of the database",
    ]
    if policy.extensions:
        rules.append("extensions")
    for what, names in (("schemas", policy.schemas), ("statements", policy.kinds)):
        if names is not None:
            rules.append(f"{what} {', '.join(sorted(names)) or 'none'}")
    return "; ".join(rules)


def _until(expires_at: float | None) -> str:
    if expires_at is None:
        return ""
    moment = datetime.datetime.fromtimestamp(expires_at, datetime.timezone.utc)
    return f", until {moment:%Y-%m-%d %H:%M} UTC"
