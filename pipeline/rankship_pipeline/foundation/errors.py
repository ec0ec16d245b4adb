"""Every error that a user can see, grouped by who must act.

    RankshipError(message, *, hint)                                             exit
    ├─ InputError         a recipe, suite, inventory, flag or checkpoint: the user fixes it     2
    ├─ BuildError         the host could not make or verify the artifact                        3
    │   ├─ BudgetInfeasible   the budget is below the smallest model the options allow
    │   ├─ UnsupportedOp      an exporter met an operator it cannot lower
    │   ├─ ParityFailed       an artifact does not compute what the torch model computes
    │   ├─ MergeMismatch      the models to merge differ in more than their values
    │   └─ QualityLost        the merged or compressed model lost more than the recipe allows
    ├─ TargetError        the device or the connection to it failed                             4
    │   ├─ TransientTargetError   a session may try again, a bounded number of times
    │   │   ├─ ConnectionLost     Unreachable, Rebooted
    │   │   ├─ TargetTimeout, TargetBusy, AgentDied
    │   └─ PersistentTargetError  trying again cannot help
    │       ├─ AuthError          Unauthorised
    │       ├─ Lacks              WrongSystem
    │       └─ HostKeyChanged, AmbiguousDevice, CommandFailed, AgentMismatch, NoSpace, ReadOnly, Quarantined,
    │          ManifestRefused
    └─ MeasurementError   a number exists and must not be used                                  5
        ├─ UnlikeConditions   two results were taken under conditions that must not be compared
        └─ Throttled, ClockJumped, TraceGap

An error names the thing, the value, what was expected and, in `hint`, what to do next. Status 1 is no error's: it
means that a case is worse. What is no error of this tree is a mistake in the program (70, `ending.py`).
"""


class RankshipError(Exception):
    """Root of the tree; `hint` says what to do and `exit_code` is the process's exit status.

    A traceback, in a terminal or a notebook, shows the hint below the message.
    """

    exit_code = 70

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"→ {hint}")


class InputError(RankshipError):
    """A file, flag or checkpoint given by the user is wrong."""

    exit_code = 2


class BuildError(RankshipError):
    """The host could not make or verify an artifact."""

    exit_code = 3


class BudgetInfeasible(BuildError):
    """No choice of ranks fits the budget; the message names the smallest budget that works."""


class UnsupportedOp(BuildError):
    """An exporter cannot lower the model."""


class ParityFailed(BuildError):
    """An artifact's outputs differ from the torch model's beyond the recipe's limits."""


class MergeMismatch(BuildError):
    """Models to merge differ in more than their weights; the message lists every difference and what to do about it."""


class QualityLost(BuildError):
    """A specialist lost more by merging or compressing than the recipe allows; the message names each and its loss."""


class TargetError(RankshipError):
    """The device, or the connection to it, failed."""

    exit_code = 4


class TransientTargetError(TargetError):
    """The same call may succeed later; only a session retries, a few times, and records it in the trial."""


class ConnectionLost(TransientTargetError):
    """The link to the device broke or never came up."""


class Unreachable(ConnectionLost):
    """Nothing answers at the device's address, or no cable leads to it."""


class Rebooted(ConnectionLost):
    """The device rebooted: its running processes are gone and its settings are reset."""


class TargetTimeout(TransientTargetError):
    """The device did not answer within the call's limit."""


class TargetBusy(TransientTargetError):
    """Another run holds the device."""


class AgentDied(TransientTargetError):
    """The agent ended without an answer: it was killed, or the device ran out of memory."""


class PersistentTargetError(TargetError):
    """Trying again cannot help."""


class AuthError(PersistentTargetError):
    """The device refused every credential offered."""


class Unauthorised(AuthError):
    """The phone has not accepted this computer's debugging key."""


class HostKeyChanged(PersistentTargetError):
    """The device's host key is not the one pinned in the inventory."""


class CommandFailed(PersistentTargetError):
    """A command on the device ended with an error."""


class AgentMismatch(PersistentTargetError):
    """The agent on the device uses another protocol version than this host."""


class Lacks(PersistentTargetError):
    """The device lacks something that the work needs: a runtime, an interpreter, a tool."""


class WrongSystem(Lacks):
    """The device's processor or operating system cannot run the files built for it: wrong ABI, or 32 bits."""


class AmbiguousDevice(PersistentTargetError):
    """More than one device has the same serial."""


class NoSpace(PersistentTargetError):
    """The device's disk is too full for the files to copy."""


class ReadOnly(PersistentTargetError):
    """The device's file system refuses every write."""


class Quarantined(PersistentTargetError):
    """The device failed too often in a row and is left alone until `rankship doctor` clears it."""


class ManifestRefused(PersistentTargetError):
    """An artifact's manifest is not signed by this project's key, or does not match the file."""


class MeasurementError(RankshipError):
    """A number was measured and must not be used."""

    exit_code = 5


class UnlikeConditions(MeasurementError):
    """Two results were taken under conditions that must not be compared."""


class Throttled(MeasurementError):
    """The device throttled its clock during the measurement."""


class ClockJumped(MeasurementError):
    """The device's clock was set during the measurement."""


class TraceGap(MeasurementError):
    """A power trace does not cover the whole window, or its samples there are not valid readings."""
