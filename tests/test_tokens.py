"""The file of tokens: what it may say, whose a token is, and the command that makes them."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import io
import itertools
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from sqlrooms_server import token_command
from sqlrooms_server.access import Access
from sqlrooms_server.access.failures import WINDOW_SECONDS, Failures
from sqlrooms_server.access.roles import Names
from sqlrooms_server.access.token_file import read_token_file
from sqlrooms_server.db.policy import KINDS
from sqlrooms_server.errors import StartupError
from sqlrooms_server.settings import Settings
from sqlrooms_server.transport import HttpRequest

SECRET = "0123456789abcdef" * 4


def digest(token: str) -> str:
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the file of tokens."""

    def write(text: str) -> Path:
        path = tmp_path / "tokens.toml"
        path.write_text(text)
        return path

    return write


ENTRY = f'[tokens.ada]\nrole = "admin"\nhash = "{digest("t")}"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has no [tokens.NAME]"),
        ("[roles.r]\n", "has no [tokens.NAME]"),
        ("tokens = 1", "tokens in {path} must be tables, such as [tokens.ada]"),
        ("[tokens]\nada = 1", "tokens.ada in {path} must be a table"),
        ("[tokens.ada]\nrole = 'admin'", "tokens.ada.hash in {path} must be sha256: and 64"),
        ("[tokens.ada]\nhash = 'secret'", "tokens.ada.hash in {path} must be sha256: and 64"),
        (f"[tokens.ada]\nhash = '{digest('t')}'", "tokens.ada.role in {path} is missing"),
        (ENTRY.replace("admin", "adm"), "names the role 'adm', which is none of admin."),
        (ENTRY + "expire = 1", "tokens.ada.expire in {path} is no known key"),
        (ENTRY + "expires = '2030-01-31'", "must be a date such as 2030-01-31, without quotes"),
        (ENTRY + "[rolls.r]", "rolls in {path} is no known key"),
        (ENTRY + "[roles.r]\nreadonly = true", "roles.r.readonly in {path} is no known key"),
        (ENTRY + "[roles.r]\nread_only = 1", "roles.r.read_only in {path} must be true or false"),
        (ENTRY + "[roles.r]\nfiles = 'no'", "roles.r.files in {path} must be true or false"),
        (ENTRY + "[roles.r]\nread_rooms = '*'", "read_rooms in {path} must be a list of texts"),
        (ENTRY + "[roles.r]\nread_rooms = [1]", "read_rooms in {path} must be a list of texts"),
        (ENTRY + "[roles.r]\nquery_timeout = -1", "must be a whole number, or 0 for no limit"),
        (ENTRY + "[roles.r]\nquery_timeout = true", "must be a whole number, or 0 for no limit"),
        (ENTRY + "[roles.r]\nstatements = ['selec']", "has 'SELEC', which is none of ALTER, "),
        (ENTRY + "[roles.admin]", "stands for the one who may do everything"),
        (ENTRY + '[roles."a\\u0007"]', "must be a name of 1 to 255 characters"),
        ("[jwt]", "needs one of secret_file, public_key_file and jwks_file"),
        ("[jwt]\nsecret_file = 'none'", "Cannot read the secret_file"),
        ("[proxy]", "proxy.user_header in {path} is missing"),
        ("[proxy]\nuser_header = 'x-user'", "proxy.role in {path} is missing"),
        ("[proxy]\nuser_header = 'x-user'\nrole = 'r'", "names the role 'r'"),
        ("[[tokens]]", "must be tables"),
        ("=", "is not valid TOML"),
        ("a = " + 5000 * "1", "is not valid TOML"),
        ("a = " + 100_000 * "[", "is not valid TOML"),
        ("#" * (17 << 20), "has more than 16777216 bytes"),
    ],
    # Not the texts, some of which are long.
    ids=itertools.count(),
)
def test_mistakes_are_named(write: Callable[[str], Path], text: str, problem: str) -> None:
    path = write(text)
    with pytest.raises(StartupError) as raised:
        read_token_file(path)
    assert problem.format(path=path) in str(raised.value)


def test_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StartupError, match="is no regular file"):
        read_token_file(tmp_path / "pipe")


