"""`python -m rankship_targets.twin.warden HOST_PID PROGRAM …` runs a program that must not outlive its host process.

PR_SET_PDEATHSIG alone is not enough: its signal comes when the *thread* that started the child ends.
"""

import os
import select
import signal
import sys

from rankship_targets.twin.binfmt import die_with_parent


def main() -> None:
    """Run the program until it ends or its host ends; if this process ends, the kernel ends the program."""
    host_pid, argv = int(sys.argv[1]), sys.argv[2:]
    host = os.pidfd_open(host_pid)
    if os.getppid() != host_pid:  # it has already ended
        return
    child = os.fork()
    if child == 0:
        die_with_parent()
        try:
            os.execvp(argv[0], argv)  # noqa: S606 - an argument list is what we want
        finally:
            os._exit(127)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
    ended = os.pidfd_open(child)
    poll = select.poll()
    for descriptor in (host, ended):
        poll.register(descriptor, select.POLLIN)
    poll.poll()
    os.kill(child, signal.SIGKILL)  # not reaped yet, so the pid is still its own
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)


if __name__ == "__main__":
    main()
