"""Signed tokens (JWT, RFC 7519): another program says who somebody is. Only PyJWT here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlrooms_server.access.key_files import read_key_file
from sqlrooms_server.access.roles import Identity, Role, is_user_name
from sqlrooms_server.errors import StartupError

SIGNED = "signed token"

# RFC 7518, section 3.2: a key of HS256 has at least as many bits as its hash.
_MIN_SECRET_BYTES = 32

# RFC 7518, section 3.3: keys of RS256 have at least so many.
_MIN_RSA_BITS = 2048

# Seconds by which clocks may differ.
_LEEWAY = 30

# What PyJWT stumbles over when values have other types than they should, or are nested deeply.
_MALFORMED = (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError)

# In seconds since 1970: no timer goes further.
_FOR_EVER = 1e11


@dataclass(frozen=True, slots=True)
class _Key:
    """A key to check signatures with. ``digest`` tells it from others."""

    key: Any
    digest: bytes


@dataclass(frozen=True, slots=True)
class SignedTokens:
    """What makes a signed token right. One algorithm only, whatever the token says itself.

    ``keys`` are named as tokens do in ``kid``, or None for one that has no name.
    """

    algorithm: str
    keys: Mapping[str | None, _Key] = field(repr=False)
    issuer: str | None
    audience: str | None
    user_claim: str
    role_claim: str
    default_role: Role | None
    roles: Mapping[str, Role]

    def identify(self, token: str) -> Identity | None:
        """Whom ``token`` is about; None when it is not right, or has expired."""
        import jwt

        try:
            key = self._key(jwt.get_unverified_header(token).get("kid"))
            if key is None:
                return None
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[self.algorithm],
                issuer=self.issuer,
                audience=self.audience,
                leeway=_LEEWAY,
                options={"require": ["exp"], "verify_aud": self.audience is not None},
            )
            expires_at = min(float(claims["exp"]) + _LEEWAY, _FOR_EVER)
        except (jwt.PyJWTError, *_MALFORMED):
            return None
        user = claims.get(self.user_claim)
        name = claims.get(self.role_claim)
        role = self.default_role if name is None else self._role(name)
        if not is_user_name(user) or role is None:
            return None
        return Identity(user, role.of(user), SIGNED, self._basis(key), expires_at)

    def made(self, identity: Identity) -> bool:
        """Whether ``identity`` comes from one of these keys, by these very rules."""
        return any(self._basis(key) == identity.digest for key in self.keys.values())

    def _key(self, name: Any) -> _Key | None:
        if len(self.keys) == 1 and (name is None or None in self.keys):
            # Then a token need not name it.
            return next(iter(self.keys.values()))
        return self.keys.get(name)

    def _basis(self, key: _Key) -> bytes:
        role = None if self.default_role is None else self.default_role.name
        rules = (self.issuer, self.audience, self.user_claim, self.role_claim, role)
        return hashlib.sha256(key.digest + repr(rules).encode()).digest()

    def _role(self, name: Any) -> Role | None:
        return self.roles.get(name) if isinstance(name, str) else None


def open_signed_tokens(
    kind: str,
    path: Path,
    *,
    issuer: str | None,
    audience: str | None,
    user_claim: str,
    role_claim: str,
    default_role: Role | None,
    roles: Mapping[str, Role],
) -> SignedTokens:
    """Read the key in ``path``: ``secret_file``, ``public_key_file`` or ``jwks_file``.

    Raises ``StartupError``.
    """
    try:
        import jwt
    except ImportError as error:
        raise StartupError(
            "Signed tokens ([jwt] in the token file) need the package PyJWT, which is not "
            "installed: pip install 'sqlrooms-server[jwt]'."
        ) from error
    data = read_key_file(path, kind)
    keys: dict[str | None, _Key]
    if kind == "secret_file":
        algorithm, keys = "HS256", {None: _secret(data.strip(), path)}
    else:
        algorithm = "RS256"
        try:
            keys = _key_set(data) if kind == "jwks_file" else {None: _public_key(data)}
        except (jwt.PyJWTError, *_MALFORMED) as error:
            raise StartupError(f"The {kind} {path} holds no public RSA key: {error}.") from error
    return SignedTokens(
        algorithm, keys, issuer, audience, user_claim, role_claim, default_role, roles
    )


def _secret(secret: bytes, path: Path) -> _Key:
    if len(secret) < _MIN_SECRET_BYTES:
        raise StartupError(
            f"The secret_file {path} has {len(secret)} bytes; a secret needs at least "
            f"{_MIN_SECRET_BYTES} random ones: openssl rand -hex 32."
        )
    if secret.startswith(b"-----BEGIN "):
        # What can be read by everybody is no secret, and PyJWT takes no such key.
        raise StartupError(f"The secret_file {path} holds a key as PEM; it needs random bytes.")
    return _Key(secret, hashlib.sha256(secret).digest())


def _public_key(data: bytes) -> _Key:
    from cryptography.exceptions import UnsupportedAlgorithm
    from jwt.algorithms import RSAAlgorithm

    try:
        return _rsa_key(RSAAlgorithm(RSAAlgorithm.SHA256).prepare_key(data))
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error


def _rsa_key(key: Any) -> _Key:
    """``key`` when it is good for checking signatures. Raises ``ValueError``."""
    if not hasattr(key, "verify"):
        raise ValueError("it is a private key, which belongs to the program that signs")
    if key.key_size < _MIN_RSA_BITS:
        raise ValueError(f"it has {key.key_size} bits; {_MIN_RSA_BITS} are needed")
    numbers = key.public_numbers()
    return _Key(key, hashlib.sha256(repr((numbers.n, numbers.e)).encode()).digest())


def _key_set(data: bytes) -> dict[str | None, _Key]:
    """The keys of a JSON Web Key Set (RFC 7517)."""
    import jwt

    keys = {
        key.key_id: _rsa_key(key.key)
        for key in jwt.PyJWKSet.from_dict(json.loads(data)).keys
        if key.key_type == "RSA" and key.public_key_use in (None, "sig")
    }
    if not keys:
        raise ValueError("it has no key of type RSA for signatures")
    return keys