def test_a_role_allows_what_it_names_and_otherwise_reads(write: Callable[[str], Path]) -> None:
    path = write(
        ENTRY
        + """
        [roles.reader]

        [roles.editor]
        read_only = false
        files = true
        extensions = true
        schemas = ["Main", "shop"]
        statements = ["select", "merge into"]
        read_channels = ["news/*"]
        write_rooms = ["{user}-*"]
        max_result_rows = 10
        query_timeout = 20
        request_rate = 30
        """
    )
    roles = read_token_file(path).roles
    reader, editor = roles["reader"], roles["editor"]
    assert reader.sql.read_only and not reader.sql.files and not reader.sql.extensions
    for names in (reader.read_channels, reader.write_channels, reader.read_rooms):
        assert "a" not in names
    assert not editor.sql.read_only and editor.sql.files and editor.sql.extensions
    assert editor.sql.schemas == frozenset({"main", "shop"})
    assert editor.sql.kinds == frozenset({"SELECT", "MERGE_INTO"})
    assert "news/today" in editor.read_channels and "new" not in editor.read_channels
    assert "ada-1" in editor.of("ada").write_rooms and "bob-1" not in editor.of("ada").write_rooms
    assert (editor.max_result_rows, editor.query_timeout, editor.request_rate) == (10, 20, 30)


@pytest.mark.parametrize(
    ("patterns", "user", "inside", "outside"),
    [
        (["*"], "", ["", "a", "a\nb"], []),
        ([], "", [], ["", "a"]),
        (["a.c"], "", ["a.c"], ["abc", "a.cd", "xa.c"]),
        (["a*z"], "", ["az", "a\n*z"], ["a", "azz!"]),
        (["a", "b*"], "", ["a", "bc"], ["ab", "c"]),
        # A user cannot choose a name that is a pattern.
        (["in/{user}"], "*", ["in/*"], ["in/ada"]),
        (["in/{user}"], "a|.*", ["in/a|.*"], ["in/a", "x"]),
        (["{user}/{user}/*"], "a", ["a/a/b"], ["a/b/a"]),
    ],
)
def test_names(patterns: list[str], user: str, inside: list[str], outside: list[str]) -> None:
    names = Names(patterns).of(user)
    assert all(name in names for name in inside)
    assert not any(name in names for name in outside)


def test_kinds_of_statements_are_those_of_duckdb() -> None:
    internal = {"INVALID", "LOGICAL_PLAN", "MULTI", "RELATION", "EXTENSION", "CREATE_FUNC"}
    assert KINDS == duckdb.StatementType.__members__.keys() - internal


def access(path: Path, **settings: Any) -> Access:
    return Access(Settings(tokens=str(path), **settings))


def test_each_token_is_somebody(write: Callable[[str], Path]) -> None:
    later = datetime.date.today() + datetime.timedelta(days=2)
    path = write(
        f"""
        [roles.reader]
        [tokens.ada]
        role = "admin"
        hash = "{digest("a")}"
        [tokens.laptop]
        role = "reader"
        user = "bob"
        hash = "{digest("b")}"
        expires = {later}
        [tokens.old]
        role = "reader"
        hash = "{digest("c")}"
        expires = 2020-01-01T00:00:00+02:00
        """
    )
    found = access(path, auth_token="shared")
    known = {token: found.identify(token) for token in ("a", "b", "c", "d", "", "shared")}
    named = {token: (one.user, one.role.name) for token, one in known.items() if one is not None}
    assert named == {"a": ("ada", "admin"), "b": ("bob", "reader"), "shared": ("", "admin")}
    assert known["b"] is not None and known["b"].expires_at is not None
    assert "b" not in path.read_text().split('"')


def claims(**more: Any) -> dict[str, Any]:
    return {"sub": "eve", "role": "reader", "exp": time.time() + 60, **more}


