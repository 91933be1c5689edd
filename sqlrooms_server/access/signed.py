"""Signed tokens (JWT, RFC 7519): another program says who somebody is. Only PyJWT here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlrooms_server.access.key_files import read_key_file
from sqlrooms_server.access.roles import Identity, Role
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

# Which key a token was signed with: by its header, None when there is no such key.
_FindKey = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True)
class SignedTokens:
    """What makes a signed token right. One algorithm only, whatever the token says itself."""

    algorithm: str
    find_key: _FindKey = field(repr=False)
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
            key = self.find_key(jwt.get_unverified_header(token))
            if key is None:
                return None
            claims = jwt.decode(
                token,
                key,
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
        if not isinstance(user, str) or not user or role is None:
            return None
        return Identity(user, role.of(user), SIGNED, expires_at=expires_at)

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
    if kind == "secret_file":
        algorithm, find_key = "HS256", _secret(data.strip(), path)
    else:
        algorithm = "RS256"
        try:
            find_key = _public_key(data) if kind == "public_key_file" else _key_set(data)
        except (jwt.PyJWTError, *_MALFORMED) as error:
            raise StartupError(f"The {kind} {path} holds no public RSA key: {error}.") from error
    return SignedTokens(
        algorithm, find_key, issuer, audience, user_claim, role_claim, default_role, roles
    )


def _secret(secret: bytes, path: Path) -> _FindKey:
    if len(secret) < _MIN_SECRET_BYTES:
        raise StartupError(
            f"The secret_file {path} has {len(secret)} bytes; a secret needs at least "
            f"{_MIN_SECRET_BYTES} random ones: openssl rand -hex 32."
        )
    if secret.startswith(b"-----BEGIN "):
        # What can be read by everybody is no secret, and PyJWT takes no such key.
        raise StartupError(f"The secret_file {path} holds a key as PEM; it needs random bytes.")
    return lambda header: secret


def _public_key(data: bytes) -> _FindKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from jwt.algorithms import RSAAlgorithm

    try:
        key = _checked(RSAAlgorithm(RSAAlgorithm.SHA256).prepare_key(data))
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    return lambda header: key


def _checked(key: Any) -> Any:
    """``key``, an RSA key that is good for checking signatures. Raises ``ValueError``."""
    if not hasattr(key, "verify"):
        raise ValueError("it is a private key, which belongs to the program that signs")
    if key.key_size < _MIN_RSA_BITS:
        raise ValueError(f"it has {key.key_size} bits; {_MIN_RSA_BITS} are needed")
    return key


def _key_set(data: bytes) -> _FindKey:
    """The keys of a JSON Web Key Set (RFC 7517), which tokens name by ``kid``."""
    import jwt

    keys = {
        key.key_id: _checked(key.key)
        for key in jwt.PyJWKSet.from_dict(json.loads(data)).keys
        if key.key_type == "RSA" and key.public_key_use in (None, "sig")
    }
    if not keys:
        raise ValueError("it has no key of type RSA for signatures")
    if len(keys) == 1:
        # Then a token need not name it.
        ((only, key),) = keys.items()
        return lambda header: key if header.get("kid") in (None, only) else None
    return lambda header: keys.get(header.get("kid"))
