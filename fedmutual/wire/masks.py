"""Pairwise masks: what a client sends is uniformly random, and the sum of all clients is exact.

Each pair of clients shares a stream of random numbers modulo 2^24, or 2^64 for sums of whole numbers; the one
whose name comes first adds it and the other subtracts it (Bonawitz et al. 2017, without the second mask: a
round in which somebody is missing is not completed, see :mod:`fedmutual.client.masking`). The stream is
ChaCha20's under a key that HKDF-SHA256 derives from the pair's X25519 secret and from the run, the round and
the list of those taking part. So answers to different lists do not cancel, and no stream is used twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmutual.learning.ring import RingArray, WideArray
from fedmutual.wire.codec import MessageError
from fedmutual.wire.signatures import Proof

KEY_BYTES = 32
NUMBER_BYTES, WIDE_BYTES = 3, 8  # of a number modulo 2^24, and modulo 2^64
_PURPOSE = b"fedmutual secure aggregation, pairwise mask, 1"


@dataclass(frozen=True)
class Cohort:
    """Those whose predictions are added up in a round, in order of their names.

    Attributes
    ----------
    names : tuple[str, ...]
    keys : tuple[bytes, ...]
        X25519 public key of each.
    proofs : tuple[Proof, ...]
        Who says so of each key; empty: nobody does of any.

    Raises
    ------
    MessageError
        Names or keys are repeated, out of order or of a wrong size.
    """

    names: tuple[str, ...]
    keys: tuple[bytes, ...]
    proofs: tuple[Proof, ...] = ()

    def __post_init__(self) -> None:
        if list(self.names) != sorted(set(self.names)):
            raise MessageError.to_everyone("cohort: its names are not sorted, or one is there twice")
        if len(self.keys) != len(self.names) or any(len(key) != KEY_BYTES for key in self.keys):
            raise MessageError.to_everyone("cohort: it has not one key of 32 bytes for each name")
        if len(self.proofs) not in (0, len(self.names)):
            raise MessageError.to_everyone("cohort: it has not one signature for each name")
        if len(set(self.keys)) != len(self.keys):
            raise MessageError.to_everyone("cohort: two names have one key")

    @property
    def members(self) -> dict[str, str]:
        """Key of each, in hex, by name."""
        return {name: key.hex() for name, key in zip(self.names, self.keys, strict=True)}

    def digest(self, run: str, round: int) -> bytes:
        """Return the SHA-256 of the run, the round and everybody's name and key."""
        parts = [run.encode(), str(round).encode()]
        for name, key in zip(self.names, self.keys, strict=True):
            parts += [name.encode(), key]
        return hashlib.sha256(b"".join(len(part).to_bytes(4, "big") + part for part in parts)).digest()


def new_key() -> bytes:
    """Return a fresh X25519 private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Return the public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def masked(
    values: RingArray | WideArray,
    private: bytes,
    name: str,
    cohort: Cohort,
    run: str,
    round: int,
    width: int = NUMBER_BYTES,
    terms: bytes = b"",
) -> WideArray:
    """Return a client's part with all its masks, modulo ``256^width``.

    They cancel only among clients that have the same ``terms``.

    Raises
    ------
    MessageError
        Naming the peer whose key is no key.
    """
    own = X25519PrivateKey.from_private_bytes(private)
    digest = hashlib.sha256(cohort.digest(run, round) + terms).digest()
    total = values.astype(np.uint64)
    for peer, key in zip(cohort.names, cohort.keys, strict=True):
        if peer == name:
            continue
        try:
            secret = own.exchange(X25519PublicKey.from_public_bytes(key))
        except ValueError as error:
            raise MessageError.to_everyone(f"cohort: the key of {peer} is none: leave it out") from error
        stream = _stream(HKDF(SHA256(), 32, salt=digest, info=_PURPOSE).derive(secret), len(values), width)
        total = total + stream if name < peer else total - stream
    return total & _largest(width)


def added(parts: Sequence[RingArray | WideArray], width: int = NUMBER_BYTES) -> WideArray:
    """Return the sum of everybody's masked parts, in which the masks cancel."""
    return cast(WideArray, np.sum(parts, axis=0, dtype=np.uint64) & _largest(width))


def pack(values: RingArray | WideArray, width: int = NUMBER_BYTES) -> bytes:
    """Return numbers below ``256^width`` as so many bytes each, the lowest first."""
    return bytes(values.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes())


def unpack(data: bytes, width: int = NUMBER_BYTES) -> WideArray:
    """Inverse of :func:`pack`."""
    whole = np.zeros((len(data) // width, 8), np.uint8)
    whole[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return whole.view("<u8").reshape(-1).astype(np.uint64)


def _largest(width: int) -> np.uint64:
    return np.uint64(256**width - 1)


def _stream(key: bytes, count: int, width: int) -> WideArray:
    """Return ``count`` uniform numbers below ``256^width``. A key has one stream only, so the nonce is 0."""
    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return unpack(encryptor.update(bytes(width * count)), width)
