"""The daemon: what serves a bundle on a device day and night, and how it is asked and watched."""
