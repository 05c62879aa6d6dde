"""Keys and certificates for the tests of digital signatures."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class KeyPair:
    """An EC key, in two PEM files.

    Attributes:
        key: the key itself.
        private: the file of the private key.
        public: the file of the public key.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.private = folder / f"{name}.key"
        self.public = folder / f"{name}.pub"
        self.private.write_bytes(
            self.key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        self.public.write_bytes(
            self.key.public_key().public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )


class Certificate(KeyPair):
    """A key with a certificate that `issuer` has signed; without one, it is an authority of its own.

    Attributes:
        file: the PEM file of the certificate.
    """

    def __init__(
        self, folder: Path, name: str, issuer: Certificate | None = None, *, ca: bool = True
    ) -> None:
        super().__init__(folder, name)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        parent = self if issuer is None else issuer
        now = datetime.now(UTC)
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer is None else issuer.certificate.subject)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, content_commitment=False,
                    key_encipherment=False, data_encipherment=False, key_agreement=False,
                    encipher_only=False, decipher_only=False,
                ),
                critical=True,
            )
        )  # fmt: skip
        self.certificate: x509.Certificate = built.sign(parent.key, hashes.SHA256())
        self.file = folder / f"{name}.crt"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
