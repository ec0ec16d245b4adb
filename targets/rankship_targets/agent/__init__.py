"""The agent: standard-library Python (3.9 or newer) that runs beside the runtime it drives, on the device.

`python agent.pyz '{"command": …}'` answers in JSON objects, one a line, on what was stdout; everything that runtimes
print goes to stderr. The last event is `done`, or `error` with status 1. Its rooms are packed into one file (see
agent_file.py), which is copied to devices under its hash. They import nothing but the standard library and each other.
"""
