"""Logs in with the user's keys, one after the other: a key file, or the SSH agent's and the usual files.

Keys on security keys (FIDO, "sk-…") come last, because they wait for a touch; only the agent can use them.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import paramiko

from rankship_pipeline.foundation.commands import show_command
from rankship_pipeline.foundation.errors import AuthError, InputError, TargetTimeout
from rankship_targets.devices.device import Device
from rankship_targets.transport.ssh.key import read_private_key
from rankship_targets.transport.ssh.route import CONNECT_TIMEOUT_S, describe_address

USUAL = ("id_ed25519", "id_ecdsa", "id_rsa")
SECURITY_KEYS = ("id_ed25519_sk", "id_ecdsa_sk")
TOUCH_TIMEOUT_S = 30.0  # somebody must find the key and touch it
_SHOWN_REASONS = 6


class Offer(NamedTuple):
    """One key to log in with, and its name for messages."""

    name: str
    key: paramiko.PKey

    @property
    def needs_touch(self) -> bool:
        """Whether the key is on a security key."""
        return self.key.get_name().startswith("sk-")


class Keys(NamedTuple):
    """The keys to offer, in order, and why others cannot be."""

    offers: list[Offer]
    unusable: list[str]


def list_keys(device: Device, agent: paramiko.Agent | None) -> Keys:
    """List the user's keys for a device; a key file that cannot be read here is looked for in the SSH agent."""
    held = agent.get_keys() if agent else ()
    in_agent = [Offer(f"the agent's {key.get_name()} {key.comment}".strip(), key) for key in held]
    if device.key_file:
        return Keys([_find_named(device, Path(device.key_file).expanduser(), in_agent)], [])
    offers, unusable = list(in_agent), list[str]()
    for name in (*USUAL, *SECURITY_KEYS):
        path = Path.home() / ".ssh" / name
        if path.is_file() and not _find_in_agent(path, in_agent):
            try:
                offers.append(Offer(str(path), read_private_key(describe_address(device), path)))
            except (AuthError, InputError) as failure:
                unusable.append(str(failure).removeprefix(f"{describe_address(device)}: ").partition("\n")[0])
    return Keys(sorted(offers, key=lambda offer: offer.needs_touch), unusable)


def log_in(device: Device, connect: Callable[[], paramiko.Transport]) -> paramiko.Transport:
    """Return an authenticated connection; `connect` opens one, again where the server or a key has ended it.

    AuthError names every key that was refused; TargetTimeout if the server does not answer.
    """
    agent = _open_agent()
    try:
        return _try_keys(device, list_keys(device, agent), connect)
    finally:
        if agent is not None:
            agent.close()


def _open_agent() -> paramiko.Agent | None:
    """Return the user's SSH agent; None if there is none, or it does not answer."""
    try:
        return paramiko.Agent()
    except (paramiko.SSHException, OSError, EOFError, ValueError):
        return None


def _try_keys(device: Device, keys: Keys, connect: Callable[[], paramiko.Transport]) -> paramiko.Transport:
    waiting, reasons = list(keys.offers), list(keys.unusable)
    link = connect()
    while waiting:
        offer = waiting.pop(0)
        link.auth_timeout = TOUCH_TIMEOUT_S if offer.needs_touch else CONNECT_TIMEOUT_S
        try:
            further = link.auth_publickey(device.user or "", offer.key)
        except paramiko.BadAuthenticationType as failure:
            raise _explain_passwords(device, failure.allowed_types) from None
        except paramiko.AuthenticationException as failure:
            if "timeout" in str(failure).lower():
                raise _explain_silence(device, offer) from None
            reasons.append(f"{offer.name}: refused")
        except (paramiko.SSHException, EOFError, OSError) as failure:
            # The agent refused to sign, or the server had enough: either ends the connection.
            reasons.append(f"{offer.name}: {_describe(failure, offer)}")
        else:
            if further:
                raise _explain_second_factor(device, further)
            return link
        if waiting and not link.is_active():
            link = connect()
    raise _explain_refusal(device, link, keys, reasons)