def test_signed_tokens_with_a_secret(write: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    path = write('[roles.reader]\n[jwt]\nsecret_file = "secret"\nissuer = "me"\naudience = "db"\n')
    found = access(path)
    right = claims(iss="me", aud="db")

    def identify(fields: dict[str, Any], key: str = SECRET, **options: Any) -> Any:
        return found.identify(jwt.encode(fields, key, **options))

    known = identify(right)
    assert (known.user, known.role.name) == ("eve", "reader")
    assert known.expires_at == pytest.approx(right["exp"], abs=60)
    wrong: list[dict[str, Any]] = [
        {"exp": time.time() - 60},
        {"iss": "you"},
        {"aud": "other"},
        {"sub": ""},
        {"sub": 5},
        # Others see it, and must be able to.
        {"sub": "\ud800"},
        {"sub": "\x1b[31m"},
        {"sub": "x" * 256},
        {"role": "writer"},
        {"role": ["reader"]},
        {"nbf": time.time() + 90},
    ]
    assert [fields for fields in wrong if _encodes(identify, {**right, **fields})] == []
    for name in ("exp", "iss", "aud", "sub", "role"):
        assert identify({key: value for key, value in right.items() if key != name}) is None
    assert identify(right, SECRET.upper()) is None
    assert identify(right, SECRET * 2, algorithm="HS512") is None
    header, payload, signature = jwt.encode(right, SECRET).split(".")
    for forged in (f"{header}.{payload}.", f"{header}.{payload}.x", "..", f"{payload}.{header}.s"):
        assert found.identify(forged) is None
    unsigned = base64.urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    assert found.identify(f"{unsigned}.{payload}.") is None
    assert found.identify(f"{unsigned}.{payload}.{signature}") is None
    for value in ("[" * 9000, '{"alg":"HS256","kid":[]}', '{"alg":{}}', "1e999", "5"):
        deep = base64.urlsafe_b64encode(value.encode()).decode().rstrip("=")
        assert found.identify(f"{deep}.{payload}.{signature}") is None
    endless = identify({**right, "exp": 10**300})
    assert endless is None or endless.expires_at < 1e12


def _encodes(identify: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> bool:
    try:
        return identify(fields) is not None
    except TypeError:
        # The library does not sign what is not a token.
        return False


@pytest.fixture(scope="module")
def keys() -> list[rsa.RSAPrivateKey]:
    return [rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2)]


def test_signed_tokens_with_a_public_key(
    write: Callable[[str], Path], tmp_path: Path, keys: list[rsa.RSAPrivateKey]
) -> None:
    public = keys[0].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(public)
    found = access(
        write('[roles.reader]\n[jwt]\npublic_key_file = "key.pem"\nuser_claim = "email"\n')
    )
    fields = claims(email="eve@example.com")
    known = found.identify(jwt.encode(fields, keys[0], algorithm="RS256"))
    assert known is not None and known.user == "eve@example.com"
    assert found.identify(jwt.encode(fields, keys[1], algorithm="RS256")) is None
    # The public key as the secret of another algorithm, which the library refuses to sign.
    head, body = (
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
        for part in ({"alg": "HS256", "typ": "JWT"}, fields)
    )
    signature = hmac.new(public, head + b"." + body, "sha256").digest()
    forged = b".".join([head, body, base64.urlsafe_b64encode(signature).rstrip(b"=")])
    assert found.identify(forged.decode()) is None


def test_signed_tokens_with_a_key_set(
    write: Callable[[str], Path], tmp_path: Path, keys: list[rsa.RSAPrivateKey]
) -> None:
    encode = jwt.algorithms.RSAAlgorithm.to_jwk
    entries = [
        {**json.loads(encode(key.public_key())), "kid": f"k{number}", "use": "sig"}
        for number, key in enumerate(keys)
    ]
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": entries}))
    found = access(write('[roles.reader]\n[jwt]\njwks_file = "jwks.json"\nrole = "reader"\n'))
    for number, key in enumerate(keys):
        for name, right in ((f"k{number}", True), (f"k{1 - number}", False), ("k2", False)):
            token = jwt.encode(claims(), key, algorithm="RS256", headers={"kid": name})
            assert (found.identify(token) is not None) is right
        assert found.identify(jwt.encode(claims(), key, algorithm="RS256")) is None


@pytest.mark.parametrize(
    ("kind", "content", "problem"),
    [
        ("secret_file", "short", "has 5 bytes; a secret needs at least 32"),
        ("secret_file", "-----BEGIN PUBLIC KEY-----\n" + SECRET, "holds a key as PEM"),
        ("public_key_file", "no key", "holds no public RSA key"),
        ("jwks_file", "no json", "holds no public RSA key"),
        ("jwks_file", '{"keys": []}', "holds no public RSA key"),
        ("jwks_file", "[]", "holds no public RSA key"),
    ],
)
def test_keys_that_are_none(
    write: Callable[[str], Path], tmp_path: Path, kind: str, content: str, problem: str
) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(StartupError, match=problem):
        read_token_file(write(f'[jwt]\n{kind} = "key"\n'))


def test_keys_that_check_no_signatures(
    write: Callable[[str], Path], tmp_path: Path, keys: list[rsa.RSAPrivateKey]
) -> None:
    private = keys[0].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # Made by openssl: the library warns of keys so small.
    small = """-----BEGIN PUBLIC KEY-----
MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQC3j8UKptUZ/l2i4kKmCH1JPP95
IwL7LleaMdEr1p32cbxt3OsJgu/RDHem7xvu7Jjo6a9X1o4YHGipyaGC14lpsdGI
qrnPODUr0PC0s1qEPBG7KugyJ3L84NpbmBz8/uTGx5SyHBXca+XK6DxWQZ1rsAX2
/CPbZM1oZeZH/5/r0wIDAQAB
-----END PUBLIC KEY-----
"""
    entry = {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(keys[0])), "kid": "k"}
    for kind, content, problem in (
        ("public_key_file", private.decode(), "it is a private key"),
        ("jwks_file", json.dumps({"keys": [entry]}), "it is a private key"),
        ("public_key_file", small, "it has 1024 bits"),
    ):
        (tmp_path / "key").write_text(content)
        with pytest.raises(StartupError, match=problem):
            read_token_file(write(f'[jwt]\n{kind} = "key"\n'))


