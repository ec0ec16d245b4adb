// Runs a program with two system calls answered before proot 5.1 meets them; it would fail on both:
// statx, whose paths it does not translate (with ENOSYS, qemu falls back to calls that it does translate), and
// prctl(PR_SET_DUMPABLE), by which sftp-server forbids tracing (it is told that this was done).
// usage: proot-filter PROGRAM [ARGUMENT …]
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define ANSWER(what) BPF_STMT(BPF_RET | BPF_K, what)
// The next step where the loaded word equals `value`, else `steps` further on.
#define UNLESS(value, steps) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, steps)

int main(int count, char **words) {
    struct sock_filter steps[] = {
        LOAD(nr),
        UNLESS(SYS_statx, 1),
        ANSWER(SECCOMP_RET_ERRNO | ENOSYS),
        UNLESS(SYS_prctl, 3),
        LOAD(args[0]), // its lower half: both architectures are little-endian
        UNLESS(PR_SET_DUMPABLE, 1),
        ANSWER(SECCOMP_RET_ERRNO | 0),
        ANSWER(SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {.len = sizeof steps / sizeof *steps, .filter = steps};
    if (count < 2) {
        fputs("usage: proot-filter PROGRAM [ARGUMENT ...]\n", stderr);
        return 2;
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)) {
        perror("proot-filter: seccomp");
        return 126;
    }
    execvp(words[1], words + 1);
    perror(words[1]);
    return 127;
}
