"""Fingerprints of public keys, and signatures of a site's key of a run (privacy.secagg)."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
)
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

_PURPOSE = b"fedmutual secure aggregation, key of a run, 1"
_MOST_BYTES = 1024  # of a public key or a signature; P-521 needs 300


@dataclass(frozen=True)
class Proof:
    """Who says that a key is a site's: empty where nobody does.

    Attributes
    ----------
    signer : bytes
        The site's long-lived public key in OpenSSH's format.
    signature : bytes
        Of the run, the site's name and its key of the run.
    """

    signer: bytes = b""
    signature: bytes = b""


def fingerprint(public_key: bytes) -> str:
    """Return ``SHA256:...`` of a public key (PEM or OpenSSH), as ``ssh-keygen -lf`` prints it."""
    if not public_key:
        return ""
    try:
        load = load_ssh_public_key if public_key.startswith((b"ssh-", b"ecdsa-")) else load_pem_public_key
        text = load(public_key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        blob = base64.b64decode(text.split()[1])
    except (ValueError, UnsupportedAlgorithm):  # in simulation: random bytes
        blob = public_key
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def prove(private_key: Path, run: str, name: str, key: bytes) -> Proof:
    """Sign a site's key of a run with its long-lived key.

    Parameters
    ----------
    private_key : Path
        Without a passphrase, in OpenSSH's format or PEM: ECDSA, as Flower's node keys are, or Ed25519.

    Raises
    ------
    ValueError
        It is no such key.
    OSError
        It cannot be read.
    """
    data = private_key.read_bytes()
    try:
        load = load_ssh_private_key if b"OPENSSH PRIVATE KEY" in data else load_pem_private_key
        signer = load(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{private_key} is no private key without a passphrase: {error}") from error
    text = _statement(run, name, key)
    if isinstance(signer, EllipticCurvePrivateKey):
        signature = signer.sign(text, ECDSA(SHA256()))
    elif isinstance(signer, Ed25519PrivateKey):
        signature = signer.sign(text)
    else:
        raise ValueError(f"{private_key} is neither an ECDSA nor an Ed25519 key")
    return Proof(signer.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), signature)


def proven_by(proof: Proof, run: str, name: str, key: bytes) -> str:
    """Return the fingerprint of the key that has signed; empty where none has, or the signature is wrong."""
    if not proof.signature or max(len(proof.signer), len(proof.signature)) > _MOST_BYTES:
        return ""
    text = _statement(run, name, key)
    try:
        signer = load_ssh_public_key(proof.signer)
        if isinstance(signer, EllipticCurvePublicKey):
            signer.verify(proof.signature, text, ECDSA(SHA256()))
        elif isinstance(signer, Ed25519PublicKey):
            signer.verify(proof.signature, text)
        else:
            return ""
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        return ""
    return fingerprint(proof.signer)


def _statement(run: str, name: str, key: bytes) -> bytes:
    parts = (_PURPOSE, run.encode(), name.encode(), key)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