@pytest.mark.parametrize(
    ("change", "holds"),
    [
        (("# other", "# another"), True),
        (("[roles.other]", "[roles.third]"), True),
        (('role = "reader"', 'role = "other"'), False),
        (('audience = "db"', 'audience = "other"'), False),
        (('user_claim = "sub"', 'user_claim = "email"'), False),
        ((None, 0), False),
        ((None, 1), True),
    ],
)
def test_rules_that_change_hold_for_those_who_are_there(
    write: Callable[[str], Path],
    tmp_path: Path,
    keys: list[rsa.RSAPrivateKey],
    change: tuple[Any, Any],
    holds: bool,
) -> None:
    """A key that was stolen is good for no connection any more when it is taken out."""
    encode = jwt.algorithms.RSAAlgorithm.to_jwk
    entries = [
        {**json.loads(encode(key.public_key())), "kid": f"k{number}"}
        for number, key in enumerate(keys)
    ]
    text = """# other
        [roles.reader]
        [roles.other]
        [jwt]
        jwks_file = "jwks.json"
        role = "reader"
        audience = "db"
        user_claim = "sub"
        """
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": entries}))
    found = access(write(text))
    fields = {"sub": "eve", "exp": time.time() + 60, "aud": "db"}
    before = found.identify(jwt.encode(fields, keys[0], algorithm="RS256", headers={"kid": "k0"}))
    assert before is not None and before.role.name == "reader"
    old, new = change
    if isinstance(new, int):
        del entries[new]
        (tmp_path / "jwks.json").write_text(json.dumps({"keys": entries}))
    else:
        write(text.replace(old, new))
    found.use(found.read_again())
    after = found.renewed(before)
    assert after is not None and (after.role == before.role) is holds


def test_users_of_a_trusted_proxy(write: Callable[[str], Path]) -> None:
    path = write(
        '[roles.reader]\n[proxy]\nuser_header = "X-User"\nrole_header = "X-Role"\nrole = "reader"\n'
    )
    found = access(path)

    def user(headers: dict[str, str], is_from_proxy: bool = True) -> tuple[str, str] | None:
        request = HttpRequest("GET", "/", "", headers, "10.0.0.1", is_from_proxy=is_from_proxy)
        identity = found.of_proxy(request)
        return None if identity is None else (identity.user, identity.role.name)

    assert found.proxy_headers == ("x-user", "x-role")
    assert user({"x-user": "ada"}) == ("ada", "reader")
    assert user({"x-user": "ada", "x-role": "admin"}) == ("ada", "admin")
    assert user({"x-user": "ada", "x-role": "unknown"}) is None
    assert user({"x-user": " "}) is None
    assert user({}) is None
    assert user({"x-user": "ada"}, False) is None

    request = HttpRequest("GET", "/", "", {"x-user": "ada"}, "10.0.0.1", is_from_proxy=True)
    before = found.of_proxy(request)
    assert before is not None and found.renewed(before) == before
    path.write_text(path.read_text().replace('role = "reader"', 'role = "admin"'))
    found.use(found.read_again())
    after = found.renewed(before)
    assert after is not None and after.role.name == ""


