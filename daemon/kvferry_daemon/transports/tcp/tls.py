"""Data connections under TLS 1.3: OpenSSL's, by way of Python's ``ssl``.

There is no authority. A daemon makes a certificate for one life of it, and its fingerprint goes to
the sink with the ticket, over the peer socket, which has proved who is who: the sink talks to that
certificate alone, and the source to whoever shows the ticket.
"""

import errno
import hashlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Self, cast

RECORD_BYTES = 1 << 14  # most that TLS encrypts at a time
RECORDS_MAX = 1 << 24  # of one connection; AES-GCM's key should not encrypt more (RFC 8446, 5.5)
Bytes = bytes | bytearray | memoryview


class EncryptionFailed(Exception):
    """No certificate can be made; the message says what is missing."""


class WrongCertificate(OSError):
    """Somebody else answered than the daemon that gave the ticket."""


class TlsSocket(ssl.SSLSocket):
    """A socket as the threads of a stream use it: whole lists of buffers in and out.

    One thread reads. Several may write, one after the other: OpenSSL does not bear two at once, and
    whoever has accepted a connection may still be at it when the first chunk goes out.
    """

    _write_lock: threading.Lock
    _records: int

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """``ssl`` makes its sockets without a call of ``__init__``."""
        made = super().__new__(cls, *args, **kwargs)
        made._write_lock = threading.Lock()
        made._records = 0
        return made

    def sendmsg(self, buffers: Iterable[Bytes]) -> int:  # type: ignore[override]
        """Send all of it; OSError, also where the connection's key has encrypted enough."""
        sent = 0
        with self._write_lock:
            for data in _joined(buffers):
                self._put(data)
                sent += len(data)
        return sent

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all of it, as ``sendmsg`` does."""
        self.sendmsg([memoryview(data)])

    def _put(self, data: Bytes) -> None:
        self._records += -(-len(data) // RECORD_BYTES)
        if self._records > RECORDS_MAX:
            raise OSError(errno.EKEYEXPIRED, "its key has encrypted enough; another one is opened")
        view = memoryview(data)
        while view:
            try:
                sent = self.write(view)
            except ValueError as error:  # of ssl: another thread has closed it
                raise OSError(errno.EBADF, str(error)) from error
            view = view[sent:]

    def recvmsg_into(  # type: ignore[override]
        self, buffers: Iterable[memoryview], ancbufsize: int = 0, flags: int = 0
    ) -> tuple[int, list[Any], int, Any]:
        """Fill the buffers, as if with MSG_WAITALL; less only where the connection has ended."""
        got = 0
        for view in buffers:
            while view:
                size = cast(int, self.read(len(view), view))  # with a buffer it is how many
                if not size:
                    return got, [], 0, None
                got += size
                view = view[size:]
        return got, [], 0, None

    def shutdown(self, how: int) -> None:
        """End the connection. ``ssl``'s own forgets the keys first, and writes go on in clear."""
        socket.socket.shutdown(self, how)


def _joined(buffers: Iterable[Bytes]) -> Iterator[Bytes]:
    """The same bytes; small ones together, since a record of its own costs more than a copy."""
    small: list[Bytes] = []
    size = 0
    for data in buffers:
        if size + len(data) > RECORD_BYTES and small:
            yield b"".join(small)
            small, size = [], 0
        if len(data) >= RECORD_BYTES:
            yield data
        else:
            small.append(data)
            size += len(data)
    if small:
        yield b"".join(small)


class Certificate:
    """What this life of the daemon shows to sinks. Its key is in this process alone."""

    def __init__(self) -> None:
        """Make one; EncryptionFailed without the package that makes it."""
        pem, self.sha256 = _self_signed()
        self._context = _context(ssl.PROTOCOL_TLS_SERVER)
        self._context.num_tickets = 0  # no session is taken up again, and sinks wait for no bytes
        with os.fdopen(os.memfd_create("kvferry-certificate", os.MFD_CLOEXEC), "wb") as file:
            file.write(pem)  # ssl reads files only; this one is never on a disk
            file.flush()
            self._context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")

    def accept(self, sock: socket.socket, until_s: float) -> TlsSocket:
        """Shake hands with a sink that has connected; OSError. ``sock`` is not to be used again."""
        return _shaken(self._context, sock, until_s, server_side=True)


def connect_tls(sock: socket.socket, certificate_sha256: bytes, until_s: float) -> TlsSocket:
    """Shake hands with the source; OSError. ``sock`` is not to be used again."""
    encrypted = _shaken(_client_context(), sock, until_s, server_side=False)
    shown = encrypted.getpeercert(binary_form=True)
    if shown is None or hashlib.sha256(shown).digest() != certificate_sha256:
        encrypted.close()
        raise WrongCertificate("its certificate is not the one that came with the ticket")
    return encrypted


def _shaken(
    context: ssl.SSLContext, sock: socket.socket, until_s: float, *, server_side: bool
) -> TlsSocket:
    encrypted = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
    assert isinstance(encrypted, TlsSocket)
    try:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the other side is too slow")
        encrypted.settimeout(left_s)  # for all of the handshake
        encrypted.do_handshake()
    except OSError:
        encrypted.close()
        raise
    return encrypted


@cache
def _client_context() -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nobody has signed it: connect_tls knows the only good one
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.sslsocket_class = TlsSocket
    return context


def _self_signed() -> tuple[bytes, bytes]:
    """Key and certificate as PEM, and the certificate's SHA-256."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise EncryptionFailed(
            f"payload_encryption is tls, but {error}: pip install 'kvferry[tls]'"
        ) from error
    import datetime

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kvferry")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(datetime.datetime(2000, 1, 1))  # nobody asks: it ends with this process
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    shown = certificate.public_bytes(serialization.Encoding.PEM)
    return pem + shown, certificate.fingerprint(hashes.SHA256())
