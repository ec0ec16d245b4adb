"""Device kits: the runtimes that one device needs, built on this host, installed there without internet.

A board (glibc Linux, aarch64 or x86_64, with a Python of its own) gets wheels, unpacked beside a launcher that puts
them before its own. A phone gets a whole relocatable Python: loader, libraries and interpreter of Debian arm64. Both
get a C++ program that runs ExecuTorch, so that no device needs torch. A kit is named by the hash of its lock.
"""
