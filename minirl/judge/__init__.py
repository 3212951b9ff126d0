"""Judge text that a model wrote, which may be hostile: read answers, compare them, run programs behind walls.

The functions here return verdicts. Of minirl they import errors, files and thoughts alone.
"""