def test_failures_are_counted_by_address() -> None:
    now = 0.0
    failures = Failures(3, lambda: now)
    failures.remember("10.0.0.1", "right")
    for address in ("10.0.0.1", "2001:db8::1", "2001:db8::2:1", "2001:db8::3:1"):
        for _ in range(3 if ":" not in address else 1):
            assert not failures.wait(address, "t")
            failures.count(address)
    assert failures.wait("10.0.0.1", "t") == WINDOW_SECONDS + 1
    assert failures.wait("2001:db8::4", "t") > 0
    assert not failures.wait("2001:db9::4", "t")
    assert not failures.wait("10.0.0.2", "t")
    # Those who share the address and were right before go on.
    assert not failures.wait("10.0.0.1", "right")
    assert failures.wait("10.0.0.2", "right") == 0
    failures.forget_known()
    assert failures.wait("10.0.0.1", "right")
    now = WINDOW_SECONDS
    assert not failures.wait("10.0.0.1", "t")
    failures.count("10.0.0.1")
    assert not failures.wait("10.0.0.1", "t")


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = token_command.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_new_tokens_are_added_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens.toml"
    status, first, told = run(capsys, "new", 'a "😀"', "--tokens", str(path))
    assert status == 0 and "SIGHUP" in told
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# by hand\n[roles.reader]\n" + path.read_text())
    path.chmod(0o640)
    if os.geteuid() == 0:
        # Of the user of a server, for whom an administrator makes tokens.
        os.chown(path, 65534, 65534)
    owner = path.stat().st_uid
    before = path.read_text()
    _, second, _ = run(
        capsys, "new", "bob", "--role", "reader", "--expires", "30d", "--tokens", str(path)
    )
    assert path.read_text().startswith(before.rstrip())
    assert stat.S_IMODE(path.stat().st_mode) == 0o640 and path.stat().st_uid == owner
    found = access(path)
    one, other = found.identify(first.strip()), found.identify(second.strip())
    assert one is not None and (one.user, one.role.name) == ('a "😀"', "admin")
    assert other is not None and (other.user, other.role.name) == ("bob", "reader")
    assert other.expires_at is not None and 28 < (other.expires_at - time.time()) / 86400 < 31
    assert first.strip() not in path.read_text()

    monkeypatch.setattr(sys, "stdin", io.StringIO(second))
    status, told, _ = run(capsys, "check", "--tokens", str(path))
    assert status == 0 and "bob" in told and "reader" in told
    assert "sql             reads; nothing outside of the database" in told
    monkeypatch.setattr(sys, "stdin", io.StringIO("wrong\n"))
    status, _, told = run(capsys, "check", "--tokens", str(path))
    assert (status, told) == (1, "This token is not right, or has expired.\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    status, told, _ = run(capsys, "check", "--tokens", str(path))
    assert status == 0 and "token  bob: role reader, until" in told
    assert sorted(one.name for one in tmp_path.iterdir()) == ["tokens.toml"]


@pytest.mark.parametrize(
    ("name", "role", "problem"),
    [
        ("ada", "admin", "ada"),
        ("eve", "unknown", "names the role 'unknown'"),
        ("", "admin", "NAME must be a name"),
        ("eve\n", "admin", "NAME must be a name"),
        ("eve", "\udcff", "--role must be a name"),
    ],
)
def test_a_mistake_leaves_the_file_as_it_was(
    write: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    name: str,
    role: str,
    problem: str,
) -> None:
    path = write(ENTRY)
    status, out, told = run(capsys, "new", name, "--role", role, "--tokens", str(path))
    assert (status, out) == (2, "")
    assert problem in told
    assert path.read_text() == ENTRY
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_tokens_made_at_the_same_time_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    names = [f"user{number}" for number in range(8)]
    with ThreadPoolExecutor(len(names)) as pool:
        commands = (["new", name, "--tokens", str(path)] for name in names)
        assert list(pool.map(token_command.main, commands)) == [0] * len(names)
    assert {one.user for one in read_token_file(path).tokens} == set(names)


def test_without_a_file_the_entry_is_printed(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "sqlrooms_server", "token", "new", "ada"],
        capture_output=True,
        text=True,
        check=True,
    )
    token, _, entry = made.stdout.partition("\n\n")
    path = tmp_path / "t"
    path.write_text(entry)
    found = access(path).identify(token)
    assert found is not None and found.user == "ada"
