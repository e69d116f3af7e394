"""The question for a client's public key in a run, and the key in its answer (privacy.secagg)."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from fedmutual.wire.codec import MessageError
from fedmutual.wire.masks import KEY_BYTES
from fedmutual.wire.orders import folder_name
from fedmutual.wire.records import REPORT, read_config
from fedmutual.wire.signatures import Proof

MESSAGE_TYPE = "query.key"
_QUESTION = "key"


def key_question(run: str) -> RecordDict:
    """Ask for the key of a run."""
    return RecordDict({_QUESTION: ConfigRecord({"run": run})})


def read_key_question(content: RecordDict) -> str:
    """Return the name of the run.

    Raises
    ------
    MessageError
        It names none.
    """
    try:
        return folder_name(read_config(content, _QUESTION)["run"])
    except (KeyError, ValueError) as error:
        raise MessageError(f"key: malformed: {error!r}") from error


def read_key(content: RecordDict) -> tuple[bytes, Proof]:
    """Return the X25519 public key of an answer, and who says so.

    Raises
    ------
    MessageError
        It holds none.
    """
    answer = read_config(content, REPORT)
    key, signer, signature = (answer.get(name, b"") for name in ("key", "signer", "signature"))
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise MessageError(f"key: the answer holds no key of {KEY_BYTES} bytes")
    if not isinstance(signer, bytes) or not isinstance(signature, bytes) or len(signer + signature) > 2048:
        raise MessageError("key: the answer's signature is none")
    return key, Proof(signer, signature)
