"""Certificates for the tests, made on the spot."""

from __future__ import annotations

import ssl
from datetime import datetime
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)


class Files:
    """An authority, and a certificate of this machine that it signed, as PEM files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._authority = trustme.CA()
        self.authority = str(directory / "authority.pem")
        self._authority.cert_pem.write_to_path(self.authority)
        self.certificate, self.key = self.issue("server")

    @property
    def settings(self) -> dict[str, str]:
        return {"tls_cert": self.certificate, "tls_key": self.key}

    def issue(self, name: str, not_after: datetime | None = None) -> tuple[str, str]:
        """Another certificate and its key."""
        leaf = self._authority.issue_cert("localhost", "127.0.0.1", not_after=not_after)
        certificate, key = self._directory / f"{name}.pem", self._directory / f"{name}.key"
        certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.touch(mode=0o600)
        key.write_bytes(leaf.private_key_pem.bytes())
        return str(certificate), str(key)

    def encrypted_key(self) -> str:
        """The key, with a password."""
        key = load_pem_private_key(Path(self.key).read_bytes(), None)
        path = self._directory / "encrypted.key"
        how = BestAvailableEncryption(b"password")
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how))
        return str(path)

    def context(self) -> ssl.SSLContext:
        """That of a client who trusts the authority."""
        return ssl.create_default_context(cafile=self.authority)
