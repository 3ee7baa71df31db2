"""The certificate of a pool, made for it: whoever has its key belongs to it.

Dask's own protocol lets everybody who reaches a port run code there. So all of a pool's connections are
encrypted, on this machine as well, and both ends have to show the pool's certificate, whose key lies in a
folder that only its owner can read.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed.security import Security

_NAME = "fractal-runner-pool"
_VALID = datetime.timedelta(days=365)
_CLOCKS_DIFFER = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files of a pool's TLS.

    Attributes:
        cert: the certificate, which is its own authority.
        key: its key.
    """

    cert: str
    key: str

    @classmethod
    def below(cls, folder: str | os.PathLike[str]) -> TlsFiles:
        """Where they are in a pool's folder."""
        return cls(str(Path(folder, "pool.crt")), str(Path(folder, "pool.key")))

    def make(self) -> None:
        """Make both files, for their owner's eyes only.

        Raises:
            OSError: if they cannot be written, or are there already.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCKS_DIFFER)
            .not_valid_after(now + _VALID)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        _put(self.cert, certificate.public_bytes(serialization.Encoding.PEM))
        _put(
            self.key,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def security(self) -> Security:
        """The same, as Dask takes it."""
        from distributed.security import Security

        files: dict[str, Any] = {"tls_ca_file": self.cert}
        for role in ("client", "scheduler", "worker"):
            files |= {f"tls_{role}_cert": self.cert, f"tls_{role}_key": self.key}
        return Security(require_encryption=True, **files)  # type: ignore[no-untyped-call]


def _put(path: str, content: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
