"""The daemon over HTTP: a page for people, the status and metrics for programs. Loaded only where it is enabled: it takes some megabytes."""

BODIES = 2
"""Large bodies of requests that are held at once, at most."""