def _find_named(device: Device, path: Path, in_agent: list[Offer]) -> Offer:
    """Return the key of a file, from the agent where only that can use it: with a passphrase, or on a security key."""
    known = _find_in_agent(path, in_agent)
    try:
        return Offer(str(path), read_private_key(describe_address(device), path))
    except (AuthError, InputError):
        if known:
            return known
        raise


def _find_in_agent(path: Path, in_agent: list[Offer]) -> Offer | None:
    """Return the agent's key whose public part stands beside a key file."""
    public = path if path.suffix == ".pub" else path.with_name(f"{path.name}.pub")
    words: list[str] = []
    with suppress(OSError, UnicodeDecodeError):
        words = public.read_text().split()
    return next((offer for offer in in_agent if offer.key.get_base64() in words), None)


def _describe(failure: BaseException, offer: Offer) -> str:
    if "cannot be used for signing" not in str(failure):
        return str(failure) or type(failure).__name__
    touch = "; was the security key plugged in and touched?" if offer.needs_touch else ""
    return f"the agent did not sign with it{touch}"


def _explain_silence(device: Device, offer: Offer) -> TargetTimeout:
    limit_s = TOUCH_TIMEOUT_S if offer.needs_touch else CONNECT_TIMEOUT_S
    message = f"{describe_address(device)}: the login did not end within {limit_s:g} s"
    hint = "touch the security key when it blinks" if offer.needs_touch else "check whether the device is overloaded"
    return TargetTimeout(message, hint=hint)


def _explain_second_factor(device: Device, further: list[str]) -> AuthError:
    message = f"{describe_address(device)} accepts the key and asks for {' or '.join(further)} as well"
    hint = "Rankship logs in while nobody is there: let a key alone suffice (AuthenticationMethods publickey)"
    return AuthError(message, hint=hint)


def _explain_passwords(device: Device, allowed: list[str]) -> AuthError:
    message = f"{describe_address(device)} takes no keys, only {' or '.join(allowed) or 'nothing'}"
    hint = f"set `PubkeyAuthentication yes` in its sshd_config, then copy your key there: {show_copy(device)}"
    return AuthError(message, hint=hint)


def _explain_refusal(device: Device, link: paramiko.Transport, keys: Keys, reasons: list[str]) -> AuthError:
    where = describe_address(device)
    shown = "; ".join([*reasons[:_SHOWN_REASONS], *(["…"] if len(reasons) > _SHOWN_REASONS else [])])
    copy = show_copy(device)
    if keys.offers:
        hint = f"check user and key; if the board knows none of your keys: {copy}"
        return AuthError(f"{where} refused the login: {shown}", hint=hint)
    try:
        link.auth_none(device.user or "")
    except paramiko.BadAuthenticationType as failure:
        if "publickey" not in failure.allowed_types:
            return _explain_passwords(device, failure.allowed_types)
    except (paramiko.SSHException, EOFError, OSError):
        pass  # it does not say what it would take
    why = f": {shown}" if shown else ": none in the SSH agent, none in the usual files"
    make = f"Rankship logs in with keys, never with passwords: make one with `ssh-keygen -t ed25519`, then {copy}"
    hint = f"run `ssh-add KEY`, or name key_file in the inventory, then {copy}" if keys.unusable else make
    return AuthError(f"{where}: no key to log in with{why}", hint=hint)


def show_copy(device: Device) -> str:
    """Return the command that puts the user's public key on the board, where its password is known."""
    words = ["ssh-copy-id", *(["-p", str(device.port)] if device.port != Device(name="", transport="ssh").port else [])]
    if device.via is not None:
        words += ["-o", f"ProxyJump={device.via.user}@{device.via.host}:{device.via.port}"]
    if device.key_file:
        words += ["-i", device.key_file]
    return show_command(*words, f"{device.user}@{device.host}")
