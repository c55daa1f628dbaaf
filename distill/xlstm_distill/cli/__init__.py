"""The command line: parse, check, call, print."""
