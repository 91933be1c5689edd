"""The certificate of a server and its key, looked at before uWebSockets is given them.

uWebSockets says no more than that it cannot use them, or nothing: then handshakes fail.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlrooms_server.errors import StartupError

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

_BEGIN_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_END_OF_KEY_LABEL = b"PRIVATE KEY-----"

# Errors of the verification of a certificate, as OpenSSL numbers them.
_NOT_YET_VALID = 9
_EXPIRED = 10


@dataclass(frozen=True, slots=True)
class Certificate:
    """Two PEM files: a certificate, with what is between it and its authority, and its key."""

    certificate: str
    key: str

    def check(self) -> None:
        """Raise ``StartupError`` for files that no handshake would succeed with; warn of others."""
        if _BEGIN_CERTIFICATE not in _contents(self.certificate, "--tls-cert"):
            raise StartupError(
                f"--tls-cert {self.certificate} has no certificate in the PEM format "
                f"({_BEGIN_CERTIFICATE.decode()})."
            )
        if _END_OF_KEY_LABEL not in _contents(self.key, "--tls-key"):
            raise StartupError(f"--tls-key {self.key} has no private key in the PEM format.")
        context = self._context()
        if stat.S_IMODE(os.stat(self.key).st_mode) & stat.S_IROTH:
            log.warning(
                "Every user of this machine can read the key %s; chmod o= would prevent it.",
                self.key,
            )
        self._warn_of_dates(context)

    def _context(self) -> ssl.SSLContext:
        # Not at the top: a server without TLS starts without it.
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pair = f"--tls-cert {self.certificate} and --tls-key {self.key}"
        try:
            context.load_cert_chain(self.certificate, self.key, password=self._refuse_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise StartupError(
                    f"{pair} do not belong together: the key is of another certificate."
                ) from error
            raise StartupError(f"{pair} cannot be used: {error.reason or error}.") from error
        return context

    def _refuse_password(self) -> bytes:
        raise StartupError(
            f"--tls-key {self.key} is encrypted, and there is nobody to ask for its password. "
            f"Decrypt it: openssl pkey -in {self.key} -out FILE."
        )

    def _warn_of_dates(self, context: ssl.SSLContext) -> None:
        """Shake hands with ourselves: only a client looks at the dates of a certificate."""
        import ssl

        client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        client.check_hostname = False
        # Trust the certificate itself, whoever signed it.
        client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        client.load_verify_locations(self.certificate)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        ends = (
            client.wrap_bio(to_client, to_server),
            context.wrap_bio(to_server, to_client, server_side=True),
        )
        # Each waits for the other twice at most.
        for end in ends * 3:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                if error.verify_code == _EXPIRED:
                    log.warning("The certificate %s has expired; renew it.", self.certificate)
                elif error.verify_code == _NOT_YET_VALID:
                    log.warning("The certificate %s is not valid yet.", self.certificate)
                return
            except ssl.SSLError:
                # Whoever connects is told what is the matter.
                return


def _contents(path: str, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartupError(f"Cannot read {flag} {path}: {error.strerror}.") from error
