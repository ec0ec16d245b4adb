"""The agent: standard-library Python (3.9 or newer) that runs beside the runtime it drives, on the device.

`python agent.pyz '{"command": …}'` answers in JSON objects, one a line, on stdout; everything that runtimes print goes
to stderr. The last event is `done`, or `error` with exit status 1. The modules are packed into one file (see
client/agent_file.py), which is copied to devices under its hash. They import only the standard library and each other.
"""
