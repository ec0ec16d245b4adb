"""Device kits: the runtimes that one device needs, built on this host, installed there without internet.

A board (glibc Linux, aarch64 or x86_64, with a Python of its own) gets unpacked wheels and a launcher that puts them
first on its Python's path. A phone gets a complete relocatable Python: loader, libraries and interpreter of Debian
arm64. Both get a C++ program that runs ExecuTorch, so that no device needs torch. A kit is named by its lock's hash.
"""
