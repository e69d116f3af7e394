"""An authority, the server's certificate, and the sites' keys."""

from __future__ import annotations

import datetime
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
OWN_NAMES = ("superlink", "localhost", "127.0.0.1")  # that the server's own processes use
_EARLIER = datetime.timedelta(minutes=10)  # clocks differ


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its private key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        """The private key, PEM."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def certificate_pem(self) -> bytes:
        """The certificate, PEM: what sites trust."""
        return self.certificate.public_bytes(Encoding.PEM)


def make_authority(days: int = AUTHORITY_DAYS) -> Authority:
    """Make an authority (P-384)."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _named("fedmutual CA")
    extensions = [x509.BasicConstraints(True, 0), _usage(signs_certificates=True)]
    return Authority(key, _certificate(name, name, key, key, days, extensions))


def load_authority(key: bytes, certificate: bytes) -> Authority:
    """Load an authority from PEM.

    Raises
    ------
    ValueError
        They are no such files, or do not belong together.
    """
    private = load_pem_private_key(key, None)
    public = x509.load_pem_x509_certificate(certificate)
    if not isinstance(private, ec.EllipticCurvePrivateKey) or public.public_key() != private.public_key():
        raise ValueError("key and certificate do not belong together")
    return Authority(private, public)


def make_server_certificate(authority: Authority, hosts: Sequence[str], days: int) -> tuple[bytes, bytes]:
    """Make the server's private key (P-256) and its certificate for these names and addresses; both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys([*hosts, *OWN_NAMES])])
    extensions = [
        x509.BasicConstraints(False, None),
        _usage(signs_certificates=False),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        names,
    ]
    issuer = authority.certificate.subject
    certificate = _certificate(_named(hosts[0][:64]), issuer, key, authority.key, days, extensions)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private, certificate.public_bytes(Encoding.PEM)


def make_site_key(name: str) -> tuple[bytes, bytes]:
    """Make a SuperNode's key (P-384): private and public, in OpenSSH's format, with the name as comment."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, public_line(key.public_key(), name)


def public_line(key: ec.EllipticCurvePublicKey, name: str) -> bytes:
    """Return a public key as a line in OpenSSH's format, with the site's name as the comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {name}\n".encode()


def public_of(private: bytes, name: str) -> bytes:
    """Return the public line of a private key.

    Raises
    ------
    ValueError
        It is no elliptic-curve key without a passphrase.
    """
    try:
        key = load_ssh_private_key(private, None)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("it is no elliptic-curve key")
    return public_line(key.public_key(), name)


def checked_public(line: bytes, name: str) -> bytes:
    """Return a site's own public key as a line with its name.

    Raises
    ------
    ValueError
        It is no public key of an elliptic curve that Flower takes.
    """
    try:
        key = load_ssh_public_key(line)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(
        key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1
    ):
        raise ValueError("it is no ECDSA key; make one with ssh-keygen -t ecdsa -b 384")
    return public_line(key, name)


def expires(certificate: bytes) -> datetime.datetime:
    """Until when a certificate (PEM) is valid."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def hosts_of(certificate: bytes) -> set[str]:
    """DNS names and addresses of a certificate (PEM)."""
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return {str(name.value) for name in names.value}


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    days: int,
    extensions: Sequence[x509.ExtensionType],
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
    )
    for extension in extensions:
        critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA384() if signer.key_size == 384 else hashes.SHA256())


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def make_secret() -> bytes:
    """Return the secret between SuperLink and SuperExec, as text."""
    return secrets.token_hex(32).encode() + b"\n"
