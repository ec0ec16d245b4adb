"""A rack's keys, and the address of its scheduler: TLS wherever there are keys, loopback where there are none.

rack.pem  the certificate that every scheduler, worker and client of the rack shows, and asks for
rack.key  its private key: whoever has it may run any program on every host of the rack
signers   the signing keys, in hex, whose manifests the hosts believe: one line for each user
"""

import ipaddress
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rankship_pipeline.foundation.errors import InputError
from rankship_pipeline.foundation.files import ensure_writable, write_atomic
from rankship_pipeline.foundation.frozen import record
from rankship_targets.devices.device import user_folder
from rankship_targets.session.manifest import find_signer

if TYPE_CHECKING:
    from distributed import Security

CERTIFICATE, KEY, SIGNERS = "rack.pem", "rack.key", "signers"
PORT = 8786
_DAYS = 3650
_FOREIGN_BITS = 0o077
_MAKE = "`rankship worker --init FOLDER` makes keys; copy that folder to every host and name it with --keys"


@record
class Way:
    """How a rack's scheduler is reached, in Dask's form; without `keys` only on this machine."""

    address: str
    keys: Path | None

    @property
    def host(self) -> str:
        """The host's name or IP address."""
        return urlsplit(self.address).hostname or ""

    @property
    def port(self) -> int:
        """The port, Dask's usual one if none was named."""
        return urlsplit(self.address).port or PORT

    def secure(self) -> "Security | None":
        """Make Dask's own security options; None without keys."""
        if self.keys is None:
            return None
        from distributed import Security

        certificate, key = str(self.keys / CERTIFICATE), str(self.keys / KEY)
        pairs = {f"tls_{role}_cert": certificate for role in ("scheduler", "worker", "client")}
        pairs |= {f"tls_{role}_key": key for role in ("scheduler", "worker", "client")}
        create: Any = Security
        security: Security = create(tls_ca_file=certificate, require_encryption=True, **pairs)
        return security

    def read_signers(self) -> tuple[str, ...]:
        """Read the signing keys that the rack believes; without keys only this user's own, () here."""
        if self.keys is None:
            return ()
        path = self.keys / SIGNERS
        return tuple(path.read_text(encoding="ascii").split()) if path.exists() else ()


def find_way(text: str, keys: Path | None) -> Way:
    """Read `--scheduler` and `--keys`; InputError for an address beyond this machine without keys, or unsafe keys."""
    address = urlsplit(text if "://" in text else f"tcp://{text}")
    where = f"--scheduler {text}"
    try:
        host, port = address.hostname, address.port or PORT
    except ValueError as failure:
        raise InputError(f"{where}: {failure}", hint="name it as tcp://HOST:8786") from None
    if address.scheme not in {"tcp", "tls"} or not host:
        raise InputError(f"{where} is no address of a Dask scheduler", hint="name it as tcp://HOST:8786")
    shown = f"[{host}]" if ":" in host else host
    folder = keys or _find_usual()
    if folder is not None:
        _check(folder)
        return Way(address=f"tls://{shown}:{port}", keys=folder)
    if address.scheme == "tls" or not _is_loopback(host):
        message = f"{where} is beyond this machine, and there are no keys: whoever reached it could run any program"
        raise InputError(message, hint=_MAKE)
    return Way(address=f"tcp://{shown}:{port}", keys=None)


def make_keys(folder: Path) -> bool:
    """Make a rack's keys if the folder has none, and add this user to its signers; returns whether keys were made."""
    ensure_writable(folder, "--init")
    made = not (folder / KEY).exists()
    if made:
        certificate, key = _generate()
        write_atomic(folder / CERTIFICATE, certificate)
        write_atomic(folder / KEY, key, mode=0o600)  # last: where it is, the certificate is too
    _check(folder)
    path = folder / SIGNERS
    signers = path.read_text(encoding="ascii").split() if path.exists() else []
    if find_signer() not in signers:
        write_atomic(path, "".join(f"{one}\n" for one in (*signers, find_signer())).encode())
    return made


def _find_usual() -> Path | None:
    named = os.environ.get("RANKSHIP_RACK")
    folder = Path(named) if named else user_folder("XDG_CONFIG_HOME", ".config") / "rankship" / "rack"
    return folder if named or folder.is_dir() else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check(folder: Path) -> None:
    """Raise InputError unless both keys are there, private to this user, and not expired."""
    from cryptography import x509

    for name in (CERTIFICATE, KEY):
        if not (folder / name).is_file():
            raise InputError(f"--keys {folder}: no {name} in it", hint=_MAKE)
    if (folder / KEY).stat().st_mode & _FOREIGN_BITS:
        message = f"{folder / KEY} can be read by others, who could run any program on the rack's hosts"
        raise InputError(message, hint=f"chmod 600 {folder / KEY}, if nobody has read it; else make new keys")
    try:
        until = x509.load_pem_x509_certificate((folder / CERTIFICATE).read_bytes()).not_valid_after_utc
    except ValueError:
        raise InputError(f"{folder / CERTIFICATE} is no certificate", hint=_MAKE) from None
    if until < datetime.now(UTC):
        raise InputError(f"the keys in {folder} expired on {until:%Y-%m-%d}", hint=f"delete them; {_MAKE}")


def _generate() -> tuple[bytes, bytes]:
    """Make a certificate that signs itself, and its private key, both as PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key, now = generate_private_key(SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "rankship rack")])
    usage = {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    usage |= dict.fromkeys((*others, "encipher_only", "decipher_only"), False)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of a lab differ
        .not_valid_after(now + timedelta(days=_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private
